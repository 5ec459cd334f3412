"""Measures and figures of runs, the report of a run, and the figures of a comparison."""

from .figures import COLOURS, MARKERS, new_figure
from .measures import (
    Predictions,
    bn_statistics,
    judge,
    layer_sqnr,
    predict,
    quartiles,
    some_images,
    statistics_distance,
    time_interleaved,
)
from .report import write_report

__all__ = [
    "COLOURS",
    "MARKERS",
    "Predictions",
    "bn_statistics",
    "judge",
    "layer_sqnr",
    "new_figure",
    "predict",
    "quartiles",
    "some_images",
    "statistics_distance",
    "time_interleaved",
    "write_report",
]
