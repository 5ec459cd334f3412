"""Images from nothing but labels and a trained network."""

from .generator import ConditionalGenerator, GeneratorConfig, SuperposedGenerator

__all__ = ["ConditionalGenerator", "GeneratorConfig", "SuperposedGenerator"]
