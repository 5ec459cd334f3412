"""Quantization from Python: `quantize`, `report`, `evaluate` and `export`."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, Dataset

from .commands.train import inputs_digest, parse_arguments
from .data import Augmentation
from .deploy import IntegerProgram, export_obstacles, export_student
from .engine import (
    Accuracy,
    RunFolder,
    check_machine,
    count_correct,
    count_outputs,
    read_student,
    write_student,
)
from .errors import UsageError
from .methods import (
    METHODS,
    check_memory,
    method_class,
)
from .quantization import (
    LayerBits,
    QuantizationConfig,
    activation_quantizers,
    bits_table,
    prepare,
    render_bits,
    set_activation_mode,
)
from .quantizing import build_problem, check_problem, run_method, schedule_share

__all__ = [
    "Images",
    "Report",
    "evaluate",
    "export",
    "quantize",
    "report",
    "restore",
    "save",
]

_log = logging.getLogger("fdda_ext")

#: Images ``[n, C, H, W]``, or a Dataset, DataLoader or iterable of batches or single images, with
#: or without labels.
Images: TypeAlias = "Tensor | Dataset[Any] | Iterable[Any]"

#: Name under which a student stores how it was made: in ``meta``, which copies keep, and as an
#: attribute, which pickling keeps.
_KEY = "made_by_fdda_ext"
_BATCH = 64
#: Options of the command line that `quantize` takes, beside all sections below them.
_OPTIONS = (
    *("augmented_images", "bias_correction", "cuda_graphs", "equalisation", "images_at_once"),
    *("precision", "quantization", "settings", "training_pixels"),
)


def quantize(
    network: nn.Module,
    images: Images,
    labels: Tensor | None = None,
    *,
    bits: str = "W4A4",
    method: str = "fdda",
    minutes: float | None = 10.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    preset: str = "short",
    options: Mapping[str, Any] | None = None,
    max_images: int = 1024,
    augmentation: Augmentation | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    exportable: bool = True,
    progress: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
) -> GraphModule:
    """Quantize a trained convolutional network.

    Ctrl-C ends training after the current iteration and returns the student so far. A second Ctrl-C
    raises KeyboardInterrupt.

    Args:
        network: The trained network. It is neither changed nor moved.
        images: Normalised calibration images: a float tensor ``[n, C, H, W]``, or a Dataset,
            DataLoader or iterable of batches ``[b, C, H, W]`` or of pairs ``(images, labels)``. A
            tensor is used whole. From the others, at most ``max_images`` are taken, equally many
            per class if labels are known.
        labels: Classes of a tensor's images, int64 ``[n]``. FDDA needs labels. Other methods can
            use the network's predictions.
        bits: Bits of weights and activations.
        method: Name of the method, as for ``python -m fdda_ext.train --method``.
        minutes: Time limit of the training. The schedule is shortened to it, so the result depends
            on the machine's speed. None runs the whole schedule.
        seed: Seed for all random numbers.
        device: Device to compute on; None for the network's device.
        preset: Preset with the method's settings, "short" or "paper".
        options: Options of the command line: ``settings.*``, ``quantization.*``, ``precision``,
            ``cuda_graphs``, ``equalisation``, ``augmented_images``, ``bias_correction``,
            ``images_at_once`` and ``training_pixels``, such as
            ``{"settings.distillation.lr": 1e-4, "quantization.first_last_bits": 8}``.
        max_images: Largest number of images taken. See ``images``.
        augmentation: Random variations of images; None for random crops and flips.
        mean: Mean that normalised the images, per channel, for pixels from 0 to 1. With it, methods
            that optimise images keep them in the range of real ones.
        std: Standard deviation, like ``mean``.
        exportable: Whether to refuse, before training, a network that cannot be exported.
        progress: Whether to show a progress bar.
        out: Folder for checkpoints, metrics and the student; None writes nothing.
        resume: Whether to continue the run in ``out``, with the same arguments.

    Returns:
        The student, in evaluation mode on ``device``. It maps images ``[N, C, H, W]`` to logits
        ``[N, K]``, which are bit-identical to those of the exported program under
        ``torch.no_grad()``. With gradients, it can be trained further.

    Raises:
        UsageError: If an argument is wrong, or the network cannot be quantized as asked.

    Example:
        >>> from fdda_ext.data import calibration_set
        >>> from fdda_ext.models import load_model
        >>> images, labels = calibration_set("glyphs")
        >>> student = quantize(load_model("glyphs_resnet"), images, labels, method="minmax")
        >>> student(images[:2]).shape
        torch.Size([2, 71])
    """
    place = _place(network, device)
    config, _ = parse_arguments(_arguments(method, bits, preset, seed, str(place), options))
    kind = method_class(method)
    if minutes is not None and not 0 < minutes < math.inf:
        raise UsageError(f"quantize: expected minutes above 0 and finite, got {minutes}")
    if max_images < 1:
        raise UsageError(f"quantize: expected max_images at least 1, got {max_images}")
    if resume and out is None:
        raise UsageError("quantize: expected out with resume, got none")
    if (mean is None) != (std is None):
        raise UsageError("quantize: expected mean and std together, got only one of them")
    own = next(network.parameters()).device
    found, found_labels, num_classes = _collect(images, labels, network, own, max_images)
    if found_labels is None:
        if kind.needs_labels:
            raise UsageError(
                f"quantize: expected labels with method {method}, got none; methods without labels "
                f"are {', '.join(n for n, m in METHODS.items() if not m.needs_labels)}"
            )
        found_labels = _answers(network, found, own)
    problem = build_problem(
        copy.deepcopy(network),
        found,
        found_labels,
        num_classes=num_classes,
        quantization=config.quantization,
        seed=seed,
        device=str(place),
        precision=config.precision,
        augmentation=augmentation,
        mean=mean,
        std=std,
        cuda_graphs=config.cuda_graphs,
        images_at_once=config.images_at_once,
        augmented_images=config.augmented_images,
        training_pixels=config.training_pixels,
        equalisation=config.equalisation,
        bias_correction=config.bias_correction,
    )
    check_problem(problem, [method], exportable=exportable)
    check_memory(method, problem, config.settings)
    folder, stored = None, {"method": method, "seed": seed, "bits": bits, "preset": preset}
    if out is not None:
        settings = {
            "quantization": asdict(config.quantization),
            "settings": asdict(config.settings),
        }
        text = yaml.safe_dump({**stored, "minutes": minutes, **settings}, sort_keys=False)
        folder = RunFolder(Path(out), text, resume=resume, inputs=inputs_digest(problem))
    with folder.removed_if_unused() if folder else nullcontext():
        share = schedule_share(method, problem, config.settings, minutes, folder)
        trained, done = run_method(
            method, problem, config.settings.scaled(share), folder, show=progress
        )
        student = trained.student.eval()
        _must_quantize(student)
        if done.iterations < trained.iterations:
            where = f"; resume=True continues the run in {out}" if out is not None else ""
            _log.warning(
                "quantize: %s after %d of %d iterations%s",
                *("interrupted" if done.interrupted else "stopped", done.iterations),
                *(trained.iterations, where),
            )
        made = {
            **stored,
            "quantization": asdict(trained.quantization),
            "num_classes": num_classes,
            "image_shape": list(found.shape[1:]),
            "images": len(found) if kind.real_images else 0,
            "iterations": done.iterations,
            "planned": trained.iterations,
            "schedule_share": share,
            "seconds": done.seconds,
            "mean": None if mean is None else list(mean),
            "std": None if std is None else list(std),
        }
        _note(student, made)
        if folder is not None:
            save(student, folder.path / "student.safetensors")
            trained.save_artifacts(folder.path)
    return student


def save(student: GraphModule, path: str | Path) -> None:
    """Write a student from `quantize` to a safetensors file that `restore` reads.

    Raises:
        UsageError: If ``student`` is not from `quantize`.
    """
    write_student(Path(path), student, _made(student, "save"))


def restore(network: nn.Module, path: str | Path) -> GraphModule:
    """Rebuild the student that `save` wrote.

    Args:
        network: The float network that was quantized, or one of the same architecture.
        path: The file.

    Returns:
        The student, in evaluation mode, on the network's device.

    Raises:
        UsageError: If the file is damaged or holds a student of another network.
    """
    state, made = read_student(Path(path), "restore")
    try:
        example = torch.zeros(1, *made["image_shape"], device=next(network.parameters()).device)
        student = prepare(network, QuantizationConfig(**made["quantization"]), example)
        student.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError, UsageError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"restore: expected {path} to hold a student of {type(network).__name__}, got {reason}"
        ) from None
    _note(student, made)
    return student


def _place(network: nn.Module, device: str | torch.device | None) -> torch.device:
    """Return the device to compute on. Refuse what is not a network."""
    if not isinstance(network, nn.Module) or not any(True for _ in network.parameters()):
        raise UsageError(
            "quantize: expected network to be a torch.nn.Module with parameters, "
            f"got {type(network).__name__}"
        )
    place = str(device or next(network.parameters()).device)
    check_machine("quantize", device=place)
    return torch.device(place)


def _arguments(
    method: str,
    bits: str,
    preset: str,
    seed: int,
    device: str,
    options: Mapping[str, Any] | None,
) -> list[str]:
    given = {"method": method, "bits": bits, "preset": preset, "seed": seed, "device": device}
    twice = sorted(given.keys() & (options or {}).keys())
    if twice:
        raise UsageError(f"quantize: expected {twice[0]} as an argument only, got it in options")
    for name in options or {}:
        if name.replace("-", "_").partition(".")[0] not in _OPTIONS:
            raise UsageError(f"quantize: expected options {', '.join(_OPTIONS)}, got {name}")
    texts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in {**given, **(options or {})}.items()
    }
    return ["--baselines=[]", *(f"--{name}={text}" for name, text in texts.items())]


def _collect(
    images: Images,
    labels: Tensor | None,
    network: nn.Module,
    device: torch.device,
    most: int,
) -> tuple[Tensor, Tensor | None, int]:
    """Return images ``[n, C, H, W]``, labels ``[n]`` if known, and K."""
    if isinstance(images, Tensor):
        if images.dim() != 4 or not len(images):
            raise UsageError(
                f"quantize: expected images [n, C, H, W], got shape {tuple(images.shape)}"
            )
        found, parts = images.detach().float().cpu(), labels
        num_classes = count_outputs(network, found[:1].to(device), "quantize")
    else:
        if labels is not None:
            raise UsageError(
                "quantize: expected labels only with a tensor of images, got labels and a "
                f"{type(images).__name__}; let it yield pairs (images, labels)"
            )
        found, parts, num_classes = _drawn(images, network, device, most)
    if parts is None:
        return found, None, num_classes
    found_labels = torch.as_tensor(parts).detach().cpu()
    if found_labels.shape != (len(found),) or found_labels.is_floating_point():
        raise UsageError(
            f"quantize: expected labels to be {len(found)} integers, one for each image, "
            f"got {found_labels.dtype} of shape {tuple(found_labels.shape)}"
        )
    found_labels = found_labels.long()
    if not (int(found_labels.min()) >= 0 and int(found_labels.max()) < num_classes):
        raise UsageError(
            f"quantize: expected labels between 0 and {num_classes - 1}, because the network gives "
            f"{num_classes} logits, got {int(found_labels.min())} to {int(found_labels.max())}"
        )
    return found, found_labels, num_classes


def _drawn(
    images: Any, network: nn.Module, device: torch.device, most: int
) -> tuple[Tensor, Tensor | None, int]:
    """Take at most ``most`` images from an iterable, equally many per class if it has labels."""
    chosen: list[Tensor] = []
    chosen_labels: list[int] = []
    num_classes, taken = 0, Counter[int]()
    labelled = True
    for batch, labels in batches_of(images, "quantize"):
        if not chosen:
            num_classes = count_outputs(network, batch[:1].float().to(device), "quantize")
            labelled = labels is not None
        if not labelled or labels is None:
            chosen += batch.float().cpu()[: most - len(chosen)]
            if len(chosen) == most:
                break
            continue
        share = max(most // num_classes, 1)
        for image, label in zip(batch, labels.tolist(), strict=True):
            if taken[label] < share:
                taken[label] += 1
                chosen.append(image.float().cpu())
                chosen_labels.append(label)
        if sum(taken[k] == share for k in range(num_classes)) == num_classes:
            break
    if not chosen:
        raise UsageError("quantize: expected at least one image, got none")
    found = torch.stack(chosen)
    return found, torch.tensor(chosen_labels) if labelled else None, num_classes


def batches_of(images: Any, command: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield batches ``[b, C, H, W]`` with labels ``[b]`` or None, from any source of images.

    Raises:
        UsageError: If ``images`` is or yields anything else.
    """
    if isinstance(images, Dataset):
        images = DataLoader(images, batch_size=_BATCH)
    elif isinstance(images, Tensor):
        images = images.split(_BATCH)
    elif (
        isinstance(images, tuple)
        and len(images) == 2
        and all(isinstance(x, Tensor) for x in images)
    ):
        images = zip(*(part.split(_BATCH) for part in images), strict=True)
    if not isinstance(images, Iterable):
        raise UsageError(
            f"{command}: expected images to be a tensor, Dataset, DataLoader or iterable, "
            f"got {type(images).__name__}"
        )
    for item in images:
        batch, labels = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        if not isinstance(batch, Tensor) or batch.dim() not in (3, 4):
            got = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise UsageError(
                f"{command}: expected batches of images [b, C, H, W], or pairs of images and "
                f"labels [b], got {got}"
            )
        if labels is not None:
            labels = torch.as_tensor(labels)
        if batch.dim() == 3:  # a single image
            batch, labels = batch[None], None if labels is None else labels.view(1)
        yield batch, labels


