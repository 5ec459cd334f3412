"""``folder:PATH`` and ``imagenet:PATH``: images in one folder per class."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from typing_extensions import override

from .._torchvision import import_torchvision
from ..errors import UnreadableImageError, UsageError
from ..image_size import ImageSize, height_and_width, to_image_size
from ..preprocessing import CHANNELS, Preprocessing
from .augmentation import Augmentation
from .dataset import ImageDataset
from .listing import Listing, cached_listing, is_hidden, stamp_of

__all__ = ["EXTENSIONS", "ImageFiles", "ImageFolder", "prepare_image", "split_folder"]

#: Possible folder names of each split; the first that exists is used.
_FOLDERS = {
    "train": ("train",),
    "calibration": ("train",),
    "validation": ("validation",),
    "test": ("val", "test"),
}
#: Extensions of image files.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


#: Number of images, spread over the data set, that decide whether all have one size.
_SIZED = 16
#: Images keep a common size only below this one. Larger photographs of one size were mostly resized
#: for another network.
_SMALL = 100


class ImageFiles(ImageDataset):
    """Images that are decoded from files.

    Args:
        listing: List of the files.
        preprocessing: Preparation of every image.
    """

    augmentation = Augmentation()
    from_files = True

    def __init__(self, listing: Listing, preprocessing: Preprocessing) -> None:
        self.listing = listing
        self.labels = listing.labels
        self.class_names = listing.classes
        self.num_classes = len(listing.classes)
        self.mean, self.std = preprocessing.mean, preprocessing.std
        self.image_size = preprocessing.image_size
        self.preprocessing = preprocessing

    def name(self, index: int) -> str:
        """Return the name of image ``index`` for messages."""
        raise NotImplementedError

    def open(self, index: int) -> IO[bytes]:
        """Open the encoded image ``index``."""
        raise NotImplementedError

    def pixels(self, index: int) -> Tensor:
        """Return uint8 ``[C, H, W]``."""
        with self.image(index) as image:
            return prepare_image(image, self.preprocessing)

    @override
    def pixels_without_margin(self, index: int) -> Tensor | None:
        with self.image(index) as image:
            without = self.preprocessing.without_margin
            with_size, without_size = (
                how.resized(image.height, image.width) for how in (self.preprocessing, without)
            )
            if with_size[0] <= image.height or with_size == without_size:
                return None
            return prepare_image(image, without)

    @property
    @override
    def stored_size(self) -> ImageSize | None:
        """Common size of a few images, if it is small; otherwise None."""
        sizes = set()
        for index in torch.linspace(0, len(self) - 1, min(_SIZED, len(self))).long().tolist():
            try:
                with self.image(index) as image:
                    sizes.add((image.height, image.width))
            except UnreadableImageError:
                continue  # reported when the image is used
        if len(sizes) != 1:
            return None
        ((height, width),) = sizes
        return to_image_size(height, width) if 8 <= min(height, width) < _SMALL else None

    @contextmanager
    def image(self, index: int) -> Iterator[Image.Image]:
        """Open image ``index``; any error becomes an `UnreadableImageError`."""
        name = self.name(index)
        try:
            with self.open(index) as file, Image.open(file) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would clip them
                    raise OSError(f"mode {image.mode}, more than 8 bits a channel")
                yield image
        except Exception as error:  # damaged files raise many types of errors
            reason = " ".join(str(error).split())[:200]
            raise UnreadableImageError(
                f"data: expected every file to be a readable image, got {name} ({reason})"
            ) from None


def prepare_image(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Convert, resize and crop ``image`` to uint8 ``[C, H, W]``, without normalisation."""
    transforms = import_torchvision().transforms
    functional = transforms.functional
    converted = image.convert(CHANNELS[preprocessing.channels])
    size = preprocessing.resized(image.height, image.width)
    if size != (image.height, image.width):
        interpolation = transforms.InterpolationMode(preprocessing.interpolation)
        converted = functional.resize(converted, list(size), interpolation)
    crop = list(height_and_width(preprocessing.image_size))
    pixels: Tensor = functional.pil_to_tensor(functional.center_crop(converted, crop))
    return pixels


