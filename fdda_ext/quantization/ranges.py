"""Range rules, the search for ranges, and the histogram that it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UsageError
from .grid import MIN_SCALE, Grid

__all__ = ["Histogram", "RangeRule", "find_range"]

# The search tries these fractions of the full range, then these multiples of the best one.
_COARSE = torch.linspace(0.05, 1.0, 39)[:, None]
_FINE = torch.tensor((0.95, 0.9625, 0.975, 0.9875, 1.0125, 1.025, 1.0375, 1.05))[:, None]
#: Values that one call quantizes; sets how many candidate ranges are tried at once.
_AT_ONCE = 1 << 17
#: Values that a histogram counts in one call on a CPU.
_COUNTED_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class RangeRule:
    """A range rule with its parameters.

    Attributes:
        name: "minmax", the extremes; "lp", least error to the power `exponent`; "lsq", from the
            mean magnitude (LSQ: Esser et al., ICLR 2020, section 2.1); "percentile"; "lloyd", least
            squared error by Lloyd's iterations from the largest value, for grids that begin at 0.
        exponent: Exponent of "lp": 2 gives the mean squared error, 2.4 is LAPQ's and BRECQ's.
        percentile: For "percentile", percentage of the values below the upper end and above the
            lower end.
    """

    name: Literal["minmax", "lp", "lsq", "percentile", "lloyd"]
    exponent: float = 2.0
    percentile: float = 99.9


def find_range(
    values: Tensor,
    counts: Tensor | None,
    low: Tensor,
    high: Tensor,
    grid: Grid,
    rule: RangeRule,
) -> tuple[Tensor, Tensor]:
    """Return the ends of the range of each row.

    Args:
        values: Values, float32 ``[C, n]``; each row gets its own range.
        counts: How often each value occurs, ``[C, n]``; None for once.
        low: Smallest values ``[C]``. They may be slightly beyond ``values`` if those are the
            centres of bins.
        high: Largest values ``[C]``, likewise.
        grid: Grid of the range.
        rule: Range rule.

    Returns:
        Lower and upper ends, ``[C]`` each. Only "lsq" and "lloyd" may go beyond ``low`` and
        ``high``.
    """
    if rule.name == "lp":
        return _least_error(values, counts, low, high, grid, rule.exponent)
    if rule.name == "lsq":
        return _from_mean_magnitude(values, counts, low, high, grid)
    if rule.name == "percentile":
        return _percentiles(values, counts, low, high, rule.percentile / 100)
    if rule.name == "lloyd":
        return torch.zeros_like(high), _lloyd(values, counts, high, grid)
    return low, high


def _least_error(
    values: Tensor,
    counts: Tensor | None,
    low: Tensor,
    high: Tensor,
    grid: Grid,
    exponent: float,
) -> tuple[Tensor, Tensor]:
    """Search the range with the least error.

    Both ends shrink together, then each by itself if the grid allows it.
    """
    best = torch.full_like(low, math.inf)
    best_low, best_high = low, high
    at_once = max(1, _AT_ONCE // max(1, values.numel()))

    def attempt(lows: Tensor, highs: Tensor) -> None:
        """Try candidates ``[K, C]``; the first of equal ones wins."""
        nonlocal best, best_low, best_high
        k = len(lows)
        x = values.expand(k, *values.shape).flatten(0, 1)
        error = (grid.quantize(x, lows.flatten(), highs.flatten()) - x).abs_()
        error = error.square_() if exponent == 2 else error.pow_(exponent)
        error = error.view(k, *values.shape)
        total = error.sum(2) if counts is None else (error.double() * counts).sum(2).to(best)
        if k > 1:
            first = total.argmin(0, keepdim=True)
            total, lows, highs = (t.gather(0, first) for t in (total, lows, highs))
        better = total[0] < best
        best = torch.where(better, total[0], best)
        best_low = torch.where(better, lows[0], best_low)
        best_high = torch.where(better, highs[0], best_high)

    def search(lows: Tensor, highs: Tensor) -> None:
        lows, highs = torch.broadcast_tensors(lows, highs)
        for pair in zip(lows.split(at_once), highs.split(at_once), strict=True):
            attempt(*pair)

    coarse, fine = _COARSE.to(low), _FINE.to(low)
    search(low * coarse, high * coarse)
    search(torch.maximum(best_low * fine, low), torch.minimum(best_high * fine, high))
    if grid.kind in ("asymmetric", "paper"):
        search(best_low, high * coarse)
        search(low * coarse, best_high)
    return best_low, best_high


def _from_mean_magnitude(
    values: Tensor, counts: Tensor | None, low: Tensor, high: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Range for ``scale = 2 E|x| / sqrt(quant_max)``.

    A signed grid uses the quant_max of a symmetric one. Both ends move by the same factor. With
    many bits, the range goes beyond the values.
    """
    if counts is None:
        magnitude = values.abs().mean(1)
    else:
        magnitude = ((values.abs() * counts).sum(1) / counts.sum(1)).to(low)
    codes = 2**grid.bits - 1
    quant_max = codes if grid.kind == "unsigned" else 2 ** (grid.bits - 1) - 1
    full = (high - low) / codes if grid.kind == "paper" else grid.parameters(low, high)[0]
    share = 2 * magnitude / math.sqrt(quant_max) / full.clamp_min(MIN_SCALE)
    return low * share, high * share


