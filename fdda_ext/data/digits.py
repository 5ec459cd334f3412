"""``digits``: scikit-learn's real handwritten digits, 8x8 pixels, enlarged and made RGB."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .augmentation import Augmentation
from .dataset import ImageDataset

__all__ = ["Digits"]

#: Share of the 1797 images in each split, always the same ones.
_SPLITS = {
    "train": (0.0, 0.5),
    "calibration": (0.5, 0.6),
    "validation": (0.6, 0.7),
    "test": (0.7, 1.0),
}


class Digits(ImageDataset):
    """The data set, see the module.

    Args:
        split: "train", "calibration", "validation" or "test".
        image_size: Height and width.
    """

    num_classes = 10
    class_names = tuple("0123456789")
    mean: tuple[float, ...] = (0.3, 0.3, 0.3)
    std: tuple[float, ...] = (0.38, 0.38, 0.38)
    augmentation = Augmentation(crop_scale=(0.75, 1.0), crop_ratio=(0.85, 1.18), flip=False)

    def __init__(self, split: str, image_size: int = 32) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        first, last = (round(share * len(labels)) for share in _SPLITS[split])
        chosen = order[first:last]
        self.image_size = image_size
        self.labels = torch.from_numpy(labels[chosen]).long()
        small = torch.from_numpy(images[chosen]).float().view(-1, 1, 8, 8) / 16
        size = (image_size, image_size)
        large = F.interpolate(small, size=size, mode="bilinear", align_corners=False)
        self._images = large.expand(-1, 3, -1, -1)

    def pixels(self, index: int) -> Tensor:
        """float32 ``[3, H, W]``: between the 17 levels of a digit lie more than eight bits tell."""
        return self._images[index]
