"""Learned rounding of weights: AdaRound (Nagel et al., ICML 2020).

During learning, a weight w on a grid of scale s becomes (eq. 22 and 23)::

    s * clamp( floor(w / s) + h(alpha), quant_min, quant_max )
    h(alpha) = clip( sigmoid(alpha) (zeta - gamma) + gamma, 0, 1 ),    zeta = 1.1, gamma = -0.1

At first, alpha makes h the remainder of w / s, so a weight within the range starts as w. A
regulariser drives every h to 0 or 1 (eq. 24)::

    R = sum 1 - |2 h - 1|^beta

If means m of the layer's inputs are given, its bias b becomes::

    b - sum_i (w'_i - w_i) m_i

for the weights w'_i instead of w_i. So rounding does not change the mean of the output (bias
correction, Nagel et al., ICCV 2019, section 4.2), and errors of one sign need not cancel out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from ..errors import UsageError
from ..quantization import QuantizationConfig
from ..quantization.layers import QuantizedConv2d, QuantizedLinear

__all__ = ["RoundingConfig", "SoftlyRounded", "check_ranges_stay", "share_decided", "soften_"]

_ZETA, _GAMMA = 1.1, -0.1


@dataclass(frozen=True)
class RoundingConfig:
    """Settings of learned rounding, with the defaults of AdaRound and BRECQ.

    Attributes:
        lr: Learning rate of Adam for alpha.
        weight: Weight of R, lambda.
        warmup: Share of the steps before R is used.
        first_beta: Value of beta when R begins; it falls linearly.
        last_beta: Value of beta at the end.
    """

    lr: float = 1e-3
    weight: float = 0.01
    warmup: float = 0.2
    first_beta: float = 20.0
    last_beta: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise UsageError(f"rounding: expected lr above 0 and finite, got {self.lr}")
        if not 0 <= self.weight < math.inf:
            raise UsageError(f"rounding: expected weight at least 0 and finite, got {self.weight}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"rounding: expected warmup at least 0 and below 1, got {self.warmup}")
        if not 1 < self.last_beta <= self.first_beta < math.inf:
            raise UsageError(
                "rounding: expected last_beta above 1 and at most first_beta "
                f"({self.first_beta}), got {self.last_beta}"
            )

    def beta(self, progress: float) -> float | None:
        """Return beta after this share of the steps; None before R begins."""
        if progress < self.warmup:
            return None
        left = (1 - progress) / (1 - self.warmup)
        return self.last_beta + (self.first_beta - self.last_beta) * left


class SoftlyRounded(nn.Module):
    """Replacement of a student's layer while its rounding is learned; the layer stays unchanged.

    Args:
        layer: Layer whose weight has its final range.
        means: Mean input of every weight, in the shape of the weight, see `mean_inputs`. None
            leaves the bias unchanged. Not used for a layer with neither bias nor normalisation.

    Attributes:
        alpha: Trainable, in the shape of the weight.
    """

    means: Tensor | None

    def __init__(
        self, layer: QuantizedConv2d | QuantizedLinear, means: Tensor | None = None
    ) -> None:
        super().__init__()
        if layer.bias is None and layer.norm is None:
            means = None
        self.register_buffer("means", means, persistent=False)
        original = None if means is None else layer.weight.detach().clone()
        self.register_buffer("original", original, persistent=False)
        self.__dict__["layer"] = layer  # not a submodule: it keeps its own parameters
        position = layer.weight_quantizer.position(layer.weight.detach())
        self.register_buffer("floor", position.floor(), persistent=False)
        remainder = position - self.get_buffer("floor")
        self.alpha = nn.Parameter(-torch.log((_ZETA - _GAMMA) / (remainder - _GAMMA) - 1))

    def share_up(self) -> Tensor:
        """Return h, between 0 and 1."""
        return torch.clamp(torch.sigmoid(self.alpha) * (_ZETA - _GAMMA) + _GAMMA, 0, 1)

    def regulariser(self, beta: float) -> Tensor:
        """Return R."""
        return (1 - (2 * self.share_up() - 1).abs().pow(beta)).sum()

    def weight(self, share_up: Tensor) -> Tensor:
        """Return the weight with ``share_up`` of a step added to the floor."""
        quantizer = self.layer.weight_quantizer
        codes = self.get_buffer("floor") + share_up
        return quantizer.values(codes.clamp(quantizer.grid.quant_min, quantizer.grid.quant_max))

    def bias_change(self, weight: Tensor) -> Tensor | None:
        """Return how ``weight`` changes the bias, ``[C]``; None without means."""
        if self.means is None:
            return None
        return ((self.get_buffer("original") - weight) * self.means).flatten(1).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer with soft weights."""
        layer, weight = self.layer, self.weight(self.share_up())
        bias, change = layer.bias, self.bias_change(weight)
        if change is not None:
            bias = change if bias is None else bias + change
        if isinstance(layer, QuantizedConv2d):
            result = layer._conv_forward(x, weight, bias)
        else:
            result = F.linear(x, weight, bias)
        # The normalisation that follows an exact layer leaves its work to the layer.
        if layer.norm is None or not layer.is_exact():
            return result
        along = (-1,) + (1,) * (x.dim() - 2) if isinstance(layer, QuantizedConv2d) else (-1,)
        scale, shift = (part.to(result).view(along) for part in layer.norm.affine_map())
        return result * scale + shift

    @torch.no_grad()
    def bake(self) -> None:
        """Decide all roundings, and write the result to the layer's weight. It is on the grid.

        With means, call it once: it also changes the bias, or the mean of the normalisation.
        """
        layer, weight = self.layer, self.weight((self.alpha >= 0).to(self.alpha))
        layer.weight.copy_(weight)
        change = self.bias_change(weight)
        if change is None:
            return
        if layer.bias is not None:
            layer.bias.add_(change)
        else:
            assert layer.norm is not None
            assert layer.norm.running_mean is not None
            layer.norm.running_mean.sub_(change)

    @property
    def layer(self) -> QuantizedConv2d | QuantizedLinear:
        """The replaced layer."""
        return cast("QuantizedConv2d | QuantizedLinear", self.__dict__["layer"])


def check_ranges_stay(quantization: QuantizationConfig, who: str) -> None:
    """Refuse weight ranges that move with the weights, on behalf of ``who``.

    Raises:
        UsageError: If `quantization` has such ranges.
    """
    if quantization.grid == "paper" and quantization.weight_range == "minmax":
        raise UsageError(
            f"{who}: expected a weight_range other than minmax with grid paper, where it moves "
            "with the weights, got minmax; try lp"
        )


def soften_(
    function: GraphModule, layers: Iterable[str], means: Mapping[str, Tensor] | None = None
) -> list[SoftlyRounded]:
    """Replace ``layers``, given by name, by softly rounded ones; return these.

    Args:
        function: Function that shares the student's modules, see `region`. The student itself keeps
            its layers.
        layers: Convolutions and linear layers of the function.
        means: Mean inputs of layers, by name; None to leave all biases unchanged.
    """
    soft = []
    for name in layers:
        layer = function.get_submodule(name)
        assert isinstance(layer, (QuantizedConv2d, QuantizedLinear))
        soft.append(SoftlyRounded(layer, (means or {}).get(name)))
        function.set_submodule(name, soft[-1])
    return soft


@torch.no_grad()
def share_decided(layers: list[SoftlyRounded]) -> Tensor:
    """Return the share of all weights whose h is within 0.01 of 0 or 1."""
    h = torch.cat([layer.share_up().flatten() for layer in layers])
    return ((h < 0.01) | (h > 0.99)).float().mean()
