"""Sources of images: embedded, and folders of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UsageError
from .augmentation import Augmentation, augment
from .dataset import ImageDataset
from .digits import Digits
from .folder import ImageFolder
from .glyphs import Glyphs

__all__ = [
    "Augmentation",
    "ImageDataset",
    "Split",
    "augment",
    "calibration_set",
    "load_dataset",
]

Split = Literal["train", "calibration", "validation", "test"]


class _Limited(ImageDataset):
    """Some images of a data set, spread evenly over it: folders are sorted by class."""

    def __init__(self, dataset: ImageDataset, limit: int) -> None:
        self._dataset = dataset
        # In float64: float32 has no number for every index of a large set.
        spread = torch.linspace(0, len(dataset) - 1, min(limit, len(dataset)), dtype=torch.float64)
        self._indices = spread.long()
        self.num_classes = dataset.num_classes
        self.class_names = dataset.class_names
        self.mean, self.std = dataset.mean, dataset.std
        self.image_size = dataset.image_size
        self.augmentation = dataset.augmentation
        self.labels = dataset.labels[self._indices]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._dataset[int(self._indices[index])]


def load_dataset(
    spec: str,
    split: Split,
    *,
    image_size: int | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> ImageDataset:
    """Open a data set.

    Args:
        spec: ``glyphs``, ``digits``, ``folder:PATH`` or ``imagenet:PATH``.
        split: "train", "calibration", "validation" (to choose settings on) or "test". The last two
            share no image with each other and the rest.
        image_size: Height and width; None for the set's own (32, or 224 for folders).
        seed: Of the images that are rendered.
        limit: At most so many images, spread evenly over the split.

    Raises:
        UsageError: If there is no such set, or its folder is missing or not as it should be.
    """
    if split not in get_args(Split):
        raise UsageError(f"data: expected split to be one of {get_args(Split)}, got {split}")
    if image_size is not None and image_size < 8:
        raise UsageError(f"data: expected image_size at least 8, got {image_size}")
    if limit is not None and limit < 1:
        raise UsageError(f"data: expected limit at least 1, got {limit}")
    source, _, path = spec.partition(":")
    dataset: ImageDataset
    if spec == "glyphs":
        dataset = Glyphs(split, image_size or 32, seed)
    elif spec == "digits":
        dataset = Digits(split, image_size or 32)
    elif source in ("folder", "imagenet") and path:
        dataset = ImageFolder(Path(path), split, image_size or 224)
        if source == "imagenet" and dataset.num_classes != 1000:
            raise UsageError(
                f"data: expected {path} to hold ImageNet's 1000 classes, "
                f"got {dataset.num_classes}; use folder:{path} for other sets"
            )
    else:
        raise UsageError(f"data: expected glyphs, digits, folder:PATH or imagenet:PATH, got {spec}")
    return dataset if limit is None else _Limited(dataset, limit)


def calibration_set(
    spec: str, images_per_class: int = 1, *, seed: int = 0, image_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The little real data a method may use: some images of every class, drawn by ``seed``.

    Args:
        spec: As for `load_dataset`.
        images_per_class: How many of each.
        seed: Which ones.
        image_size: Height and width.

    Returns:
        float32 images ``[K * images_per_class, 3, H, W]``, normalised, not augmented, sorted by
        class, and int64 labels.

    Raises:
        UsageError: If a class has fewer images.
    """
    if images_per_class < 1:
        raise UsageError(f"data: expected images_per_class at least 1, got {images_per_class}")
    dataset = load_dataset(spec, "calibration", image_size=image_size, seed=seed)
    random = torch.Generator().manual_seed(seed)
    chosen = []
    for k in range(dataset.num_classes):
        own = (dataset.labels == k).nonzero().flatten()
        if own.numel() < images_per_class:
            raise UsageError(
                f"data: expected at least {images_per_class} calibration image(s) of every class, "
                f"got {own.numel()} of class {dataset.class_names[k]}"
            )
        chosen.append(own[torch.randperm(own.numel(), generator=random)[:images_per_class]])
    return dataset.images(torch.cat(chosen))
