"""Networks and their trained weights."""

from .zoo import TrainedNetwork, load_model, load_weights, open_model

__all__ = ["TrainedNetwork", "load_model", "load_weights", "open_model"]
