"""Grids: the only module that derives scales and zero points from ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops import fake_quantize

__all__ = [
    "MIN_SCALE",
    "Grid",
    "along_channels",
    "paper_quantize",
    "paper_steps",
    "straight_through",
]

#: Smallest scale. Random initial weights give larger ones, and its inverse does not overflow.
MIN_SCALE = 1e-20

Kind = Literal["symmetric", "unsigned", "asymmetric", "paper"]


@dataclass(frozen=True)
class Grid:
    """A set of ``2 ** bits`` equally spaced values.

    ========== ======================== ====================== =============================
    kind       codes                    zero point             used for
    ========== ======================== ====================== =============================
    symmetric  -2^(b-1) .. 2^(b-1) - 1  0                      weights
    unsigned   0 .. 2^b - 1             0                      activations that are never < 0
    asymmetric 0 .. 2^b - 1             one of the codes       other activations, the image
    paper      -2^(b-1) .. 2^(b-1) - 1  any integer            everything in the paper grid
    ========== ======================== ====================== =============================

    Except in "paper", 0 is always one of the values, so zero padding stays on the grid.
    """

    kind: Kind
    bits: int

    @property
    def quant_min(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) if self.kind in ("symmetric", "paper") else 0

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return self.quant_min + 2**self.bits - 1

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the tightest grid of this kind that covers low to high.

        Args:
            low: Lower ends, any shape.
            high: Upper ends, the same shape.

        Returns:
            Scale and zero point (an integer in float32), each of that shape.
        """
        if self.kind == "paper":
            raise ValueError("the paper grid has no such parameters; use paper_quantize")
        if self.kind == "asymmetric":
            low, high = low.clamp_max(0), high.clamp_min(0)
            scale = ((high - low) / (self.quant_max - self.quant_min)).clamp_min(MIN_SCALE)
            zero_point = (self.quant_min - low / scale).round()
            return scale, zero_point.clamp(self.quant_min, self.quant_max)
        scale = high / self.quant_max
        if self.kind == "symmetric":
            # The lowest code is one step further from 0 than the highest.
            scale = torch.maximum(scale, low / self.quant_min)
        return scale.clamp_min(MIN_SCALE), torch.zeros_like(scale)

    def quantize(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Round ``x [C, n]`` to the grids of the ranges from ``low`` to ``high``, ``[C]`` each."""
        if self.kind == "paper":
            return paper_quantize(x, low[:, None], high[:, None], self.bits)
        scale, zero_point = self.parameters(low, high)
        return fake_quantize(x, scale, zero_point, self.quant_min, self.quant_max, 0)


def paper_quantize(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Round ``x`` to the grid of the authors' code.

    With b bits::

        s = (2^b - 1) / (high - low)                    steps per unit
        z = round(s * low) + 2^(b-1)
        q = clamp(round(s * x - z), -2^(b-1), 2^(b-1) - 1)
        y = (q + z) / s

    Unlike ``ops.fake_quantize``, it rounds after the subtraction of z, and 0 need not be one of the
    values.

    Args:
        x: Tensor of any shape.
        low: Lower ends, in a shape that broadcasts with ``x``.
        high: Upper ends, in the same shape.
        bits: Bits of the codes, b.
    """
    half = 2 ** (bits - 1)
    s, z = paper_steps(low, high, bits)
    return (x * s).sub_(z).round_().clamp_(-half, half - 1).add_(z).div_(s)


def paper_steps(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the s and z of `paper_quantize`."""
    s = (2**bits - 1) / (high - low).clamp_min(1e-8)
    return s, (s * low).round_().add_(2 ** (bits - 1))


def along_channels(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x [C]`` in a shape that broadcasts with ``like [C, *]``."""
    return x.view((-1,) + (1,) * (like.dim() - 1))


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """Return the value of ``quantized`` with the gradient of ``x``."""
    result: Tensor = _StraightThrough.apply(x, quantized)
    return result


class _StraightThrough(torch.autograd.Function):
    # x + (quantized - x).detach() would not be bit-identical to quantized.

    @staticmethod
    def forward(ctx: object, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
