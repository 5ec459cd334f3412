"""Images from nothing but labels and a trained network."""

from .generator import ConditionalGenerator, GeneratorConfig

__all__ = ["ConditionalGenerator", "GeneratorConfig"]