class ImageFolder(ImageFiles):
    """Images in ``PATH/train/<class>/*`` and ``PATH/val/<class>/*`` (or ``test``).

    As for ImageNet, ``val`` is the test split. A further folder ``validation`` may hold images to
    choose settings. Calibration images come from ``train``. Image files are found by their
    extension, also in subfolders of a class. Hidden files and folders are skipped: names that
    begin with a dot, and ``__MACOSX`` and the like. Lists of 10 000 files or more are cached, see
    `listing`.

    The classes are the folders of ``train``, sorted by name. Another split may lack some of them.

    Args:
        path: Folder PATH.
        split: "train", "calibration", "validation" or "test".
        preprocessing: Preparation of every image.

    Raises:
        UsageError: If a folder is missing, has no image, or has a class that ``train`` lacks.
    """

    def __init__(self, path: Path, split: str, preprocessing: Preprocessing | None = None) -> None:
        self.folder = split_folder(path, split)
        listing = cached_listing(self.folder, lambda: _read_folder(self.folder))
        trained = _class_folders(path / "train")
        if trained and tuple(trained) != listing.classes:
            unknown = sorted(set(listing.classes) - set(trained))
            if unknown:
                more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
                raise UsageError(
                    f"data: expected {self.folder} to hold only the {len(trained)} classes of "
                    f"{path / 'train'}, got also {', '.join(unknown[:3])}{more}"
                )
            number = {name: label for label, name in enumerate(trained)}
            places = torch.tensor([number[name] for name in listing.classes])
            listing = replace(listing, classes=tuple(trained), labels=places[listing.labels])
        super().__init__(listing, preprocessing or Preprocessing())

    def name(self, index: int) -> str:
        """Return the path of the file."""
        return os.path.join(self.folder, self.listing.name(index))

    def open(self, index: int) -> IO[bytes]:
        """Read the file."""
        with open(self.name(index), "rb") as file:
            return io.BytesIO(file.read())


def _read_folder(folder: Path) -> Listing:
    """List every image below ``folder``, by class and then by name."""
    stamps = {str(folder.absolute()): stamp_of(folder)}
    classes = _class_folders(folder)
    if not classes:
        raise UsageError(
            f"data: expected {folder} to hold one folder of images per class, got no folder"
        )
    labels: list[int] = []
    names: list[str] = []
    for label, name in enumerate(
        track(classes, description=f"listing {folder}", transient=True, disable=len(classes) < 100)
    ):
        for place, files in _walk(str(folder / name)):
            stamps[os.path.abspath(place)] = stamp_of(place)
            here = os.path.relpath(place, folder)
            images = [file for file in files if file.lower().endswith(EXTENSIONS)]
            names += [os.path.join(here, file) for file in images]
            labels += [label] * len(images)
    if not names:
        raise UsageError(
            f"data: expected {folder} to hold one folder of images per class, got no image "
            f"({', '.join(EXTENSIONS)}) in its {len(classes)} folders"
        )
    return Listing.build(classes, labels, names, stamps=stamps)


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder from ``top`` down with its sorted file names, without hidden ones."""
    found = []
    for place, folders, files in os.walk(top, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        found.append((place, sorted(name for name in files if not is_hidden(name))))
    yield from sorted(found)


def _class_folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))


def split_folder(path: Path, split: str) -> Path:
    """Find the folder of ``split`` below ``path``.

    Raises:
        UsageError: If there is none.
    """
    if not path.is_dir():
        raise UsageError(f"data: expected the path to be a folder, got {path}, which is not one")
    names = _FOLDERS[split]
    for name in names:
        if (path / name).is_dir():
            return path / name
    raise UsageError(f"data: expected {path} to hold a folder {' or '.join(names)}, got none")