@torch.no_grad()
def _answers(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Return the classes that the network predicts, ``[n]``."""
    batches = images.split(_BATCH)
    return torch.cat([network(batch.to(device)).argmax(1).cpu() for batch in batches])


def _must_quantize(student: GraphModule) -> None:
    """Quantize activations with the ranges found so far.

    Raises:
        KeyboardInterrupt: If the run was interrupted before any range was found.
    """
    modes = {quantizer.mode for quantizer in activation_quantizers(student)}
    if "observe" in modes:
        set_activation_mode(student, "quantize")
    elif "float" in modes:
        raise KeyboardInterrupt("interrupted before the ranges of activations were found")


def _note(student: GraphModule, made: dict[str, Any]) -> None:
    student.meta[_KEY] = made
    setattr(student, _KEY, made)


def _made(student: GraphModule, command: str) -> dict[str, Any]:
    """Return what `_note` stored."""
    made = None
    if isinstance(student, GraphModule):
        made = student.meta.get(_KEY) or getattr(student, _KEY, None)
        if made and not all("shape" in n.meta for n in student.graph.find_nodes(op="placeholder")):
            raise UsageError(
                f"{command}: expected student to be from quantize or restore, got a pickled one, "
                "which has lost the shapes of its tensors; use fdda_ext.save and fdda_ext.restore"
            )
    if made is None:
        raise UsageError(
            f"{command}: expected student to be from fdda_ext.quantize, "
            f"got {type(student).__name__}"
        )
    return dict(made)


@torch.no_grad()
def evaluate(network: nn.Module, images: Images, labels: Tensor | None = None) -> Accuracy:
    """Measure the accuracy of a network, a student or an integer program.

    Args:
        network: Module from images ``[N, C, H, W]`` to logits ``[N, K]``. It is put in evaluation
            mode.
        images: Float tensor ``[n, C, H, W]``, or a Dataset, DataLoader or iterable of pairs
            ``(images, labels)``.
        labels: Classes of a tensor's images, int64 ``[n]``.

    Returns:
        Top-1 and top-5 accuracy in per cent, and the number of images.

    Raises:
        UsageError: If there is no image, or a label is missing or outside 0 to K - 1.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    pairs = (images, labels) if isinstance(images, Tensor) and labels is not None else images
    network.eval()
    correct1 = correct5 = count = 0
    for batch, classes in batches_of(pairs, "evaluate"):
        if classes is None:
            raise UsageError("evaluate: expected a label for every image, got none for some images")
        logits = network(batch.to(device)).cpu()
        among = count_correct(logits, classes.cpu())
        correct1, correct5, count = correct1 + among[0], correct5 + among[1], count + len(batch)
    if not count:
        raise UsageError("evaluate: expected at least one image, got none")
    return Accuracy(100 * correct1 / count, 100 * correct5 / count, count)


def export(
    student: GraphModule,
    path: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> IntegerProgram:
    """Write the integer program of a student to one file that `fdda_ext.load` reads.

    If program and student differ on a few images, no file is written.

    Args:
        student: Student from `quantize`.
        path: The file, such as "network.int4.safetensors".
        mean: Mean that normalised the images, per channel, for pixels from 0 to 1. With it, the
            program also accepts uint8 images. None for the one given to `quantize`.
        std: Standard deviation of the normalisation, like ``mean``.

    Returns:
        The program, on the CPU.

    Raises:
        UsageError: If the student cannot be exported, or the file cannot be written.
    """
    made = _made(student, "export")
    mean, std = (given or made[name] for given, name in ((mean, "mean"), (std, "std")))
    if (mean is None) != (std is None):
        raise UsageError("export: expected mean and std together, got only one of them")
    normalisation = (None, None) if mean is None or std is None else (tuple(mean), tuple(std))
    return export_student(student, path, *normalisation)


@dataclass(frozen=True)
class Report:
    """Facts about a student. ``str`` gives them as text.

    Attributes:
        method: Name of the method.
        bits: Bits of weights and activations, such as "W4A4".
        iterations: Iterations done.
        planned: Iterations of the run's schedule.
        seconds: Training time in seconds.
        images: Calibration images used.
        weights: Number of weights in all convolutions and linear layers.
        weight_bytes: Their bytes at their bits.
        float_bytes: Their bytes in float32.
        layers: One row for each layer.
        obstacles: Operations that prevent the export; empty if the student can be exported.
    """

    method: str
    bits: str
    iterations: int
    planned: int
    seconds: float
    images: int
    weights: int
    weight_bytes: int
    float_bytes: int
    layers: tuple[LayerBits, ...]
    obstacles: tuple[str, ...]

    def __str__(self) -> str:
        trained = "ranges without training"
        if self.planned:
            trained = f"{self.iterations} of {self.planned} iterations in {self.seconds:.0f} s"
        possible = "every operation has an integer counterpart"
        lines = [
            f"{self.method}, {self.bits}: {trained}, {self.images} calibration images",
            f"{len(self.layers)} layers with {self.weights} weights: {self.weight_bytes} bytes, "
            f"{self.float_bytes} in float32",
            f"export: {'; '.join(self.obstacles) or possible}",
            "",
            render_bits(self.layers),
        ]
        return "\n".join(lines)


def report(student: GraphModule) -> Report:
    """Describe a student from `quantize`: training, size, and bits of every layer.

    Raises:
        UsageError: If ``student`` is not from `quantize`.
    """
    made = _made(student, "report")
    layers = tuple(bits_table(student))
    sizes = [math.prod(row.weight_shape) for row in layers]
    return Report(
        method=made["method"],
        bits=made["bits"],
        iterations=made["iterations"],
        planned=made["planned"],
        seconds=made["seconds"],
        images=made["images"],
        weights=sum(sizes),
        weight_bytes=sum(
            -(-size * row.weight_bits // 8) for size, row in zip(sizes, layers, strict=True)
        ),
        float_bytes=4 * sum(sizes),
        layers=layers,
        obstacles=tuple(export_obstacles(student)),
    )
