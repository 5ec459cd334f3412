"""Batch-normalisation statistics (BNS): capture, class centres and losses."""

from .capture import BatchNormCapture, capture, running_statistics
from .centres import CLASSES_PER_PASS, BNSCentres, compute_centres, load_centres, save_centres
from .image_losses import deviations, feature_distance, image_alignment, total_variation
from .losses import (
    Distortion,
    LayerStatistics,
    StatisticsTargets,
    bns_loss,
    centralised_and_distorted_targets,
    first_class_layer,
    noise_pull_loss,
    noise_pull_targets,
    running_targets,
)

__all__ = [
    "CLASSES_PER_PASS",
    "BNSCentres",
    "BatchNormCapture",
    "Distortion",
    "LayerStatistics",
    "StatisticsTargets",
    "bns_loss",
    "capture",
    "centralised_and_distorted_targets",
    "compute_centres",
    "deviations",
    "feature_distance",
    "first_class_layer",
    "image_alignment",
    "load_centres",
    "noise_pull_loss",
    "noise_pull_targets",
    "running_statistics",
    "running_targets",
    "save_centres",
    "total_variation",
]
