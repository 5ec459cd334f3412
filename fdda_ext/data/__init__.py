"""Data sets: embedded ones, published ones, and the user's own images."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UnreadableImageError, UsageError
from ..image_size import ImageSize, height_and_width, parse_image_size
from ..preprocessing import Preprocessing, PreprocessingConfig
from .augmentation import Augmentation, augment
from .dataset import ImageDataset
from .digits import Digits
from .folder import ImageFolder
from .glyphs import Glyphs
from .published import PUBLISHED, open_published
from .sampling import fair_sample
from .shards import Shards

__all__ = [
    "PUBLISHED",
    "Augmentation",
    "ImageDataset",
    "Split",
    "augment",
    "calibration_set",
    "choose_preprocessing",
    "load_dataset",
    "takes_preprocessing",
]

_log = logging.getLogger("fdda_ext")

Split = Literal["train", "calibration", "validation", "test"]


class _Limited(ImageDataset):
    """A sample of a data set, in the data set's order; see `fair_sample`.

    Attributes:
        whole: Number of images in the data set.
    """

    def __init__(self, dataset: ImageDataset, limit: int) -> None:
        self._dataset = dataset
        # Sorted, so that files are read in their order on disk.
        self._indices = fair_sample(dataset.labels, limit).sort().values
        self.whole = len(dataset)
        self.num_classes = dataset.num_classes
        self.class_names = dataset.class_names
        self.mean, self.std = dataset.mean, dataset.std
        self.image_size = dataset.image_size
        self.augmentation = dataset.augmentation
        self.labels = dataset.labels[self._indices]
        self.from_files = dataset.from_files

    @property
    def classes_present(self) -> int:
        return self._dataset.classes_present

    @property
    def stored_size(self) -> ImageSize | None:
        return self._dataset.stored_size

    def pixels(self, index: int) -> Tensor:
        return self._dataset.pixels(int(self._indices[index]))

    def pixels_without_margin(self, index: int) -> Tensor | None:
        return self._dataset.pixels_without_margin(int(self._indices[index]))


def load_dataset(
    spec: str,
    split: Split,
    *,
    image_size: ImageSize | str | None = None,
    seed: int = 0,
    limit: int | None = None,
    preprocessing: Preprocessing | None = None,
    channels: int | None = None,
    download: bool = False,
) -> ImageDataset:
    """Open a data set.

    Args:
        spec: ``glyphs``, ``digits``, ``folder:PATH``, ``shards:PATH``, ``imagenet:PATH`` (a folder
            with ImageNet's 1000 classes; ``imagenet`` alone reads PATH from the environment
            variable IMAGENET), or ``NAME:PATH`` for a data set of torchvision, see `PUBLISHED`.
        split: "train", "calibration", "validation" (to choose settings) or "test". The last two
            share no image with any other split.
        image_size: One number for height and width, (height, width) or ``"32x64"``; None for the
            data set's own size (32) or that of ``preprocessing``.
        seed: Seed of rendered images.
        limit: Largest number of images. The sample does not depend on the seed, and smaller
            samples are parts of larger ones, see `fair_sample`.
        preprocessing: Preparation of image files for the network; None for that of ImageNet.
            ``image_size`` overrides its size.
        channels: 1 (gray), 3 (RGB) or 4 (RGBA); None for the channels of ``preprocessing`` or of
            the data set.
        download: Whether to download missing files of a torchvision data set.

    Raises:
        UsageError: If the data set is unknown, or its folder is missing or has another layout.
    """
    if split not in get_args(Split):
        raise UsageError(f"data: expected split to be one of {get_args(Split)}, got {split}")
    size = None if image_size is None else parse_image_size(image_size)
    if size is not None and min(height_and_width(size)) < 8:
        raise UsageError(f"data: expected image_size at least 8, got {image_size}")
    if limit is not None and limit < 1:
        raise UsageError(f"data: expected limit at least 1, got {limit}")
    source, _, path = spec.partition(":")
    if spec == "imagenet":
        path = os.environ.get("IMAGENET", "")
        if not path:
            raise UsageError(
                "data: expected imagenet:PATH, or PATH in the environment variable IMAGENET, got "
                "neither"
            )
    how = (preprocessing or Preprocessing()).for_size(size)
    how = how.for_channels(channels or how.channels)
    dataset: ImageDataset
    if spec == "glyphs":
        dataset = Glyphs(split, size or 32, seed, channels or 3)
    elif spec == "digits":
        dataset = Digits(split, size or 32, channels or 3)
    elif source == "shards" and path:
        dataset = Shards(Path(path), split, how)
    elif source in PUBLISHED and path:
        dataset = open_published(
            source,
            Path(path),
            split,
            preprocessing=preprocessing,
            image_size=size,
            channels=channels,
            download=download,
        )
    elif source in ("folder", "imagenet") and path:
        dataset = ImageFolder(Path(path), split, how)
        if source == "imagenet" and dataset.num_classes != 1000:
            raise UsageError(
                f"data: expected {path} to hold ImageNet's 1000 classes, "
                f"got {dataset.num_classes}; use folder:{path} for other data sets (if val has "
                "fewer classes, the folders of train name them all)"
            )
    else:
        raise UsageError(
            "data: expected glyphs, digits, folder:PATH, shards:PATH, imagenet:PATH or NAME:PATH "
            f"with NAME one of {', '.join(PUBLISHED)}, got {spec}"
        )
    return dataset if limit is None else _Limited(dataset, limit)


def takes_preprocessing(spec: str) -> bool:
    """Return whether ``spec`` names images whose preprocessing can be chosen."""
    return spec.partition(":")[0] in ("folder", "shards", "imagenet", *PUBLISHED)


def choose_preprocessing(
    dataset: ImageDataset,
    default: Preprocessing,
    config: PreprocessingConfig,
    *,
    image_size: ImageSize | str | None,
    channels: int,
) -> Preprocessing:
    """Choose the preprocessing of image files for a network.

    Without ``image_size``, images keep their size if it is small and the same for all, and if no
    library states which size the network expects. Published images of one size always keep it.

    Args:
        dataset: Any split of the data set.
        default: Preprocessing that is known for the network.
        config: Changes that the user wants.
        image_size: Size that the user wants, or None.
        channels: Channels of the network's input.

    Raises:
        UsageError: If the result breaks a rule of `Preprocessing`.
    """
    if image_size is None and (default.keep_small or not dataset.from_files):
        image_size = dataset.stored_size
    return config.apply(default.for_channels(channels), image_size)


def calibration_set(
    spec: str,
    images_per_class: int = 1,
    *,
    seed: int = 0,
    image_size: ImageSize | str | None = None,
    preprocessing: Preprocessing | None = None,
    channels: int | None = None,
    max_unreadable: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draw a calibration set: some images of every class.

    Args:
        spec: Data set, see `load_dataset`.
        images_per_class: Images per class.
        seed: Seed of the draw and of rendered images.
        image_size: See `load_dataset`.
        preprocessing: See `load_dataset`.
        channels: See `load_dataset`.
        max_unreadable: Largest number of damaged files. Other images of their classes replace
            them, and the logger ``fdda_ext`` warns.

    Returns:
        Normalised float32 images ``[K * images_per_class, C, H, W]``, sorted by class and not
        augmented, and int64 labels.

    Raises:
        UsageError: If a class has too few images.
        UnreadableImageError: If more files are damaged.
    """
    if images_per_class < 1:
        raise UsageError(f"data: expected images_per_class at least 1, got {images_per_class}")
    dataset = load_dataset(
        spec,
        "calibration",
        image_size=image_size,
        seed=seed,
        preprocessing=preprocessing,
        channels=channels,
    )
    random = torch.Generator().manual_seed(seed)
    chosen: list[Tensor] = []
    unreadable = 0
    for k in range(dataset.num_classes):
        own = (dataset.labels == k).nonzero().flatten()
        order = own[torch.randperm(own.numel(), generator=random)].tolist()
        taken = 0
        while taken < images_per_class:
            if not order:
                lost = own.numel() - taken
                reason = f" and {lost} that cannot be read" if lost else ""
                if not own.numel():
                    reason = "; add images of it, or remove the class from the training data"
                raise UsageError(
                    f"data: expected at least {images_per_class} calibration image(s) of every "
                    f"class, got {taken} of class {dataset.class_names[k]}{reason}"
                )
            try:
                chosen.append(dataset.pixels(order.pop(0)))
                taken += 1
            except UnreadableImageError as error:
                unreadable += 1
                if unreadable > max_unreadable:
                    raise
                _log.warning("%s; another image of its class replaces it", error)
    labels = torch.arange(dataset.num_classes).repeat_interleave(images_per_class)
    return dataset.normalise(torch.stack(chosen)), labels
