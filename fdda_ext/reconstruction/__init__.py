"""Reconstruction: training of a student's units to compute the teacher's outputs.

``partition`` (units.py) divides the student into units. `Frontier` (frontier.py) computes inputs
and targets of a unit, each stored in a `Cache` (cache.py). `Reconstruction` (reconstruct.py) trains
the unit, including the rounding of its weights (rounding.py). ``prediction_costs`` (sensitivity.py)
may come before, and ``retune_norms`` (normalisation.py) after.
"""

from .cache import BATCH, Cache, collect
from .frontier import Frontier
from .normalisation import retune_norms
from .reconstruct import (
    Data,
    Dropped,
    Reconstruction,
    RelativeAdam,
    activations_in_float,
    mean_inputs,
    output_error,
    set_ranges,
    squared_gradients,
    values_of,
)
from .rounding import (
    RoundingConfig,
    SoftlyRounded,
    check_ranges_stay,
    share_decided,
    soften_,
)
from .sensitivity import prediction_costs
from .units import Granularity, Unit, arguments_of, partition, region

__all__ = [
    "BATCH",
    "Cache",
    "Data",
    "Dropped",
    "Frontier",
    "Granularity",
    "Reconstruction",
    "RelativeAdam",
    "RoundingConfig",
    "SoftlyRounded",
    "Unit",
    "activations_in_float",
    "arguments_of",
    "check_ranges_stay",
    "collect",
    "mean_inputs",
    "output_error",
    "partition",
    "prediction_costs",
    "region",
    "retune_norms",
    "set_ranges",
    "share_decided",
    "soften_",
    "squared_gradients",
    "values_of",
]
