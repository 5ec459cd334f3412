"""Batch-normalisation statistics (BNS): their capture, their class centres, their losses."""

from .capture import BatchNormCapture, capture, running_statistics
from .centres import BNSCentres, compute_centres, load_centres, save_centres
from .image_losses import deviations, feature_distance, image_alignment, total_variation
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
    "deviations",
    "feature_distance",
    "first_class_layer",
    "image_alignment",
    "load_centres",
    "noise_pull_loss",
    "running_statistics",
    "save_centres",
    "total_variation",
]
