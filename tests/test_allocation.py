"""Allocation of bits to layers under a budget, compared with exhaustive search."""

import itertools
import random

import pytest

from fdda_ext.errors import UsageError
from fdda_ext.quantization import allocate_bits


def exhaustive(costs, sizes, average_bits):
    budget = average_bits * sum(sizes.values())
    return min(
        sum(costs[name][bits] for name, bits in zip(costs, choice, strict=True))
        for choice in itertools.product(*costs.values())
        if sum(sizes[name] * bits for name, bits in zip(costs, choice, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(20))
def test_allocation_is_as_good_as_exhaustive_search(seed):
    rng = random.Random(seed)
    names = [f"layer{i}.conv" for i in range(5)]
    unit = 10.0 ** rng.randint(-9, 9)
    costs = {
        name: {bits: unit * rng.random() for bits in rng.sample(range(2, 9), rng.randint(1, 5))}
        for name in names
    }
    sizes = {name: rng.randint(1, 100_000) for name in names}
    least = sum(sizes[n] * min(costs[n]) for n in names) / sum(sizes.values())
    average_bits = least + rng.random() * 3
    chosen = allocate_bits(costs, sizes, average_bits)
    assert list(chosen) == names
    spent = sum(sizes[name] * bits for name, bits in chosen.items())
    assert spent <= average_bits * sum(sizes.values())
    found = sum(costs[name][bits] for name, bits in chosen.items())
    assert found <= exhaustive(costs, sizes, average_bits) * (1 + 1e-6)


def test_a_budget_can_be_used_completely():
    costs = {"a": {2: 1.0, 4: 0.0}, "b": {2: 3.0, 4: 0.0}}
    assert allocate_bits(costs, {"a": 10, "b": 10}, 3) == {"a": 2, "b": 4}
    assert allocate_bits(costs, {"a": 10, "b": 10}, 2) == {"a": 2, "b": 2}
    assert allocate_bits(costs, {"a": 10, "b": 10}, 8) == {"a": 4, "b": 4}


def test_rounding_does_not_reduce_the_budget():
    costs = {"a": {4: 9.0, 5: 0.0}, "b": {4: 1.0, 5: 0.0}}
    assert 4.35 * 100 < 435
    assert allocate_bits(costs, {"a": 35, "b": 65}, 4.35) == {"a": 5, "b": 4}
    assert allocate_bits(costs, {"a": 10**7 + 1, "b": 10**7}, 4.5) == {"a": 4, "b": 5}


def test_costs_may_all_be_zero():
    assert allocate_bits({"a": {2: 0.0, 3: 0.0}}, {"a": 5}, 2) == {"a": 2}


@pytest.mark.parametrize(
    ("costs", "sizes", "message"),
    [
        ({"a": {4: 1.0}}, {"a": 10}, "average_bits at least 4, the fewest bits .*, got 3"),
        ({"a": {3: 1.0}}, {"b": 10}, "costs and sizes of the same layers"),
        ({}, {}, "costs and sizes of the same layers, at least one"),
        ({"a": {3: float("nan")}}, {"a": 10}, "finite costs"),
        ({"a": {}}, {"a": 10}, "finite costs"),
        ({"a": {3: 1.0}}, {"a": 0}, "a size above 0 .* and 0 for a"),
    ],
)
def test_bad_costs_sizes_and_budgets_are_refused(costs, sizes, message):
    with pytest.raises(UsageError, match=message):
        allocate_bits(costs, sizes, 3)
