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
        mean, std: What is subtracted, and divided by, per colour, of values from 0 to 1.
        image_size: Height and width.
        augmentation: How images may be varied.
        labels: int64 ``[len]``, known without decoding an image.
        from_files: Whether images must be decoded.
    """

    num_classes: int
    class_names: tuple[str, ...]
    channels = 3
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    augmentation: Augmentation
    labels: Tensor
    from_files = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes_present(self) -> int:
        """How many classes the whole split has images of, also where only some images are used."""
        return int(self.labels.unique().numel())

    def absent_classes(self) -> str | None:
        """For people, how many classes the split has images of; None if of all."""
        if self.classes_present == self.num_classes:
            return None
        return f"images of {self.classes_present} of {self.num_classes} classes"

    def pixels(self, index: int) -> Tensor:
        """``[3, H, W]`` before `normalise`: uint8, or float32 from 0 to 1 where eight bits lack.

        Raises:
            UnreadableImageError: If it comes from a file that is no image, or a damaged one.
        """
        raise NotImplementedError

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 ``[..., 3, H, W]`` of what `pixels` gave, on whatever device that is."""
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        mean, std = (
            torch.tensor(values, device=pixels.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (pixels - mean) / std

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Normalised float32 ``[3, H, W]`` and the class."""
        return self.normalise(self.pixels(index)), int(self.labels[index])

    def images(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """float32 images ``[B, 3, H, W]`` of ``indices``, and their int64 labels ``[B]``."""
        numbers = [int(index) for index in indices]
        return self.normalise(torch.stack([self.pixels(i) for i in numbers])), self.labels[numbers]
