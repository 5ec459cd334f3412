"""Reconstruction: parts of a student made to compute again what they computed in float.

``partition`` (units.py) cuts the student, `Frontier` (frontier.py) computes what goes into a part
and should come out and keeps it in a `Cache` (cache.py), `Reconstruction` (reconstruct.py)
optimises it, the rounding of its weights (rounding.py) included. ``prediction_costs``
(sensitivity.py) may come before, ``retune_norms`` (normalisation.py) after.
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
    float_copy,
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
    "float_copy",
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
