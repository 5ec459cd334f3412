"""Quantizer modules, each with the range of one tensor or of every channel of a weight."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..distribution import extremes
from ..ops import fake_quantize
from .config import QuantizationConfig
from .grid import Grid, along_channels, paper_quantize, paper_steps, straight_through
from .ranges import Histogram, RangeRule, find_range

__all__ = [
    "ActivationMode",
    "ActivationQuantizer",
    "LearnedActivationQuantizer",
    "LearnedWeightQuantizer",
    "PaperActivationQuantizer",
    "PaperWeightQuantizer",
    "WeightQuantizer",
    "build_activation_quantizer",
    "build_weight_quantizer",
]

#: "float" passes the tensor through. "collect" does so and counts its values. "observe" moves the
#: range with every batch, then quantizes. "quantize" quantizes with a fixed range.
ActivationMode = Literal["float", "collect", "observe", "quantize"]
_MODES: tuple[ActivationMode, ...] = get_args(ActivationMode)


class WeightQuantizer(nn.Module):
    """Base of the weight quantizers.

    Attributes:
        grid: Grid of the weight.
        rule: Range rule of `calibrate`.
    """

    def __init__(self, grid: Grid, rule: RangeRule) -> None:
        super().__init__()
        self.grid = grid
        self.rule = rule

    @torch.no_grad()
    def calibrate(self, weight: Tensor) -> None:
        """Set the range of every output channel from ``weight [C, *]``."""
        rows = weight.detach().flatten(1).float()
        low, high = rows.aminmax(dim=1)
        self.set_range(*find_range(rows, None, low, high, self.grid, self.rule))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the ranges of the channels to ``low`` and ``high``, ``[C]`` each."""
        raise NotImplementedError

    def position(self, weight: Tensor) -> Tensor:
        """Return the codes of ``weight [C, *]`` before rounding and clamping."""
        raise NotImplementedError

    def values(self, codes: Tensor) -> Tensor:
        """Return the values of ``codes [C, *]``, fractions included: the inverse of `position`."""
        raise NotImplementedError

    def codes(self, weight: Tensor) -> Tensor:
        """Return the codes of ``weight [C, *]``, in float32."""
        return self.position(weight).round_().clamp_(self.grid.quant_min, self.grid.quant_max)

    def extra_repr(self) -> str:
        """Describe bits and kind of grid."""
        return f"{self.grid.bits} bits, {self.grid.kind}"


