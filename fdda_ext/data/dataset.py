"""What every source of images offers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..image_size import ImageSize
from .augmentation import Augmentation

__all__ = ["ImageDataset", "to_channels"]

#: Of red, green and blue in gray, as Pillow (ITU-R 601) has them, in 65 536ths.
_GRAY = (19_595, 38_470, 7_471)


def to_channels(pixels: Tensor, channels: int) -> Tensor:
    """Gray, RGB or RGBA of images with one or three channels, as Pillow converts them.

    Args:
        pixels: uint8 or float32 from 0 to 1, ``[1 or 3, H, W]``.
        channels: 1, 3 or 4; opacity is full.

    Returns:
        ``[channels, H, W]`` of the same dtype.
    """
    if pixels.shape[0] == channels:
        return pixels
    if channels == 1:
        weights = torch.tensor(_GRAY).view(3, 1, 1)
        if pixels.dtype == torch.uint8:
            return ((pixels * weights).sum(0, keepdim=True) + 0x8000 >> 16).to(torch.uint8)
        return (pixels * (weights / 65_536)).sum(0, keepdim=True)
    colours = pixels.expand(3, -1, -1)
    full = 255 if pixels.dtype == torch.uint8 else 1
    return colours if channels == 3 else torch.cat([colours, torch.full_like(colours[:1], full)])


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Normalised images with labels.

    Attributes:
        num_classes: Labels lie below it.
        class_names: One for each class.
        mean, std: What is subtracted, and divided by, per channel, of values from 0 to 1. Their
            number is that of the channels, C: 1 (gray), 3 (RGB) or 4 (RGBA).
        image_size: Height and width, H and W.
        augmentation: How images may be varied.
        labels: int64 ``[len]``, known without decoding an image.
        from_files: Whether images must be decoded.
    """

    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: ImageSize
    augmentation: Augmentation
    labels: Tensor
    from_files = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)

    @property
    def stored_size(self) -> ImageSize | None:
        """The size that all images have before any preparation; None if they differ."""
        return self.image_size

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
        """``[C, H, W]`` before `normalise`: uint8, or float32 from 0 to 1 where eight bits lack.

        Raises:
            UnreadableImageError: If it comes from a file that is no image, or a damaged one.
        """
        raise NotImplementedError

    def pixels_without_margin(self, index: int) -> Tensor | None:
        """As `pixels`, but not enlarged beyond ``[C, H, W]`` and then cut to it.

        None for an image that is not enlarged.

        Raises:
            UnreadableImageError: As for `pixels`.
        """
        return None

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 ``[..., C, H, W]`` of what `pixels` gave, on whatever device that is."""
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        mean, std = (
            torch.tensor(values, device=pixels.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (pixels - mean) / std

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Normalised float32 ``[C, H, W]`` and the class."""
        return self.normalise(self.pixels(index)), int(self.labels[index])

    def images(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """float32 images ``[B, C, H, W]`` of ``indices``, and their int64 labels ``[B]``."""
        numbers = [int(index) for index in indices]
        return self.normalise(torch.stack([self.pixels(i) for i in numbers])), self.labels[numbers]
