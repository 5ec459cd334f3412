"""Synthetic images from labels and a trained network."""

from .generator import ConditionalGenerator, GeneratorConfig, SuperposedGenerator
from .image_optimisation import ImageOptimisation, ImageOptimisationConfig

__all__ = [
    "ConditionalGenerator",
    "GeneratorConfig",
    "ImageOptimisation",
    "ImageOptimisationConfig",
    "SuperposedGenerator",
]
