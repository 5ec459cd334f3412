"""``folder:PATH`` and ``imagenet:PATH``: images in one folder per class."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from PIL import Image
from rich.progress import track
from torch import Tensor

from .._torchvision import import_torchvision
from ..errors import UnreadableImageError, UsageError
from ..preprocessing import Preprocessing
from .augmentation import Augmentation
from .dataset import ImageDataset
from .listing import Listing, cached_listing, stamp_of

__all__ = ["EXTENSIONS", "ImageFiles", "ImageFolder", "split_folder"]

#: Folders that may hold a split, the first that exists counts.
_FOLDERS = {
    "train": ("train",),
    "calibration": ("train",),
    "validation": ("validation",),
    "test": ("val", "test"),
}
#: Of files that are taken for images.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ImageFiles(ImageDataset):
    """Images that are decoded from files, all prepared in the same way.

    Args:
        listing: The files.
        preprocessing: Of every image.
    """

    augmentation = Augmentation()
    from_files = True

    def __init__(self, listing: Listing, preprocessing: Preprocessing) -> None:
        transforms = import_torchvision().transforms
        self.listing = listing
        self.labels = listing.labels
        self.class_names = listing.classes
        self.num_classes = len(listing.classes)
        self.mean, self.std = preprocessing.mean, preprocessing.std
        self.image_size = preprocessing.image_size
        self._transform = transforms.Compose(
            [
                transforms.Resize(
                    preprocessing.resize, transforms.InterpolationMode(preprocessing.interpolation)
                ),
                transforms.CenterCrop(preprocessing.image_size),
                transforms.PILToTensor(),
            ]
        )

    def name(self, index: int) -> str:
        """Of image ``index``, for people."""
        raise NotImplementedError

    def open(self, index: int) -> IO[bytes]:
        """The bytes of image ``index``."""
        raise NotImplementedError

    def pixels(self, index: int) -> Tensor:
        """uint8 ``[3, H, W]``."""
        name = self.name(index)
        try:
            with self.open(index) as file, Image.open(file) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would silently clip them to white
                    raise OSError(f"mode {image.mode}, more than 8 bits a colour")
                return self._transform(image.convert("RGB"))
        except Exception as error:  # damage makes the decoders stumble in a dozen ways
            reason = " ".join(str(error).split())[:200]
            raise UnreadableImageError(
                f"data: expected every file to be a readable image, got {name} ({reason})"
            ) from None


class ImageFolder(ImageFiles):
    """``PATH/train/<class>/*`` and ``PATH/val/<class>/*`` (or ``test``).

    ``val`` is what accuracies are reported on, as ImageNet's is; a folder ``validation`` besides is
    for choosing settings. Calibration images come from the training folder. Files are found by
    their extension, also in folders below a class's. The list of 10 000 files and more is kept in
    a cache, see `listing`.

    Args:
        path: PATH.
        split: "train", "calibration", "validation" or "test".
        preprocessing: Of every image.

    Raises:
        UsageError: If a folder is missing, holds no class or other classes than training has, or a
            class holds no image.
    """

    def __init__(self, path: Path, split: str, preprocessing: Preprocessing | None = None) -> None:
        self.folder = split_folder(path, split)
        listing = cached_listing(self.folder, lambda: _read_folder(self.folder))
        super().__init__(listing, preprocessing or Preprocessing())
        trained = _class_folders(path / "train")
        if trained and set(trained) != set(self.class_names):
            raise UsageError(
                f"data: expected {self.folder} to hold the {len(trained)} classes of "
                f"{path / 'train'}, got {self.num_classes}, "
                f"{_difference(trained, self.class_names)}"
            )

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
    labels: list[int] = []
    names: list[str] = []
    for label, name in enumerate(
        track(classes, description=f"listing {folder}", transient=True, disable=len(classes) < 100)
    ):
        before = len(names)
        top = str(folder / name)
        for place, _, files in sorted(os.walk(top, followlinks=True)):
            stamps[os.path.abspath(place)] = stamp_of(place)
            here = os.path.relpath(place, folder)
            names += [
                os.path.join(here, file)
                for file in sorted(files)
                if file.lower().endswith(EXTENSIONS)
            ]
        if len(names) == before:
            raise UsageError(
                f"data: expected {folder} to hold one folder of images per class, got none "
                f"({', '.join(EXTENSIONS)}) in {name}"
            )
        labels += [label] * (len(names) - before)
    if not classes:
        raise UsageError(
            f"data: expected {folder} to hold one folder of images per class, got no folder"
        )
    return Listing.build(classes, labels, names, stamps=stamps)


def _class_folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _difference(wanted: Sequence[str], got: Sequence[str]) -> str:
    """In words, a class that only one of two sets has."""
    lost = sorted(set(wanted) - set(got))
    return f"without {lost[0]}" if lost else f"with {min(set(got) - set(wanted))} besides"


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
