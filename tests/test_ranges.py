"""Grids, range rules, their search, and the histogram of activations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fdda_ext.errors import UsageError
from fdda_ext.quantization import ranges
from fdda_ext.quantization.grid import Grid, paper_quantize
from fdda_ext.quantization.ranges import Histogram, RangeRule, find_range

KINDS = ("symmetric", "unsigned", "asymmetric", "paper")


def rows(kind: str = "symmetric", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5, 400, generator=generator) * torch.tensor([[0.01], [0.1], [1], [3], [9]])
    values += 0.3 * values.abs() * torch.rand(5, 1, generator=generator)
    return values.relu() if kind == "unsigned" else values


def error(values, low, high, grid, exponent=2.0):
    return (grid.quantize(values, low, high) - values).abs().pow(exponent).sum(1)


# ---- grids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_grid_of_the_full_range_clips_nothing(kind, bits):
    values, grid = rows(kind), Grid(kind, bits)
    low, high = values.aminmax(dim=1)
    quantized = grid.quantize(values, low, high)
    step = (high - low) / (2**bits - 1)
    if kind == "symmetric":
        step = torch.maximum(high / (2 ** (bits - 1) - 1), -low / 2 ** (bits - 1))
    if kind == "unsigned":
        step = high / (2**bits - 1)
    # Rounding changes values by half a step. The rounded zero point may shift the ends by another
    # half step.
    slack = 1.0 if kind in ("asymmetric", "paper") else 0.5
    assert ((quantized - values).abs() <= step[:, None] * slack * (1 + 1e-4)).all()
    for row in quantized:
        assert row.unique().numel() <= 2**bits


def test_symmetric_grid_uses_its_extra_negative_code():
    grid = Grid("symmetric", 4)
    scale, zero_point = grid.parameters(torch.tensor([-8.0, -4.0]), torch.tensor([7.0, 7.0]))
    assert scale.tolist() == [1.0, 1.0]
    assert zero_point.tolist() == [0.0, 0.0]
    assert grid.parameters(torch.tensor([-16.0]), torch.tensor([7.0]))[0].item() == 2.0


@given(low=st.floats(-10, 10), width=st.floats(0.01, 20), bits=st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_asymmetric_grid_contains_zero_and_has_an_integer_zero_point(low, width, bits):
    grid = Grid("asymmetric", bits)
    scale, zero_point = grid.parameters(torch.tensor([low]), torch.tensor([low + width]))
    assert zero_point.item() == int(zero_point.item())
    assert 0 <= zero_point.item() <= 2**bits - 1
    zero = torch.zeros(1, 1)
    assert grid.quantize(zero, torch.tensor([low]), torch.tensor([low + width])).item() == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_paper_grid_equals_its_formula(bits):
    """Compare with the formula of FDDA's published code, which rounds after the shift."""
    x = torch.randn(1000) * 2 + 0.3
    low, high = x.min(), x.max()
    s = (2**bits - 1) / max(float(high - low), 1e-8)
    s = torch.tensor(s, dtype=torch.float32)
    z = torch.round(s * low) + 2 ** (bits - 1)
    q = torch.clamp(torch.round(s * x - z), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    torch.testing.assert_close(paper_quantize(x, low, high, bits), (q + z) / s)


def test_paper_grid_rounds_ties_after_the_shift():
    # With s = 1, z = round(low) + 8 is 0 for the first range and 1 for the second. The tie 0.5 is
    # rounded to an even code, not to an even value.
    x = torch.tensor([0.5])
    even = paper_quantize(x, torch.tensor(-8.0), torch.tensor(7.0), 4)
    odd = paper_quantize(x, torch.tensor(-7.0), torch.tensor(8.0), 4)
    assert even.item() == 0.0
    assert odd.item() == 1.0


# ---- rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("exponent", [2.0, 2.4])
def test_search_is_at_least_as_good_as_every_share_of_the_full_range(kind, bits, exponent):
    values, grid = rows(kind), Grid(kind, bits)
    low, high = values.aminmax(dim=1)
    found = find_range(values, None, low, high, grid, RangeRule("lp", exponent=exponent))
    best = error(values, *found, grid, exponent)
    for share in torch.linspace(0.05, 1.0, 39):
        assert (best <= error(values, low * share, high * share, grid, exponent) * 1.0001).all()
    assert (found[0] >= low).all()
    assert (found[1] <= high).all()
    if bits <= 4:
        assert (best < 0.95 * error(values, low, high, grid, exponent)).any()


def test_search_finds_the_known_optimum_of_a_gaussian():
    """Expect the step 0.3352 for 16 uniform levels and a unit Gaussian (Max, 1960)."""
    values = torch.randn(4, 60_000, generator=torch.Generator().manual_seed(0))
    low, high = values.aminmax(dim=1)
    grid = Grid("asymmetric", 4)
    scale, _ = grid.parameters(*find_range(values, None, low, high, grid, RangeRule("lp")))
    assert ((scale - 0.3352).abs() < 0.02).all()


def test_rows_do_not_influence_each_other():
    values, grid = rows(), Grid("symmetric", 4)
    low, high = values.aminmax(dim=1)
    for name in ("minmax", "lp", "lsq", "percentile"):
        whole = find_range(values, None, low, high, grid, RangeRule(name))
        for i in range(5):
            part = slice(i, i + 1)
            alone = find_range(values[part], None, low[part], high[part], grid, RangeRule(name))
            torch.testing.assert_close(whole[0][part], alone[0])
            torch.testing.assert_close(whole[1][part], alone[1])


def test_the_number_of_candidates_at_once_does_not_change_the_range(monkeypatch):
    torch.manual_seed(0)
    values = torch.randn(5, 300)
    grid, rule = Grid(bits=3, kind="asymmetric"), RangeRule("lp", 2.4)
    found = []
    for at_once in (1, 4000, 1 << 20):
        monkeypatch.setattr(ranges, "_AT_ONCE", at_once)
        found.append(find_range(values, None, values.amin(1), values.amax(1), grid, rule))
    assert all(torch.equal(a, b) for ends in found[1:] for a, b in zip(found[0], ends, strict=True))
    nothing = find_range(values[:, :0], None, -torch.ones(5), torch.ones(5), grid, rule)
    assert all(torch.isfinite(end).all() for end in nothing)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["lp", "lsq", "percentile", "minmax"])