class LearnedWeightQuantizer(WeightQuantizer):
    """Weight quantizer of the deploy grid: symmetric, a learned scale for every output channel.

    Attributes:
        scale: float32 ``[C]``, trainable.
        zero_point: float32 ``[C]``, all 0.
        gradient_factor: Factor of the scale's gradients.
    """

    zero_point: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        rule: RangeRule,
        scale_gradient: Literal["lsq", "none"],
    ) -> None:
        super().__init__(Grid("symmetric", bits), rule)
        channels = weight.shape[0]
        self.quant_min, self.quant_max = self.grid.quant_min, self.grid.quant_max
        self.gradient_factor = _gradient_factor(scale_gradient, weight[0].numel(), self.quant_max)
        ones = torch.ones(channels, device=weight.device, dtype=torch.float32)
        self.scale = nn.Parameter(ones)
        self.register_buffer("zero_point", torch.zeros_like(ones), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Round ``weight [C, *]`` to the grids of its channels."""
        scale = _scale_gradient(self.scale, self.gradient_factor)
        return fake_quantize(weight, scale, self.zero_point, self.quant_min, self.quant_max, 0)

    @override
    @torch.no_grad()
    def position(self, weight: Tensor) -> Tensor:
        return weight * (1 / along_channels(self.scale, weight))

    @override
    def values(self, codes: Tensor) -> Tensor:
        return codes * along_channels(self.scale, codes)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the smallest scales that cover ``low`` to ``high``, ``[C]`` each."""
        with torch.no_grad():
            self.scale.copy_(self.grid.parameters(low, high)[0])


class PaperWeightQuantizer(WeightQuantizer):
    """Weight quantizer of the paper grid: asymmetric.

    With the rule "minmax", as in the authors' code, every forward pass uses the range of the
    current weights. The other rules set the range once.
    """

    low: Tensor
    high: Tensor

    def __init__(self, weight: Tensor, bits: int, rule: RangeRule) -> None:
        super().__init__(Grid("paper", bits), rule)
        self.moving = rule.name == "minmax"
        if not self.moving:
            zeros = torch.zeros(weight.shape[0], device=weight.device, dtype=torch.float32)
            self.register_buffer("low", zeros)
            self.register_buffer("high", zeros.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """Round ``weight [C, *]`` to the grids of its channels."""
        values = weight.detach()
        low, high = values.flatten(1).aminmax(dim=1) if self.moving else (self.low, self.high)
        low, high = along_channels(low, weight), along_channels(high, weight)
        return straight_through(weight, paper_quantize(values, low, high, self.grid.bits))

    @override
    @torch.no_grad()
    def position(self, weight: Tensor) -> Tensor:
        steps, offset = self._steps(weight)
        return (weight * steps).sub_(offset)

    @override
    def values(self, codes: Tensor) -> Tensor:
        steps, offset = self._steps(codes)
        return (codes + offset) / steps

    def _steps(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The s and z of `paper_steps` for a fixed range."""
        if self.moving:
            raise ValueError("weight codes need a range that does not move with the weights")
        low, high = along_channels(self.low, like), along_channels(self.high, like)
        return paper_steps(low, high, self.grid.bits)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set ``low`` and ``high [C]``, unless the range moves with the weights."""
        if not self.moving:
            self.low.copy_(low)
            self.high.copy_(high)


class ActivationQuantizer(nn.Module):
    """Base of the activation quantizers, with one range for the whole tensor.

    Attributes:
        grid: Grid of the activation.
        rule: Range rule of `calibrate`.
        mode: An `ActivationMode`. It is part of the state dict, so a student resumes in its mode.
        low: Lower end of the observed or calibrated range, float32 scalar.
        high: Upper end of this range, float32 scalar.
    """

    low: Tensor
    high: Tensor

    def __init__(self, grid: Grid, rule: RangeRule, momentum: float) -> None:
        super().__init__()
        self.grid = grid
        self.rule = rule
        self.momentum = momentum
        self.mode: ActivationMode = "float"
        self.histogram: Histogram | None = None
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    @property
    def signed(self) -> bool:
        """Whether the tensor may be negative."""
        return self.grid.kind == "asymmetric"  # the paper grid quantizes only ReLU outputs

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` or pass it through, as `mode` says."""
        if self.mode == "quantize":
            return self.quantize(x)
        if self.mode == "observe":
            self.observe(x)
            return self.quantize(x)
        if self.mode == "collect":
            assert self.histogram is not None
            self.histogram.update(x)
        return x

    def quantize(self, x: Tensor) -> Tensor:
        """Round ``x`` to the grid."""
        raise NotImplementedError

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range by one batch: ``low <- m low + (1 - m) min(x)``, likewise high.

        The range starts at 0 without bias correction, as in the authors' code.
        """
        low, high = extremes(*torch.aminmax(x.detach()))
        self.low.mul_(self.momentum).add_(low, alpha=1 - self.momentum)
        self.high.mul_(self.momentum).add_(high, alpha=1 - self.momentum)
        self.range_changed()

    @torch.no_grad()
    def calibrate(self, histogram: Histogram) -> None:
        """Set the range from the counted values."""
        low, high = histogram.find_range(self.grid, self.rule)
        self.low.fill_(low)
        self.high.fill_(high)
        self.range_changed()

    def range_changed(self) -> None:
        """Recompute everything that depends on `low` and `high`."""

    def get_extra_state(self) -> Tensor:
        """Return the mode as a tensor, like the rest of the state."""
        return torch.tensor(_MODES.index(self.mode), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the stored mode."""
        self.mode = _MODES[int(state)]

    def extra_repr(self) -> str:
        """Describe bits, kind of grid and mode."""
        return f"{self.grid.bits} bits, {self.grid.kind}, mode={self.mode}"


class LearnedActivationQuantizer(ActivationQuantizer):
    """Activation quantizer of the deploy grid.

    The grid is unsigned if the tensor is never negative, otherwise it has an integer zero point.

    Attributes:
        scale: float32 scalar, trainable.
        zero_point: float32 scalar, trainable if configured so; the op rounds it.
        gradient_factor: Factor of the scale's gradients.
    """

    zero_point: Tensor

    def __init__(
        self,
        bits: int,
        signed: bool,
        rule: RangeRule,
        *,
        values_per_image: int = 1,
        momentum: float = 0.9,
        learn_zero_point: bool = False,
        scale_gradient: Literal["lsq", "none"] = "lsq",
    ) -> None:
        super().__init__(Grid("asymmetric" if signed else "unsigned", bits), rule, momentum)
        self.quant_min, self.quant_max = self.grid.quant_min, self.grid.quant_max
        self.gradient_factor = _gradient_factor(scale_gradient, values_per_image, self.quant_max)
        self.scale = nn.Parameter(torch.ones(()))
        if signed and learn_zero_point:
            self.zero_point = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("zero_point", torch.zeros(()))

    def quantize(self, x: Tensor) -> Tensor:
        """Round ``x`` to the grid; gradients reach scale and zero point."""
        scale = _scale_gradient(self.scale, self.gradient_factor)
        return fake_quantize(x, scale, self.zero_point, self.quant_min, self.quant_max)

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """Return ``q - zero_point``, exact in float32, for values ``x`` on the grid."""
        return (x * (1 / self.scale)).round_()

    def largest_integer(self) -> int:
        """Return the largest magnitude of `integers`."""
        zero_point = int(self.zero_point.round())
        return max(zero_point - self.quant_min, self.quant_max - zero_point)

    @torch.no_grad()
    def range_changed(self) -> None:
        """Set scale and zero point from the range."""
        scale, zero_point = self.grid.parameters(self.low, self.high)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)


class PaperActivationQuantizer(ActivationQuantizer):
    """Activation quantizer of the paper grid: identity gradient, nothing trainable."""

    def __init__(self, bits: int, rule: RangeRule, momentum: float = 0.9) -> None:
        super().__init__(Grid("paper", bits), rule, momentum)

    def quantize(self, x: Tensor) -> Tensor:
        """Round ``x`` to the grid; the gradient passes unchanged."""
        return straight_through(x, paper_quantize(x.detach(), self.low, self.high, self.grid.bits))


def build_weight_quantizer(
    weight: Tensor, bits: int, config: QuantizationConfig
) -> WeightQuantizer:
    """Build the quantizer of ``config`` and set its ranges from ``weight [C, *]``."""
    quantizer: WeightQuantizer
    if config.grid == "paper":
        quantizer = PaperWeightQuantizer(weight, bits, config.weight_rule)
    else:
        quantizer = LearnedWeightQuantizer(weight, bits, config.weight_rule, config.scale_gradient)
    quantizer.calibrate(weight)
    return quantizer


def build_activation_quantizer(
    bits: int, signed: bool, values_per_image: int, config: QuantizationConfig
) -> ActivationQuantizer:
    """Build the quantizer of ``config`` in mode "float", without a range."""
    if config.grid == "paper":
        return PaperActivationQuantizer(bits, config.activation_rule, config.momentum)
    return LearnedActivationQuantizer(
        bits,
        signed,
        config.activation_rule,
        values_per_image=values_per_image,
        momentum=config.momentum,
        learn_zero_point=config.learn_zero_points,
        scale_gradient=config.scale_gradient,
    )


def _gradient_factor(rule: Literal["lsq", "none"], values: int, quant_max: int) -> float:
    return 1 / math.sqrt(values * quant_max) if rule == "lsq" else 1.0


def _scale_gradient(scale: Tensor, factor: float) -> Tensor:
    if factor == 1.0 or not torch.is_grad_enabled():
        return scale
    result: Tensor = _ScaleGradient.apply(scale, factor)
    return result


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None  # type: ignore[attr-defined]
