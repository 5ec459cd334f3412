"""Configuration of a student: bits, grid and ranges."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UsageError
from .ranges import RangeRule

__all__ = ["QuantizationConfig", "RangeName", "parse_bits"]

RangeName = Literal["minmax", "mse", "lp", "lsq", "percentile"]

_BITS = range(2, 9)


@dataclass(frozen=True)
class QuantizationConfig:
    """Bits, grid and ranges of a student.

    Attributes:
        weight_bits: Bits of the weights of every convolution and linear layer, 2 to 8.
        activation_bits: Bits of every activation, 2 to 8.
        first_last_bits: Bits of the weights of the first and the last layer, of the first layer's
            activation, and of the last activation, which enters global pooling. FDDA's "F8L8"
            means 8. None for the same bits everywhere.
        layer_bits: Bits of the weights of single layers, by qualified name. They override
            `weight_bits` and `first_last_bits`.
        grid: "deploy" puts every tensor that enters a convolution, a linear layer or an average
            pooling on an integer grid. "paper" follows the authors' code: weights (asymmetric) and
            ReLU outputs are quantized, everything else stays in float.
        image_bits: Bits of the network's input (deploy grid only).
        pooled_bits: Bits of globally pooled features (deploy grid only). A mean of many codes has
            far more levels than a code, so few bits would lose its precision. Eight bits cost
            nothing on a tensor with a single position.
        weight_range: Range rule of the weights: "minmax"; "mse", least squared error; "lp", least
            error to the power `lp_exponent`; "lsq", from the mean magnitude; "percentile".
        activation_range: Range rule of the activations on the calibration images, likewise.
        percentile: Percentage of the values below the upper end of a range and above its lower end.
        lp_exponent: Exponent of "lp".
        momentum: Share of the old range that an update of a moving range keeps.
        learn_zero_points: Whether the zero points of signed activations are trainable (LSQ+).
        scale_gradient: "lsq" multiplies the gradients of scales by ``1 / sqrt(n * quant_max)`` for
            n values per scale and image (LSQ, section 2.2). "none" leaves them unchanged.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    first_last_bits: int | None = None
    layer_bits: dict[str, int] = field(default_factory=dict)
    grid: Literal["deploy", "paper"] = "deploy"
    image_bits: int = 8
    pooled_bits: int = 8
    weight_range: RangeName = "mse"
    activation_range: RangeName = "mse"
    percentile: float = 99.9
    lp_exponent: float = 2.4
    momentum: float = 0.9
    learn_zero_points: bool = False
    scale_gradient: Literal["lsq", "none"] = "lsq"

    def __post_init__(self) -> None:
        for name in (
            "weight_bits",
            "activation_bits",
            "first_last_bits",
            "image_bits",
            "pooled_bits",
        ):
            bits = getattr(self, name)
            if bits not in _BITS and not (name == "first_last_bits" and bits is None):
                raise UsageError(f"quantization: expected {name} between 2 and 8, got {bits}")
        for name, bits in self.layer_bits.items():
            if bits not in _BITS:
                raise UsageError(
                    f"quantization: expected layer_bits between 2 and 8, got {bits} for {name}"
                )
        ranges = ("minmax", "mse", "lp", "lsq", "percentile")
        for name, allowed in (
            ("grid", ("deploy", "paper")),
            ("weight_range", ranges),
            ("activation_range", ranges),
            ("scale_gradient", ("lsq", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"quantization: expected {name} to be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)}"
                )
        if not 50 < self.percentile <= 100:
            raise UsageError(
                f"quantization: expected percentile above 50 and at most 100, got {self.percentile}"
            )
        if not self.lp_exponent > 0:
            raise UsageError(f"quantization: expected lp_exponent above 0, got {self.lp_exponent}")
        if not 0 <= self.momentum < 1:
            raise UsageError(
                f"quantization: expected momentum at least 0 and below 1, got {self.momentum}"
            )

    @property
    def weight_rule(self) -> RangeRule:
        """Range rule of the weights."""
        return self._rule(self.weight_range)

    @property
    def activation_rule(self) -> RangeRule:
        """Range rule of the activations."""
        return self._rule(self.activation_range)

    def _rule(self, name: RangeName) -> RangeRule:
        if name == "mse":
            return RangeRule("lp", exponent=2.0)
        return RangeRule(name, exponent=self.lp_exponent, percentile=self.percentile)


def parse_bits(text: str) -> tuple[int, int]:
    """Return the bits of weights and activations from the usual short form.

    >>> parse_bits("W4A4")
    (4, 4)

    Raises:
        UsageError: If ``text`` does not have the form W4A4 with bits from 2 to 8.
    """
    match = re.fullmatch(r"[wW]([2-8])[aA]([2-8])", text)
    if match is None:
        raise UsageError(f"bits: expected bits of the form W4A4, each between 2 and 8, got {text}")
    return int(match[1]), int(match[2])
