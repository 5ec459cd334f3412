"""Base class of all data sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..image_size import ImageSize
from .augmentation import Augmentation

__all__ = ["ImageDataset", "to_channels"]

#: Weights of red, green and blue in gray, in 65 536ths (ITU-R 601, as in Pillow).
_GRAY = (19_595, 38_470, 7_471)


def to_channels(pixels: Tensor, channels: int) -> Tensor:
    """Convert an image to gray, RGB or RGBA as Pillow does.

    Args:
        pixels: uint8, or float32 from 0 to 1, ``[1 or 3, H, W]``.
        channels: 1 (gray), 3 (RGB) or 4 (RGBA with full opacity).

    Returns:
        ``[channels, H, W]`` with the same dtype.
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
        num_classes: Number of classes, K.
        class_names: Name of every class.
        mean, std: Normalisation of values from 0 to 1, one number per channel: 1 (gray), 3 (RGB)
            or 4 (RGBA).
        image_size: Height and width, H and W.
        augmentation: Random changes that keep the class.
        labels: Labels, int64 ``[len]``, available without decoding images.
        from_files: Whether images are decoded from files.
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
        """Number of channels, C."""
        return len(self.mean)

    @property
    def stored_size(self) -> ImageSize | None:
        """Size of all images before preprocessing; None if they differ."""
        return self.image_size

    @property
    def classes_present(self) -> int:
        """Number of classes with images in the whole split, even if this is a sample."""
        return int(self.labels.unique().numel())

    def absent_classes(self) -> str | None:
        """Say how many classes have images in the split; None if all have."""
        if self.classes_present == self.num_classes:
            return None
        return f"images of {self.classes_present} of {self.num_classes} classes"

    def pixels(self, index: int) -> Tensor:
        """Return ``[C, H, W]`` before `normalise`: uint8, or float32 from 0 to 1.

        Raises:
            UnreadableImageError: If the file is damaged or not an image.
        """
        raise NotImplementedError

    def pixels_without_margin(self, index: int) -> Tensor | None:
        """Return `pixels` without enlarging the image by a margin that is then cropped.

        The result is None if `pixels` does not enlarge the image.

        Raises:
            UnreadableImageError: If the file is damaged or not an image.
        """
        return None

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise the result of `pixels` to float32 ``[..., C, H, W]``, on its device."""
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        mean, std = (
            torch.tensor(values, device=pixels.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (pixels - mean) / std

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return a normalised float32 image ``[C, H, W]`` and its class."""
        return self.normalise(self.pixels(index)), int(self.labels[index])

    def images(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised float32 images ``[B, C, H, W]`` and int64 labels ``[B]``."""
        numbers = [int(index) for index in indices]
        return self.normalise(torch.stack([self.pixels(i) for i in numbers])), self.labels[numbers]
