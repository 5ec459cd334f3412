"""From a network and images to a quantized student: what `fdda_ext.quantize` and the command share.

1. `build_problem` puts the network and the images on a device.
2. `check_problem` refuses, before time is spent, what a method or the export cannot take.
3. `run_method` builds the method and trains its student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .data import Augmentation
from .deploy import export_obstacles, refusal
from .distribution import local_device
from .engine import Progress, ProgressBar, RunFolder, must_fit, train
from .errors import UsageError
from .methods import Method, MethodSettings, Problem, build_method, check_method
from .quantization import QuantizationConfig, any_memory_format

__all__ = ["build_problem", "check_problem", "run_method"]


def build_problem(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    quantization: QuantizationConfig,
    seed: int,
    device: str = "cpu",
    precision: str | None = None,
    augmentation: Augmentation | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    cuda_graphs: bool = True,
    images_at_once: int | None = None,
) -> Problem:
    """Put a trained network and its calibration images on a device.

    Args:
        network: The trained network. It is moved to ``device``, and its parameters are frozen.
        images: Normalised calibration images, float32 ``[n, C, H, W]``.
        labels: Their classes, int64 ``[n]``.
        num_classes: K.
        quantization: Bits, grid and ranges of the student.
        seed: Seed of every random number.
        device: "cpu" or "cuda".
        precision: "float32" or "bfloat16" for the float network and the generator; None for
            bfloat16 on a GPU and float32 on a CPU.
        augmentation: How images may be varied; None for random crops and flips.
        mean: Normalisation of the images, one value for each channel; None if unknown.
        std: The deviation that belongs to ``mean``.
        cuda_graphs: Whether to replay steps as CUDA graphs on a GPU.
        images_at_once: See `Problem`.
    """
    place = torch.device(local_device(device))
    teacher = network.to(place).eval().requires_grad_(False)
    # CPUs and GPUs run convolutions fastest in this memory format. All that follows keeps it.
    teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = any_memory_format(teacher, images[:1].to(place))
    pixel_range = None
    if mean is not None and std is not None:
        shift, scale = (torch.tensor(v, device=place).view(-1, 1, 1) for v in (mean, std))
        pixel_range = (-shift / scale, (1 - shift) / scale)
    return Problem(
        teacher,
        num_classes,
        images.to(place, memory_format=torch.channels_last),
        labels.to(place),
        augmentation or Augmentation(),
        quantization,
        seed,
        getattr(torch, precision or ("bfloat16" if place.type == "cuda" else "float32")),
        pixel_range=pixel_range,
        cuda_graphs=cuda_graphs,
        images_at_once=images_at_once,
    )


def check_problem(problem: Problem, methods: Sequence[str], *, exportable: bool) -> None:
    """Refuse, before time is spent, a network that cannot be quantized as asked.

    Args:
        problem: The network and its images.
        methods: Names of all methods that are to run on it.
        exportable: Whether the student must become an integer program. The paper's grid has none,
            so it is not asked for there.

    Raises:
        UsageError: If the network has a structure that cannot be quantized, a method needs what it
            lacks, or an operation has no integer counterpart; names every such operation.
    """
    for name in methods:
        check_method(name, problem.teacher)
    student = problem.quickly_prepared().student()
    if not exportable or problem.quantization.grid != "deploy":
        return
    if obstacles := export_obstacles(student):
        raise UsageError(
            f"model: {refusal(obstacles)}; or train a student that is never exported: "
            "--exportable false on the command line, exportable=False in Python"
        )


def run_method(
    name: str,
    problem: Problem,
    settings: MethodSettings,
    folder: RunFolder | None = None,
    *,
    max_seconds: float | None = None,
    evaluation: Callable[[Method, ProgressBar], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    show: bool = True,
) -> tuple[Method, Progress]:
    """Build a method, which calibrates its student, and train it to its end.

    Args:
        name: The method.
        problem: The network and its images.
        settings: Constants of all methods.
        folder: Where metrics and checkpoints go, and what a stopped run goes on from; None to
            write nothing.
        max_seconds: Stop after so many seconds of training.
        evaluation: Measures the method's student during training.
        evaluate_every: Iterations between two evaluations.
        show: Whether to show a progress bar.

    Returns:
        The method with its student, and how far its training came: fewer iterations than
        ``method.iterations`` after a time-out or Ctrl-C.
    """
    with must_fit(images_per_class=max(len(problem.images) // problem.num_classes, 1)):
        method = build_method(name, problem, settings)
    progress = Progress(0, 0.0)
    if method.iterations:
        progress = train(
            method,
            folder,
            description=name,
            max_seconds=max_seconds,
            evaluation=None if evaluation is None else lambda bar: evaluation(method, bar),
            evaluate_every=evaluate_every,
            device=problem.device,
            show=show,
        )
    return method, progress
