"""The steps from a network and images to a student, for `fdda_ext.quantize` and `fdda_ext.train`.

1. `build_problem` puts the network and the images on a device.
2. `check_problem` refuses a network that a method or the export cannot handle.
3. `schedule_share` shortens or stretches the schedule to the available time.
4. `run_method` builds the method and trains its student.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Augmentation, augment
from .deploy import export_obstacles, refusal
from .distribution import local_device
from .engine import Progress, ProgressBar, RunFolder, must_fit, train
from .engine.checkpoint import atomic_write_text
from .errors import UsageError
from .methods import (
    Method,
    MethodSettings,
    Problem,
    build_method,
    build_on_few,
    check_method,
    fitting_share,
)
from .quantization import QuantizationConfig, any_memory_format

__all__ = [
    "build_problem",
    "check_problem",
    "run_method",
    "schedule_share",
    "smaller_images",
    "with_views",
]

_log = logging.getLogger("fdda_ext")


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
    augmented_images: int | None = None,
    training_pixels: int | None = None,
    equalisation: float | None = None,
    bias_correction: bool = False,
) -> Problem:
    """Put a network and its calibration images on a device.

    Args:
        network: The trained network. It is moved to ``device``, and its parameters are frozen.
        images: Normalised calibration images, float32 ``[n, C, H, W]``.
        labels: Their classes, int64 ``[n]``.
        num_classes: K.
        quantization: Bits, grid and ranges of the student.
        seed: Seed for all random numbers.
        device: "cpu" or "cuda".
        precision: "float32" or "bfloat16" for the float network and the generator. None means
            bfloat16 on a GPU and float32 on a CPU.
        augmentation: Random variations of images; None for random crops and flips.
        mean: Mean that normalised the images, per channel, for pixels from 0 to 1; None if unknown.
        std: Standard deviation, like ``mean``.
        cuda_graphs: Whether to replay steps as CUDA graphs on a GPU.
        images_at_once: See `Problem`.
        augmented_images: Largest number of calibration images and random views of them, see
            `with_views`; None for no views.
        training_pixels: Largest number of pixels of an image in training, see `smaller_images`;
            None for images of full size.
        equalisation: See `Problem`.
        bias_correction: See `Problem`.
    """
    place = torch.device(local_device(device))
    teacher = network.to(place).eval().requires_grad_(False)
    # CPUs and GPUs run convolutions fastest in this memory format. All later code keeps it.
    teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = any_memory_format(teacher, images[:1].to(place))
    pixel_range = None
    if mean is not None and std is not None:
        shift, scale = (torch.tensor(v, device=place).view(-1, 1, 1) for v in (mean, std))
        pixel_range = (-shift / scale, (1 - shift) / scale)
    problem = Problem(
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
    if augmented_images is not None:
        problem = with_views(problem, augmented_images)
    if training_pixels is not None:
        problem = smaller_images(problem, training_pixels)
    return replace(problem, equalisation=equalisation, bias_correction=bias_correction)


#: A view shows at least this share of the image, so that it keeps the class.
_LEAST_CROP = 0.5


def with_views(problem: Problem, count: int) -> Problem:
    """Return ``problem`` with random views of its images, as many as ``count`` allows.

    A view is a random crop, resized to the size of the image, and flipped at random if flips keep
    the class. Every image is followed by equally many views. More than half of ``count`` images
    get none.

    Args:
        problem: Problem with images ``[n, C, H, W]``.
        count: Largest number of images and views together.
    """
    views = count // len(problem.images)
    if views <= 1:
        return problem
    least, most = problem.augmentation.crop_scale
    augmentation = replace(
        problem.augmentation, crop_scale=(max(least, min(_LEAST_CROP, most)), most)
    )
    random = problem.random()
    sets = [problem.images]
    sets += [augment(problem.images, augmentation, random) for _ in range(views - 1)]
    images = torch.stack(sets, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    labels = problem.labels.repeat_interleave(views)
    return replace(problem, images=images, labels=labels, views=views)


#: Sides of smaller images are multiples of this, because networks halve their maps five times.
_MULTIPLE = 32


@torch.no_grad()
def smaller_images(problem: Problem, pixels: int) -> Problem:
    """Return ``problem`` with smaller images in training, if they are larger than ``pixels``.

    A convolutional network computes the same function of each region at any image size, so ranges
    and weights serve images of full size too, and an iteration takes less time and memory. Images
    are resized by averaging areas. A network that needs the full size keeps it, with a warning.

    Args:
        problem: Problem with images ``[n, C, H, W]``.
        pixels: Largest H x W in training; at least 32 x 32 is kept.
    """
    height, width = problem.images.shape[-2:]
    factor = math.sqrt(pixels / (height * width))
    if factor >= 1:
        return problem
    steps = [max(round(side * factor / _MULTIPLE), 1) for side in (height, width)]
    size = [min(n * _MULTIPLE, side) for n, side in zip(steps, (height, width), strict=True)]
    first = F.interpolate(problem.images[:1], size, mode="area")
    student = problem.quickly_prepared().student()  # without ranges, it leaves activations in float
    try:
        same = student(first).shape == problem.teacher(problem.images[:1]).shape
        same = same and bool(problem.teacher(first).isfinite().all())
    except RuntimeError:
        same = False
    if not same:
        _log.warning(
            "training: expected a network that takes %dx%d images, for training_pixels %d, got one "
            "that does not; training uses %dx%d",
            *(*size, pixels, height, width),
        )
        return problem
    images = [F.interpolate(part, size, mode="area") for part in problem.images.split(64)]
    smaller = torch.cat(images).contiguous(memory_format=torch.channels_last)
    return replace(problem, images=smaller, large_images=problem.images)


def check_problem(problem: Problem, methods: Sequence[str], *, exportable: bool) -> None:
    """Refuse a network that cannot be quantized as asked.

    Args:
        problem: The network and its images.
        methods: Names of all methods that will run on it.
        exportable: Whether the student must be exportable. Ignored for the paper grid, which has no
            integer programs.

    Raises:
        UsageError: If the network's structure cannot be quantized, it lacks what a method needs, or
            operations have no integer counterpart. The message names all of these.
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