@pytest.mark.parametrize("counted", [False, True])
def test_ranges_are_found_on_the_device_of_the_values(kind, rule, counted):
    """Use the meta device, on which a tensor from the CPU would cause an error."""
    values = torch.empty(5, 400, device="meta")
    counts = torch.empty(5, 400, dtype=torch.int64, device="meta") if counted else None
    low, high = values.aminmax(dim=1)
    for end in find_range(values, counts, low, high, Grid(kind, 4), RangeRule(rule)):
        assert end.device == values.device


def test_lsq_scale_is_twice_the_mean_magnitude_over_the_root_of_quant_max():
    values, grid = rows(), Grid("symmetric", 4)
    low, high = values.aminmax(dim=1)
    scale, _ = grid.parameters(*find_range(values, None, low, high, grid, RangeRule("lsq")))
    torch.testing.assert_close(scale, 2 * values.abs().mean(1) / math.sqrt(7))
    positive = torch.rand(1, 1000).square()
    low, high = positive.aminmax(dim=1)
    for bits in (2, 8):
        grid = Grid("unsigned", bits)
        found = find_range(positive, None, low, high, grid, RangeRule("lsq"))
        expected = 2 * positive.mean(1) / math.sqrt(2**bits - 1)
        torch.testing.assert_close(grid.parameters(*found)[0], expected)


def test_percentile_cuts_the_given_share():
    values = torch.arange(1000.0).repeat(2, 1) - 300
    low, high = values.aminmax(dim=1)
    found = find_range(
        values, None, low, high, Grid("asymmetric", 4), RangeRule("percentile", percentile=99)
    )
    assert ((found[0] - (-290)).abs() <= 1).all()
    assert ((found[1] - 689).abs() <= 1).all()
    whole = find_range(
        values, None, low, high, Grid("asymmetric", 4), RangeRule("percentile", percentile=100)
    )
    assert torch.equal(whole[0], low)
    assert torch.equal(whole[1], high)


