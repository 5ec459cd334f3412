"""Batch-normalisation statistics (BNS): their capture, their class centres, their losses."""

from .capture import BatchNormCapture, capture, running_statistics
from .centres import BNSCentres, compute_centres, load_centres, save_centres
from .losses import (
    Distortion,
    LayerStatistics,
    bns_loss,
    centralised_and_distorted_loss,
    first_class_layer,
    noise_pull_loss,
)

__all__ = [
    "BNSCentres",
    "BatchNormCapture",
    "Distortion",
    "LayerStatistics",
    "bns_loss",
    "capture",
    "centralised_and_distorted_loss",
    "compute_centres",
    "first_class_layer",
    "load_centres",
    "noise_pull_loss",
    "running_statistics",
    "save_centres",
]