def schedule_share(
    name: str,
    problem: Problem,
    settings: MethodSettings,
    minutes: float | None,
    folder: RunFolder | None = None,
    *,
    most: float = 1.0,
) -> float:
    """Return the share of a method's schedule that fits into ``minutes``.

    A short trial measures the pace, see `fdda_ext.methods.measure_pace`.

    Args:
        name: Name of the method.
        problem: The network and its images.
        settings: Settings of all methods.
        minutes: Time for trial and training; None for the whole schedule.
        folder: Run folder, which stores the share for a resumed run; None stores nothing.
        most: Largest share.

    Raises:
        UsageError: If the time is over before the first iteration.
    """
    if minutes is None:
        return 1.0
    path = folder.path / "schedule_share.json" if folder else None
    if path is not None and path.exists():
        return float(json.loads(path.read_text()))

    def build(settings: MethodSettings, images: int) -> Method:
        return build_on_few(name, problem, settings, images)

    count = len(problem.images)
    share = fitting_share(build, settings, count, 60 * minutes, problem.device, most=most)
    if share != 1:
        _log.info("%s: runs %.3g of the schedule to fit into %g min", name, share, minutes)
    if path is not None:
        atomic_write_text(path, json.dumps(share) + "\n")
    return share


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
    """Build a method, which calibrates its student, and train the student.

    Args:
        name: Name of the method.
        problem: The network and its images.
        settings: Settings of all methods.
        folder: Run folder, from whose checkpoint a stopped run continues; None writes nothing.
        max_seconds: Time limit of the training, in seconds.
        evaluation: Measurement of the method's student during training.
        evaluate_every: Iterations between two evaluations.
        show: Whether to show a progress bar.

    Returns:
        The method with its student, and its progress, which ends before ``method.iterations`` after
        a time-out or Ctrl-C.
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
