"""Functions on a whole student: calibration, modes, positive scales."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..errors import UsageError
from .equalisation import clip_exactly_
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
    "float_copy",
    "project_scales_",
    "scale_parameters",
    "set_activation_mode",
]

#: Batch size if the calibration images are one tensor.
IMAGES_AT_ONCE = 32


@torch.no_grad()
def calibrate(student: nn.Module, batches: Tensor | Iterable[Tensor]) -> None:
    """Set all ranges by the student's range rules, then quantize activations.

    The ranges of weights are set first, from the current weights. Then one pass over the images
    collects a histogram of every activation. In this pass weights are quantized but activations are
    not, so no range depends on another. Memory does not grow with the number of images. Order and
    size of the batches do not matter.

    Args:
        student: Network from `prepare`.
        batches: Normalised images ``[n, 3, H, W]``, all in one tensor or batch by batch.

    Raises:
        UsageError: If there is no image, an activation is not finite, or ``student`` has no
            quantizers.
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
    """Set the ranges of ``quantizers`` from the values that they get in this context.

    Afterwards, they quantize.

    Yields:
        Histograms of these values, one for each quantizer.
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
    """Return the student's activation quantizers, in order of execution."""
    return [m for m in student.modules() if isinstance(m, ActivationQuantizer)]


def set_activation_mode(student: nn.Module, mode: ActivationMode) -> None:
    """Put every activation quantizer into ``mode``.

    Args:
        student: Network from `prepare`.
        mode: "observe" moves the ranges with every forward pass (FDDA's first epochs), "quantize"
            keeps them, "float" leaves activations in float.

    Raises:
        UsageError: If ``mode`` is unknown, or is "quantize" before any range was set.
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
    """Return the trainable scales and zero points of all quantizers; none for the paper grid."""
    return [
        parameter
        for module in student.modules()
        if isinstance(module, (LearnedWeightQuantizer, LearnedActivationQuantizer))
        for parameter in module.parameters(recurse=False)
    ]


def float_copy(student: GraphModule) -> GraphModule:
    """Return a copy of ``student`` without quantization, on the same graph."""
    reference = copy.deepcopy(student).requires_grad_(False)
    for module in list(reference.modules()):
        if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
            module.set_submodule("weight_quantizer", nn.Identity())
    for quantizer in activation_quantizers(reference):
        quantizer.mode = "float"
    clip_exactly_(reference)
    return reference


@torch.no_grad()
def project_scales_(student: nn.Module) -> None:
    """Make scales positive and keep zero points among the codes, after an optimizer step."""
    scales = []
    for module in student.modules():
        if isinstance(module, (LearnedWeightQuantizer, LearnedActivationQuantizer)):
            scales.append(cast(Tensor, module.scale))
            if isinstance(module.zero_point, nn.Parameter):
                module.zero_point.clamp_(module.quant_min, module.quant_max)
    if scales:
        torch._foreach_clamp_min_(scales, MIN_SCALE)
