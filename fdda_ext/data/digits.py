"""``digits``: scikit-learn's handwritten digits, enlarged from 8x8 pixels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..image_size import ImageSize, height_and_width
from .augmentation import Augmentation
from .dataset import ImageDataset, to_channels

__all__ = ["Digits"]

#: Share of the 1797 images in each split. The splits are fixed.
_SPLITS = {
    "train": (0.0, 0.5),
    "calibration": (0.5, 0.6),
    "validation": (0.6, 0.7),
    "test": (0.7, 1.0),
}


class Digits(ImageDataset):
    """The ``digits`` data set.

    Args:
        split: "train", "calibration", "validation" or "test".
        image_size: Height and width.
        channels: 1 (gray), 3 (equal colours) or 4 (with full opacity).
    """

    num_classes = 10
    class_names = tuple("0123456789")
    augmentation = Augmentation(crop_scale=(0.75, 1.0), crop_ratio=(0.85, 1.18), flip=False)

    def __init__(self, split: str, image_size: ImageSize = 32, channels: int = 3) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        first, last = (round(share * len(labels)) for share in _SPLITS[split])
        chosen = order[first:last]
        self.image_size = image_size
        self.labels = torch.from_numpy(labels[chosen]).long()
        small = torch.from_numpy(images[chosen]).float().view(-1, 1, 8, 8) / 16
        size = height_and_width(image_size)
        self._images = F.interpolate(small, size=size, mode="bilinear", align_corners=False)
        self.mean, self.std = (0.3,) * channels, (0.38,) * channels

    def pixels(self, index: int) -> Tensor:
        """Return float32 ``[C, H, W]``, since interpolated values need more than 8 bits."""
        return to_channels(self._images[index], self.channels)
