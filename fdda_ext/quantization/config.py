"""How many bits every tensor gets, on which grid, and how its range is found."""

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
        weight_bits: Of every convolution and linear layer, 2 to 8.
        activation_bits: Of every activation, 2 to 8.
        first_last_bits: None for the same bits everywhere. A number, 8 in FDDA's "F8L8", is used
            instead for the weights of the first and the last layer, for the activation that the
            first layer makes, and for the last activation, the one that enters global pooling.
        layer_bits: Of the weights of single layers, by qualified name; they override the two above.
        grid: "deploy": every tensor that enters a convolution, a linear layer or an average
            pooling lies on an integer grid. "paper": as the authors' code, asymmetric weights and
            ReLU outputs on a grid and everything else in float.
        image_bits: Of the network's input, deploy grid only.
        pooled_bits: Of globally pooled features, deploy grid only. Their mean of many codes has
            far more levels than the codes, so the few activation bits would lose what pooling won;
            eight bits cost nothing on a tensor of one position.
        weight_range: How weight ranges are found: "minmax"; "mse", least squared error; "lp", least
            error to the power `lp_exponent`; "lsq", from the mean magnitude; "percentile".
        activation_range: Likewise for activations, over the calibration images.
        percentile: Per cent of the values between the range's ends, counted from each side.
        lp_exponent: Exponent of "lp".
        momentum: Of the moving ranges, the share that the old range keeps in an update.
        learn_zero_points: Make the zero points of signed activations trainable (LSQ+).
        scale_gradient: "lsq" multiplies gradients of scales by ``1 / sqrt(n * quant_max)`` with n
            values per scale and image (LSQ, section 2.2); "none" leaves them.
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
        """How weight ranges are found."""
        return self._rule(self.weight_range)

    @property
    def activation_rule(self) -> RangeRule:
        """How activation ranges are found."""
        return self._rule(self.activation_range)

    def _rule(self, name: RangeName) -> RangeRule:
        if name == "mse":
            return RangeRule("lp", exponent=2.0)
        return RangeRule(name, exponent=self.lp_exponent, percentile=self.percentile)


def parse_bits(text: str) -> tuple[int, int]:
    """Bits of weights and activations from the usual short form.

    >>> parse_bits("W4A4")
    (4, 4)

    Raises:
        UsageError: If ``text`` is not of the form W4A4 with bits from 2 to 8.
    """
    match = re.fullmatch(r"[wW]([2-8])[aA]([2-8])", text)
    if match is None:
        raise UsageError(f"bits: expected bits of the form W4A4, each between 2 and 8, got {text}")
    return int(match[1]), int(match[2])
