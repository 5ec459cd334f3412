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

#: Folders that may hold a split, the first that exists counts.
_FOLDERS = {
    "train": ("train",),
    "calibration": ("train",),
    "validation": ("validation",),
    "test": ("val", "test"),
}
#: Of files that are taken for images.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


#: So many images, spread over a set, tell whether all have one size.
_SIZED = 16
#: Only small images are taken as they are for their common size: photographs of one size were
#: mostly made so for a larger network.
_SMALL = 100


class ImageFiles(ImageDataset):
    """Images that are decoded from files, all prepared in the same way.

    Args:
        listing: The files.
        preprocessing: How every image is prepared.
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
        """Name of image ``index``, for people."""
        raise NotImplementedError

    def open(self, index: int) -> IO[bytes]:
        """The bytes of image ``index``."""
        raise NotImplementedError

    def pixels(self, index: int) -> Tensor:
        """uint8 ``[C, H, W]``."""
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
        """The size that some images have, if all of these have the same, and it is a small one."""
        sizes = set()
        for index in torch.linspace(0, len(self) - 1, min(_SIZED, len(self))).long().tolist():
            try:
                with self.image(index) as image:
                    sizes.add((image.height, image.width))
            except UnreadableImageError:
                continue  # whoever needs the image counts and names it
        if len(sizes) != 1:
            return None
        ((height, width),) = sizes
        return to_image_size(height, width) if 8 <= min(height, width) < _SMALL else None

    @contextmanager
    def image(self, index: int) -> Iterator[Image.Image]:
        """Image ``index``, and the refusal of whatever is wrong with it."""
        name = self.name(index)
        try:
            with self.open(index) as file, Image.open(file) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would silently clip them to white
                    raise OSError(f"mode {image.mode}, more than 8 bits a channel")
                yield image
        except Exception as error:  # damage makes the decoders stumble in a dozen ways
            reason = " ".join(str(error).split())[:200]
            raise UnreadableImageError(
                f"data: expected every file to be a readable image, got {name} ({reason})"
            ) from None


def prepare_image(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Convert, resize and crop ``image``: uint8 ``[C, H, W]``, not normalised."""
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
    """``PATH/train/<class>/*`` and ``PATH/val/<class>/*`` (or ``test``).

    ``val`` is what accuracies are reported on, as ImageNet's is; a folder ``validation`` besides is
    for choosing settings. Calibration images come from the training folder. Files are found by
    their extension, also in folders below a class's. Hidden files and folders (a name that begins
    with a dot, ``__MACOSX`` and the like) are left out. The list of 10 000 files and more is kept
    in a cache, see `listing`.

    The folders of ``train`` are the classes, in the order of their names. Another split may lack
    some of them: its labels are those of the classes of the same names.

    Args:
        path: PATH.
        split: "train", "calibration", "validation" or "test".
        preprocessing: How every image is prepared.

    Raises:
        UsageError: If a folder is missing, holds no image, or a class that training lacks.
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
                    f"data: expected {self.folder} to hold some of the {len(trained)} classes of "
                    f"{path / 'train'}, got {', '.join(unknown[:3])}{more} besides"
                )
            number = {name: label for label, name in enumerate(trained)}
            places = torch.tensor([number[name] for name in listing.classes])
            listing = replace(listing, classes=tuple(trained), labels=places[listing.labels])
        super().__init__(listing, preprocessing or Preprocessing())

    def name(self, index: int) -> str:
        """Path of the file."""
        return os.path.join(self.folder, self.listing.name(index))

    def open(self, index: int) -> IO[bytes]:
        """The file."""
        with open(self.name(index), "rb") as file:
            return io.BytesIO(file.read())


def _read_folder(folder: Path) -> Listing:
    """Every image below ``folder``, by class and then by name."""
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
    """Every folder from ``top`` down, and the names of its files, sorted, without hidden ones."""
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
    """The folder of ``split`` below ``path``.

    Raises:
        UsageError: If there is none.
    """
    if not path.is_dir():
        raise UsageError(f"data: expected the path to be a folder, got {path}, which is none")
    names = _FOLDERS[split]
    for name in names:
        if (path / name).is_dir():
            return path / name
    raise UsageError(f"data: expected {path} to hold a folder {' or '.join(names)}, got none")
