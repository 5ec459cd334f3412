"""The report of a run: what is measured, drawn and written (measures, figures, page, report)."""

from .measures import (
    Predictions,
    bn_statistics,
    layer_sqnr,
    predict,
    statistics_distance,
)
from .report import write_report

__all__ = [
    "Predictions",
    "bn_statistics",
    "layer_sqnr",
    "predict",
    "statistics_distance",
    "write_report",
]
