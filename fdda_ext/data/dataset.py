"""What every source of images offers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augmentation import Augmentation

__all__ = ["ImageDataset"]


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Normalised RGB images with labels.

    Attributes:
        num_classes: Labels lie below it.
        class_names: One for each class.
        channels: Colours.
        mean, std: What was subtracted, and divided by, per colour.
        image_size: Height and width.
        augmentation: How images may be varied.
        labels: int64 ``[len]``, known without decoding an image.
    """

    num_classes: int
    class_names: tuple[str, ...]
    channels = 3
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    augmentation: Augmentation
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """float32 ``[3, H, W]`` and the label."""
        raise NotImplementedError

    def images(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """float32 images ``[B, 3, H, W]`` of ``indices``, and their int64 labels ``[B]``."""
        numbers = [int(index) for index in indices]
        return torch.stack([self[index][0] for index in numbers]), self.labels[numbers]
