"""What runs are looked at by: measures, figures, the report of one, the comparison of many."""

from .measures import (
    Predictions,
    bn_statistics,
    layer_sqnr,
    predict,
    some_images,
    statistics_distance,
)
from .report import write_report

__all__ = [
    "Predictions",
    "bn_statistics",
    "layer_sqnr",
    "predict",
    "some_images",
    "statistics_distance",
    "write_report",
]
