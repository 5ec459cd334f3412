"""Sources of images: embedded, and folders of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import UsageError
from .augmentation import Augmentation, augment
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

Split = Literal["train", "calibration", "test"]


class ImageDataset(Protocol):
    """Normalised images with labels.

    Attributes:
        num_classes: Labels lie below it.
        class_names: One for each class.
        mean, std: What was subtracted, and divided by, per colour.
        image_size: Height and width.
        augmentation: How images may be varied.
    """

    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    augmentation: Augmentation

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """float32 ``[3, H, W]`` and the label."""
        ...


class _First:
    """The first images of a data set that come in turn over the whole of it."""

    def __init__(self, dataset: Any, limit: int) -> None:
        self._dataset = dataset
        # Evenly spread, since folders are sorted by class.
        self._indices = torch.linspace(0, len(dataset) - 1, min(limit, len(dataset))).long()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item: tuple[Tensor, int] = self._dataset[int(self._indices[index])]
        return item

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._dataset, name)


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
        split: "train", "calibration" (never part of test) or "test".
        image_size: Height and width; None for the set's own (32, or 224 for folders).
        seed: Of the images that are rendered.
        limit: At most so many images, spread evenly over the split.

    Raises:
        UsageError: If there is no such set, or its folder is missing or not as it should be.
    """
    if split not in ("train", "calibration", "test"):
        raise UsageError(f"data: expected split to be train, calibration or test, got {split}")
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
    return dataset if limit is None else _First(dataset, limit)


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
    labels = _labels(dataset)
    random = torch.Generator().manual_seed(seed)
    chosen = []
    for k in range(dataset.num_classes):
        own = (labels == k).nonzero().flatten()
        if own.numel() < images_per_class:
            raise UsageError(
                f"data: expected at least {images_per_class} calibration image(s) of every class, "
                f"got {own.numel()} of class {dataset.class_names[k]}"
            )
        chosen.append(own[torch.randperm(own.numel(), generator=random)[:images_per_class]])
    indices = torch.cat(chosen)
    return torch.stack([dataset[int(index)][0] for index in indices]), labels[indices]


def _labels(dataset: ImageDataset) -> Tensor:
    """All labels, without decoding an image."""
    if isinstance(dataset, Glyphs):
        return torch.arange(len(dataset)) % dataset.num_classes
    return torch.tensor(dataset.labels, dtype=torch.int64)  # type: ignore[attr-defined]
