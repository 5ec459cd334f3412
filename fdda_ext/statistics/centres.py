"""BNS centres: per class and layer, the BN statistics of the calibration images.

FDDA (Zhong et al., ECCV 2022, section 3.2) shows that these statistics cluster by class in the deep
layers, and that one image per class suffices to see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..distribution import gather, own_slice, shares
from ..errors import UsageError
from ..ops import class_batch_stats
from .capture import capture
from .losses import LayerStatistics

__all__ = ["CLASSES_PER_PASS", "BNSCentres", "compute_centres", "load_centres", "save_centres"]

#: Number of classes whose images pass through the network together.
CLASSES_PER_PASS = 32


@dataclass(frozen=True)
class BNSCentres:
    """Centres of one teacher; they are not valid for other networks.

    Attributes:
        statistics: Mean and biased variance ``[K, C_l]`` of every layer.
        correct: Whether the teacher classifies a calibration image of each class correctly, bool
            ``[K]``.
    """

    statistics: LayerStatistics
    correct: Tensor


@torch.no_grad()
def compute_centres(
    teacher: nn.Module, images: Tensor, labels: Tensor, num_classes: int, parts: int = 1
) -> BNSCentres:
    """Compute the BNS centres of ``teacher``, which is put in evaluation mode.

    If a class has several images, only those that the teacher classifies correctly are used, or all
    if there are none. The paper has one image per class and distrusts the centre of a misclassified
    image.

    Several ranks share the passes. The result is bit-identical to that of one rank.

    Args:
        teacher: The trained network.
        images: Calibration images ``[n, C, H, W]``, normalised, not augmented.
        labels: Classes of the images, int64 ``[n]``.
        num_classes: Number of classes, K.
        parts: Number of smaller passes into which each pass is divided, to save memory.

    Returns:
        The centres. The statistics of each class are exactly those of a batch of only its used
        images.

    Raises:
        UsageError: If a class has no image.
    """
    images_per_class = torch.bincount(labels, minlength=num_classes)
    missing = (images_per_class == 0).nonzero().flatten()
    if missing.numel():
        raise UsageError(
            "compute_centres: expected at least one calibration image of every class, "
            f"got none of class {int(missing[0])}"
        )
    teacher.eval()
    order = labels.argsort(stable=True)
    means: list[list[Tensor]] = []
    variances: list[list[Tensor]] = []
    correct = torch.zeros(num_classes, dtype=torch.bool, device=labels.device)
    at_once = -(-CLASSES_PER_PASS // parts)
    passes = range(0, num_classes, at_once)
    own = passes[own_slice(len(passes))]
    for first in own or passes[:1]:  # a rank without passes needs the numbers of channels
        last = min(first + at_once, num_classes)
        begin, end = int(images_per_class[:first].sum()), int(images_per_class[:last].sum())
        chosen = order[begin:end]
        chosen_labels = labels[chosen]
        classes = last - first
        found: list[tuple[Tensor, Tensor]] = []

        # The only image of a class is always used, so no layer's input must be kept.
        single = len(chosen) == classes
        of = chosen_labels - first
        measure = partial(_append_statistics, found, of=of, classes=classes) if single else None
        seen = capture(teacher, images[chosen], measure)
        right = seen.logits.argmax(1) == chosen_labels
        correct[chosen_labels[right]] = True
        counts = right | ~correct[chosen_labels]
        for layer, x in enumerate(seen.inputs):
            _append_statistics(found, layer, x[counts], of=of[counts], classes=classes)
        if not means:
            means, variances = [[] for _ in found], [[] for _ in found]
        for layer, (mean, variance) in enumerate(found):
            means[layer].append(mean)
            variances[layer].append(variance)
    ends = [min(at_once * n, num_classes) for n in accumulate(shares(len(passes)))]
    of_ranks = [end - begin for begin, end in pairwise([0, *ends])]

    def of_all(parts: list[Tensor]) -> Tensor:
        return gather(torch.cat(parts) if own else parts[0][:0], of_ranks)

    statistics = LayerStatistics([of_all(m) for m in means], [of_all(v) for v in variances])
    return BNSCentres(statistics, gather(correct[own.start : own.stop], of_ranks))


def _append_statistics(
    found: list[tuple[Tensor, Tensor]], layer: int, x: Tensor, *, of: Tensor, classes: int
) -> None:
    """Append mean and variance ``[classes, C]`` of ``x [N, C, *]`` with the classes ``of [N]``."""
    assert len(found) == layer
    _, mean, variance = class_batch_stats(x, of, classes)
    found.append((mean, variance))


def save_centres(centres: BNSCentres, path: Path) -> None:
    """Write safetensors: ``mean.<l>`` and ``variance.<l>`` ``[K, C_l]``, ``correct [K]``."""
    tensors = {"correct": centres.correct.to(torch.uint8)}
    for layer, (mean, variance) in enumerate(zip(*centres.statistics, strict=True)):
        tensors[f"mean.{layer}"] = mean.contiguous()
        tensors[f"variance.{layer}"] = variance.contiguous()
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, str(path))


def load_centres(path: Path, device: torch.device | str = "cpu") -> BNSCentres:
    """Read a file of `save_centres`.

    Raises:
        UsageError: If the file is missing, damaged or of another form.
    """
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            num_layers = sum(name.startswith("mean.") for name in file.keys())
            statistics = LayerStatistics(
                [file.get_tensor(f"mean.{layer}") for layer in range(num_layers)],
                [file.get_tensor(f"variance.{layer}") for layer in range(num_layers)],
            )
            return BNSCentres(statistics, file.get_tensor("correct").bool())
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"load_centres: expected path to be a file of BNS centres, got {path} ({error})"
        ) from None
