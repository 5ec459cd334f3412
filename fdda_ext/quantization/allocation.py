"""Choice of the bits of every layer for a given average."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..errors import UsageError

__all__ = ["allocate_bits"]


def allocate_bits(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average_bits: float
) -> dict[str, int]:
    """Choose the bits of every layer with the least total cost.

    With x[l, b] = 1 if layer l gets b bits, branch and bound (HiGHS) solves exactly::

        minimise    sum_l sum_b costs[l][b] x[l, b]
        subject to  sum_b x[l, b] = 1                           for every layer l
                    sum_l sum_b sizes[l] b x[l, b] <= average_bits sum_l sizes[l]

    Args:
        costs: Cost of each allowed number of bits, by layer.
        sizes: Number of weights of each layer.
        average_bits: Upper limit of the average number of bits per weight.

    Returns:
        Bits of each layer, for `QuantizationConfig.layer_bits`.

    Raises:
        UsageError: If no choice meets the limit, or ``costs`` and ``sizes`` do not match.
    """
    if costs.keys() != sizes.keys() or not costs:
        raise UsageError(
            "allocate_bits: expected costs and sizes of the same layers, at least one, "
            f"got {sorted(costs)} and {sorted(sizes)}"
        )
    for name, of_layer in costs.items():
        if not of_layer or not np.isfinite(list(of_layer.values())).all() or sizes[name] < 1:
            raise UsageError(
                "allocate_bits: expected finite costs and a size above 0 for every layer, "
                f"got {dict(of_layer)} and {sizes[name]} for {name}"
            )
    total = sum(sizes.values())
    least = sum(sizes[name] * min(of_layer) for name, of_layer in costs.items())
    budget = average_bits * total * (1 + 1e-12)  # in floating point, 4.35 * 100 is below 435
    if not least <= budget:
        raise UsageError(
            f"allocate_bits: expected average_bits at least {least / total:.4g}, "
            f"the fewest bits that costs allow, got {average_bits}"
        )
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import
    from scipy.sparse import csr_array

    choices = [(name, bits) for name, of_layer in costs.items() for bits in of_layer]
    cost = np.array([costs[name][bits] for name, bits in choices])
    spent = np.array([sizes[name] * bits for name, bits in choices], dtype=float)
    layers = list(costs)
    one_each = csr_array(
        (
            np.ones(len(choices)),
            ([layers.index(name) for name, _ in choices], range(len(choices))),
        )
    )
    result = milp(
        # Scaled, because the solver's tolerances are absolute.
        cost / max(np.abs(cost).max(), np.finfo(float).tiny),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(spent[None], -np.inf, math.floor(budget)),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, result.message
    return {name: bits for (name, bits), x in zip(choices, result.x, strict=True) if x > 0.5}
