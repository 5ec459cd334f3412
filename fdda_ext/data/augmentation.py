"""Random crops and flips of whole batches, on the images' device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UsageError

__all__ = ["Augmentation", "augment"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes that keep the class of an image.

    Attributes:
        crop_scale: Smallest and largest share of the image's area that a crop keeps.
        crop_ratio: Smallest and largest ratio of the crop's width to its height.
        flip: Whether to mirror images left to right.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UsageError(
                "augmentation: expected crop_scale within (0, 1] and ascending, "
                f"got {self.crop_scale}"
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise UsageError(
                f"augmentation: expected crop_ratio above 0 and ascending, got {self.crop_ratio}"
            )


def augment(
    images: Tensor,
    augmentation: Augmentation,
    random: torch.Generator,
    *,
    same_for_batch: bool = False,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Crop at random, resize (bilinear) and flip at random.

    Area and ratio of the crop are drawn as in torchvision's RandomResizedCrop. A crop longer than
    the image is cut to it.

    Args:
        images: Images ``[N, C, H, W]``.
        augmentation: Random changes.
        random: Source of random numbers, on the images' device.
        same_for_batch: Whether all images share one draw.
        size: Height and width of the results; None for those of ``images``.

    Returns:
        Images ``[N, C, *size]``.
    """
    count = images.shape[0]
    draws = 1 if same_for_batch else count
    uniform = torch.rand((5, draws), generator=random, device=images.device)
    low, high = augmentation.crop_scale
    area = low + (high - low) * uniform[0]
    low, high = (math.log(ratio) for ratio in augmentation.crop_ratio)
    ratio = torch.exp(low + (high - low) * uniform[1])
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    # Centre of the crop, in coordinates from -1 to 1 across the image.
    x = (2 * uniform[2] - 1) * (1 - width)
    y = (2 * uniform[3] - 1) * (1 - height)
    if augmentation.flip:
        width = torch.where(uniform[4] < 0.5, -width, width)
    zero = torch.zeros_like(x)
    rows = (torch.stack([width, zero, x], 1), torch.stack([zero, height, y], 1))
    theta = torch.stack(rows, 1).expand(count, 2, 3).to(images.dtype)
    height_out, width_out = size or images.shape[-2:]
    # Smaller results are means of several samples, because single samples would be aliased.
    samples = max(-(-images.shape[-2] // height_out), -(-images.shape[-1] // width_out))
    shape = [*images.shape[:2], samples * height_out, samples * width_out]
    grid = F.affine_grid(theta, shape, align_corners=False)
    found = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return found if samples == 1 else F.avg_pool2d(found, samples)
