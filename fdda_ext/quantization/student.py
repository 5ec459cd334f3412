"""What is done to a whole student: calibrate, change modes, keep scales positive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .grid import MIN_SCALE
from .layers import QuantizedConv2d, QuantizedLinear
from .quantizer import (
    ActivationMode,
    ActivationQuantizer,
    LearnedActivationQuantizer,
    LearnedWeightQuantizer,
)
from .ranges import Histogram

__all__ = [
    "IMAGES_AT_ONCE",
    "activation_quantizers",
    "calibrate",
    "collecting",
    "project_scales_",
    "scale_parameters",
    "set_activation_mode",
]

#: Images in a batch, when calibration images come as one tensor.
IMAGES_AT_ONCE = 32


@torch.no_grad()
def calibrate(student: nn.Module, batches: Tensor | Iterable[Tensor]) -> None:
    """Set all ranges, by the rules of the student's configuration; activations quantize from then.

    Weight ranges come first, from the current weights. Activation ranges are then found in one
    sweep, with quantized weights, which is what the activations will be made with, and with
    activations still in float, so that no range depends on how well another was chosen. Of each
    tensor a histogram is kept, so memory does not grow with the number of images, and neither the
    order nor the size of the batches matters.

    Args:
        student: From `prepare`.
        batches: Normalised images ``[n, 3, H, W]``, all in one tensor or batch by batch.

    Raises:
        UsageError: If there is no image, an activation is not finite, or ``student`` is none.
    """
    if not activation_quantizers(student):
        raise UsageError(
            "calibrate: expected student to be a network from prepare, got one without quantizers"
        )
    for module in student.modules():
        if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
            module.weight_quantizer.calibrate(module.weight)
    with collecting(activation_quantizers(student)):
        seen = 0
        for batch in _as_batches(batches):
            if batch.dim() != 4:
                raise UsageError(
                    "calibrate: expected batches of images [n, 3, H, W], "
                    f"got shape {tuple(batch.shape)}"
                )
            if not batch.shape[0]:
                continue
            student(batch)
            seen += batch.shape[0]
        if not seen:
            raise UsageError("calibrate: expected at least one image, got none")


@contextmanager
def collecting(quantizers: Sequence[ActivationQuantizer]) -> Iterator[list[Histogram]]:
    """Set the ranges of ``quantizers`` from what passes through them inside; then they quantize.

    Yields:
        What passes, of each.
    """
    histograms = [Histogram() for _ in quantizers]
    for quantizer, histogram in zip(quantizers, histograms, strict=True):
        quantizer.mode, quantizer.histogram = "collect", histogram
    try:
        yield histograms
    finally:
        for quantizer in quantizers:
            quantizer.mode, quantizer.histogram = "float", None
    for quantizer, histogram in zip(quantizers, histograms, strict=True):
        quantizer.calibrate(histogram)
        quantizer.mode = "quantize"


def _as_batches(batches: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    yield from batches.split(IMAGES_AT_ONCE) if isinstance(batches, Tensor) else batches


def activation_quantizers(student: nn.Module) -> list[ActivationQuantizer]:
    """The student's activation quantizers, in order of execution."""
    return [m for m in student.modules() if isinstance(m, ActivationQuantizer)]


def set_activation_mode(student: nn.Module, mode: ActivationMode) -> None:
    """Put every activation quantizer into ``mode``.

    Args:
        student: From `prepare`.
        mode: "observe" moves the ranges with every forward pass (FDDA's first epochs), "quantize"
            leaves them as they are, "float" passes activations through.

    Raises:
        UsageError: If the ranges are to be used but have never been set, or there is no such mode.
    """
    if mode not in ("float", "observe", "quantize"):
        raise UsageError(
            f"set_activation_mode: expected mode to be float, observe or quantize, got {mode}"
        )
    quantizers = activation_quantizers(student)
    if mode == "quantize" and quantizers:
        reach = torch.stack([q.high - q.low for q in quantizers])
        if not bool((reach > 0).any()):
            raise UsageError(
                "set_activation_mode: expected ranges to be set before mode quantize, got none; "
                "use calibrate, or observe some batches"
            )
    for quantizer in quantizers:
        quantizer.mode = mode


def scale_parameters(student: nn.Module) -> list[nn.Parameter]:
    """Trainable scales and zero points of all quantizers; none in the paper's grid."""
    return [
        parameter
        for module in student.modules()
        if isinstance(module, (LearnedWeightQuantizer, LearnedActivationQuantizer))
        for parameter in module.parameters(recurse=False)
    ]


@torch.no_grad()
def project_scales_(student: nn.Module) -> None:
    """After an optimizer step: scales positive again, zero points among the codes."""
    scales = []
    for module in student.modules():
        if isinstance(module, (LearnedWeightQuantizer, LearnedActivationQuantizer)):
            scales.append(cast(Tensor, module.scale))
            if isinstance(module.zero_point, nn.Parameter):
                module.zero_point.clamp_(module.quant_min, module.quant_max)
    if scales:
        torch._foreach_clamp_min_(scales, MIN_SCALE)
