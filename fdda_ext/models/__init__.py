"""Sources of trained networks."""

from .zoo import load_model, load_weights

__all__ = ["load_model", "load_weights"]