def test_counts_stand_for_repeated_values():
    values = torch.tensor([[-1.0, 0.2, 0.9, 4.0]])
    counts = torch.tensor([[3, 50, 40, 1]])
    repeated = values.repeat_interleave(counts[0], dim=1)
    low, high = values.aminmax(dim=1)
    for name in ("lp", "lsq", "percentile"):
        grid, rule = Grid("asymmetric", 3), RangeRule(name, percentile=95)
        by_counts = find_range(values, counts, low, high, grid, rule)
        by_values = find_range(repeated, None, low, high, grid, rule)
        torch.testing.assert_close(by_counts[0], by_values[0])
        torch.testing.assert_close(by_counts[1], by_values[1])


def test_constant_and_zero_rows_give_finite_positive_scales():
    values = torch.tensor([[0.0] * 8, [2.0] * 8, [-2.0] * 8])
    low, high = values.aminmax(dim=1)
    for kind in ("symmetric", "asymmetric"):
        for name in ("minmax", "lp", "lsq", "percentile"):
            grid = Grid(kind, 4)
            scale, zero = grid.parameters(
                *find_range(values, None, low, high, grid, RangeRule(name))
            )
            assert (scale > 0).all() and scale.isfinite().all() and zero.isfinite().all()


# ---- histogram ------------------------------------------------------------------------------


def test_histogram_does_not_depend_on_batches_or_their_order():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)).exp() - 0.5
    whole = Histogram()
    whole.update(values)
    for chunks, order in ((7, 1), (40, 1), (40, -1)):
        parts = Histogram()
        for chunk in list(values.split(4000 // chunks))[::order]:
            parts.update(chunk)
        assert parts.reach == whole.reach
        assert torch.equal(parts.counts, whole.counts)
        assert (parts.low, parts.high) == (whole.low, whole.high)


def test_histogram_counts_every_value_within_half_a_bin():
    values = torch.randn(5000) * 3
    histogram = Histogram()
    histogram.update(values.view(50, 10, 10))
    centres, counts = histogram.values_and_counts()
    assert int(counts.sum()) == 5000
    width = 2 * histogram.reach / histogram.bins
    repeated = centres.repeat_interleave(counts)
    assert ((repeated - values.sort().values).abs() <= width / 2 * 1.001).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided", "expanded"])
def test_histogram_counts_every_value_of_any_layout(layout):
    values = torch.randn(4, 24, 64, 48, generator=torch.Generator().manual_seed(0))
    assert values.numel() > ranges._COUNTED_AT_ONCE  # several parts, the last one smaller
    if layout == "channels last":
        values = values.to(memory_format=torch.channels_last)
    elif layout == "strided":
        values = values[:, :, ::2, 1:]
    elif layout == "expanded":
        values = values[:1, :, :, :1].expand(3, 24, 64, 100)
    histogram = Histogram()
    histogram.update(values)
    index = np.floor(values.numpy().ravel() * (histogram.bins / 2 / histogram.reach)).astype(int)
    expected = np.bincount(index + histogram.bins // 2, minlength=histogram.bins)
    assert histogram.counts.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["minmax", "lp", "lsq", "percentile"])
@pytest.mark.parametrize("kind", ["unsigned", "asymmetric", "paper"])
def test_range_from_the_histogram_is_close_to_the_range_from_the_values(name, kind):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.2
    values = values.relu() if kind == "unsigned" else values
    histogram = Histogram()
    for chunk in values.split(1000):
        histogram.update(chunk)
    rule, grid = RangeRule(name, percentile=99), Grid(kind, 4)
    low, high = histogram.find_range(grid, rule)
    ends = values[None].aminmax(dim=1)
    expected = find_range(values[None], None, *ends, grid, rule)
    # The search may stop at a neighbouring candidate with almost the same error.
    assert low == pytest.approx(expected[0].item(), abs=0.08)
    assert high == pytest.approx(expected[1].item(), abs=0.08)
    ours = error(values[None], torch.tensor([low]), torch.tensor([high]), grid)
    assert ours.item() <= error(values[None], *expected, grid).item() * 1.02


def test_histogram_refuses_what_is_not_finite():
    for bad in (math.nan, math.inf):
        with pytest.raises(UsageError, match="every activation to be finite"):
            Histogram().update(torch.tensor([1.0, bad]))
