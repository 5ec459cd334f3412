"""``folder:PATH`` and ``imagenet:PATH``: images in one folder per class, through torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .._torchvision import import_torchvision
from ..errors import UsageError
from .augmentation import Augmentation
from .dataset import ImageDataset

__all__ = ["ImageFolder"]

#: Folders that may hold a split, the first that exists counts.
_FOLDERS = {
    "train": ("train",),
    "calibration": ("train",),
    "validation": ("validation",),
    "test": ("val", "test"),
}


class ImageFolder(ImageDataset):
    """``PATH/train/<class>/*`` and ``PATH/val/<class>/*`` (or ``test``), ImageNet's normalisation.

    ``val`` is what accuracies are reported on, as ImageNet's is; a folder ``validation`` besides is
    for choosing settings.

    Images are resized to 8/7 of ``image_size`` (256 for 224) and cut from the middle. Calibration
    images come from the training folder. Files are found by their extension (torchvision's list,
    which has no .gif).

    Args:
        path: PATH.
        split: "train", "calibration", "validation" or "test".
        image_size: Height and width.

    Raises:
        UsageError: If a folder is missing, holds no class or other classes than training has, or a
            class holds no image.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    augmentation = Augmentation()

    def __init__(self, path: Path, split: str, image_size: int = 224) -> None:
        torchvision = import_torchvision()
        folder = _split_folder(path, split)
        transforms = torchvision.transforms
        transform = transforms.Compose(
            [
                transforms.Resize(round(image_size * 8 / 7)),
                transforms.CenterCrop(image_size),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
            ]
        )
        try:
            self.folder = torchvision.datasets.ImageFolder(str(folder), transform, loader=_load)
        except FileNotFoundError as error:  # no class folder, or a class without an image
            raise UsageError(
                f"data: expected {folder} to hold one folder of images per class, got: "
                f"{' '.join(str(error).split())}"
            ) from None
        self.image_size = image_size
        self.class_names = tuple(self.folder.classes)
        self.num_classes = len(self.class_names)
        trained = _class_folders(path / "train")
        if trained and set(trained) != set(self.class_names):
            raise UsageError(
                f"data: expected {folder} to hold the {len(trained)} classes of {path / 'train'}, "
                f"got {self.num_classes}, {_difference(trained, self.class_names)}"
            )
        self.labels = torch.tensor(self.folder.targets, dtype=torch.int64)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Normalised float32 ``[3, H, W]`` and the class."""
        try:
            image, label = self.folder[index]
        except (OSError, Image.DecompressionBombError) as error:
            raise UsageError(
                f"data: expected every file to be a readable image, got "
                f"{self.folder.samples[index][0]} ({error})"
            ) from None
        return image, int(label)


def _load(path: str) -> Image.Image:
    """One image in RGB; Pillow would silently clip more than 8 bits to white."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise OSError(f"mode {image.mode}, more than 8 bits a colour")
        return image.convert("RGB")


def _class_folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def _difference(wanted: Sequence[str], got: Sequence[str]) -> str:
    """In words, a class that only one of two sets has."""
    lost = sorted(set(wanted) - set(got))
    return f"without {lost[0]}" if lost else f"with {min(set(got) - set(wanted))} besides"


def _split_folder(path: Path, split: str) -> Path:
    if not path.is_dir():
        raise UsageError(f"data: expected the path to be a folder, got {path}, which is none")
    names = _FOLDERS[split]
    for name in names:
        if (path / name).is_dir():
            return path / name
    raise UsageError(f"data: expected {path} to hold a folder {' or '.join(names)}, got none")