def _lloyd(values: Tensor, counts: Tensor | None, high: Tensor, grid: Grid) -> Tensor:
    """Upper end of a range that begins at 0 (Bit-Split: Wang et al., ICML 2020).

    Alternate ``q = clip(round(x / s))`` and ``s = <x, q> / <q, q>`` until an s repeats.
    """
    codes = grid.quant_max - grid.quant_min
    x = values.double()
    weight = torch.ones_like(x) if counts is None else counts.double()
    scale = high.double() / codes
    seen: set[tuple[float, ...]] = set()
    while tuple(scale.tolist()) not in seen:
        seen.add(tuple(scale.tolist()))
        q = (x / scale[:, None]).round_().clamp_(0, codes)
        best = (weight * x * q).sum(1) / (weight * q * q).sum(1)
        scale = torch.where(best > 0, best, scale)
    return (scale * codes).to(high)


def _percentiles(
    values: Tensor, counts: Tensor | None, low: Tensor, high: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Ends with the fraction ``share`` of each row above the lower and below the upper one."""
    ordered, order = values.sort(1)
    weight = torch.ones_like(ordered, dtype=torch.float64)
    if counts is not None:
        weight = counts.gather(1, order).double()
    cumulative = weight.cumsum(1)
    total = cumulative[:, -1:]
    last = values.shape[1] - 1

    def at(part: float) -> Tensor:
        index = torch.searchsorted(cumulative, part * total).clamp_max(last)
        return ordered.gather(1, index).squeeze(1)

    return torch.maximum(at(1 - share), low), torch.minimum(at(share), high)


class Histogram:
    """Histogram of a tensor's values over any number of batches, in constant memory.

    The bins cover ``[-reach, reach)``. ``reach`` is a power of two that doubles if a value does not
    fit, and then pairs of bins merge. So the counts depend neither on the order nor on the batches
    of the values.
    """

    bins = 2**14

    def __init__(self) -> None:
        self.reach = 0.0
        self.counts = torch.empty(0)
        self.low = math.inf
        self.high = -math.inf

    def update(self, x: Tensor) -> None:
        """Count the values of ``x``, any shape.

        Raises:
            UsageError: If a value is not finite.
        """
        x = x.detach()
        in_memory_order = sorted(range(x.dim()), key=x.stride, reverse=True)
        x = x.permute(in_memory_order).flatten().float()
        low, high = (float(end) for end in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            raise UsageError("calibrate: expected every activation to be finite, got nan or inf")
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high, 1e-30)
        if self.reach == 0:
            self.counts = torch.zeros(self.bins, dtype=torch.int64, device=x.device)
            self.reach = _power_of_two_above(largest)
        while self.reach <= largest:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            quarter = self.bins // 4
            self.counts[quarter : 3 * quarter] = merged
            self.reach *= 2
        # On a CPU, the intermediate results of one part fit in the cache.
        for part in x.split(_COUNTED_AT_ONCE if x.is_cpu else max(x.numel(), 1)):
            # Exact, because the bin width is a power of two and float32 can represent every index.
            index = (part * (self.bins / 2 / self.reach)).floor_().add_(self.bins // 2)
            self.counts += torch.bincount(index.int(), minlength=self.bins)

    def values_and_counts(self) -> tuple[Tensor, Tensor]:
        """Return centres and counts of all non-empty bins, float32 and int64 ``[n]``."""
        filled = self.counts.nonzero().squeeze(1)
        centres = (filled.double() + 0.5 - self.bins / 2) * (self.reach / (self.bins / 2))
        return centres.float(), self.counts[filled]

    def find_range(self, grid: Grid, rule: RangeRule) -> tuple[float, float]:
        """Return the lower and upper end of the range for the counted values."""
        if rule.name == "minmax":
            return self.low, self.high
        values, counts = self.values_and_counts()
        low, high = values.new_tensor([self.low]), values.new_tensor([self.high])
        found = find_range(values[None], counts[None], low, high, grid, rule)
        return float(found[0]), float(found[1])


def _power_of_two_above(value: float) -> float:
    return 2.0 ** math.frexp(value)[1]
