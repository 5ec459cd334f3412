"""The report of a run: what is measured, drawn and written (measures, figures, page, report)."""

from .figures import COLOURS, MARKERS, new_figure
from .measures import (
    Predictions,
    bn_statistics,
    layer_sqnr,
    predict,
    quartiles,
    statistics_distance,
    time_in_turn,
)
from .report import write_report

__all__ = [
    "COLOURS",
    "MARKERS",
    "Predictions",
    "bn_statistics",
    "layer_sqnr",
    "new_figure",
    "predict",
    "quartiles",
    "statistics_distance",
    "time_in_turn",
    "write_report",
]
