"""``cifar10:PATH`` and others: data sets of torchvision.

PATH is torchvision's ``root``. Files are downloaded only on request. Data sets without a training
and a test part are left out, and so are those that need packages beyond torchvision's requirements.

If a data set has no validation part, every tenth training image of each class is held out as
"validation" and is in no other split.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from .._torchvision import import_torchvision
from ..errors import UsageError
from ..image_size import ImageSize, to_image_size
from ..preprocessing import CHANNELS, Preprocessing
from .augmentation import Augmentation
from .folder import ImageFiles
from .listing import Listing

__all__ = ["PUBLISHED", "open_published"]

#: For signs and characters, which change their class when mirrored or cropped too much.
_SIGNS = Augmentation(crop_scale=(0.75, 1.0), crop_ratio=(0.85, 1.18), flip=False)
_PHOTOGRAPHS = Augmentation()
#: One of this many images of a class is held out.
_HELD_OUT = 10


@dataclass(frozen=True)
class _Set:
    """Description of a data set of torchvision.

    Attributes:
        name: Name of torchvision's Python class.
        train, test: Arguments of this class for training and test.
        validation: Arguments for validation; None to hold out training images.
        classes: Number of classes, if torchvision does not name them.
        augmentation: Random changes that keep the class.
    """

    name: str
    train: dict[str, Any] = field(default_factory=lambda: {"split": "train"})
    test: dict[str, Any] = field(default_factory=lambda: {"split": "test"})
    validation: dict[str, Any] | None = None
    classes: int | None = None
    augmentation: Augmentation = _PHOTOGRAPHS

    def arguments(self, split: str) -> dict[str, Any]:
        """Arguments for "train", "calibration", "validation" or "test"."""
        if split == "test":
            return self.test
        return self.train if split != "validation" or self.validation is None else self.validation


_TRAIN: dict[str, Any] = {"train": True}
_TEST: dict[str, Any] = {"train": False}
_VAL: dict[str, Any] = {"split": "val"}

#: Data sets by the name that ``--data`` takes.
PUBLISHED = {
    "cifar10": _Set("CIFAR10", _TRAIN, _TEST),
    "cifar100": _Set("CIFAR100", _TRAIN, _TEST),
    "mnist": _Set("MNIST", _TRAIN, _TEST, augmentation=_SIGNS),
    "fashion_mnist": _Set("FashionMNIST", _TRAIN, _TEST),
    "kmnist": _Set("KMNIST", _TRAIN, _TEST, augmentation=_SIGNS),
    "emnist": _Set(
        "EMNIST",
        {"split": "balanced", **_TRAIN},
        {"split": "balanced", **_TEST},
        augmentation=_SIGNS,
    ),
    "usps": _Set("USPS", _TRAIN, _TEST, classes=10, augmentation=_SIGNS),
    "svhn": _Set("SVHN", classes=10, augmentation=_SIGNS),
    "stl10": _Set("STL10"),
    "gtsrb": _Set("GTSRB", classes=43, augmentation=_SIGNS),
    "flowers102": _Set("Flowers102", validation=_VAL, classes=102),
    "food101": _Set("Food101"),
    "oxford_iiit_pet": _Set("OxfordIIITPet", {"split": "trainval"}),
    "dtd": _Set("DTD", validation=_VAL),
    "fgvc_aircraft": _Set("FGVCAircraft", validation=_VAL),
    "country211": _Set("Country211", validation={"split": "valid"}),
    "rendered_sst2": _Set("RenderedSST2", validation=_VAL, augmentation=_SIGNS),
    "stanford_cars": _Set("StanfordCars"),
    "imagenette": _Set("Imagenette", test=_VAL),
    "places365": _Set("Places365", {"split": "train-standard"}, _VAL),
}


def open_published(
    name: str,
    path: Path,
    split: str,
    *,
    preprocessing: Preprocessing | None = None,
    image_size: ImageSize | None = None,
    channels: int | None = None,
    download: bool = False,
) -> ImageFiles:
    """Open one of `PUBLISHED`.

    Args:
        name: Name in `PUBLISHED`.
        path: Folder PATH.
        split: "train", "calibration", "validation" or "test".
        preprocessing: Preparation of every image; None for that of ImageNet, but images of one
            size keep their size and channels.
        image_size: Size that overrides that of ``preprocessing``.
        channels: Channels that override those of ``preprocessing``.
        download: Whether to download missing files.

    Raises:
        UsageError: If the files are missing or damaged, or the download fails.
    """
    published = PUBLISHED[name]
    images: Tensor | list[str]
    labels: Sequence[int]
    if published.name.startswith("CIFAR"):
        images, labels, classes = _read_cifar(published.name, path, split == "test", download)
    else:
        images, labels, classes = _read(published, path, split, download)
    labels_ = torch.as_tensor(labels, dtype=torch.int64)
    if published.validation is None and split != "test":
        kept = _held_out(labels_) if split == "validation" else ~_held_out(labels_)
        labels_ = labels_[kept]
        if isinstance(images, Tensor):
            images = images[kept]
        else:
            images = [images[i] for i in kept.nonzero().flatten().tolist()]
    if not isinstance(images, Tensor):
        how = (preprocessing or Preprocessing()).for_size(image_size)
        how = how.for_channels(channels or how.channels)
        listing = Listing.build(classes, labels_.tolist(), images)
        return _PublishedFiles(listing, how, published.augmentation)
    own_size = to_image_size(*images.shape[1:3])
    own = Preprocessing().for_channels(images.shape[3]).for_size(own_size)
    how = (preprocessing or own).for_size(image_size)
    how = how.for_channels(channels or how.channels)
    listing = Listing.build(classes, labels_.tolist(), [])
    return _PublishedArrays(name, images, listing, how, published.augmentation)


class _PublishedFiles(ImageFiles):
    def __init__(
        self, listing: Listing, preprocessing: Preprocessing, augmentation: Augmentation
    ) -> None:
        super().__init__(listing, preprocessing)
        self.augmentation = augmentation

    @override
    def name(self, index: int) -> str:
        return self.listing.name(index)

    @override
    def open(self, index: int) -> IO[bytes]:
        return Path(self.name(index)).open("rb")


class _PublishedArrays(ImageFiles):
    """Images in memory, uint8 ``[n, H, W, 1 or 3]``."""

    from_files = False

    def __init__(
        self,
        source: str,
        images: Tensor,
        listing: Listing,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
    ) -> None:
        super().__init__(listing, preprocessing)
        self.augmentation = augmentation
        self._source = source
        self._images = images

    @override
    def name(self, index: int) -> str:
        return f"image {index} of {self._source}"

    @property
    @override
    def stored_size(self) -> ImageSize | None:
        return to_image_size(*self._images.shape[1:3])

    @override
    @contextmanager
    def image(self, index: int) -> Iterator[Image.Image]:
        pixels = self._images[index]
        array = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        yield Image.fromarray(array.numpy(), CHANNELS[pixels.shape[-1]])


def _held_out(labels: Tensor) -> Tensor:
    """Mark every tenth image of each class, bool ``[n]``."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        held[own[_HELD_OUT - 1 :: _HELD_OUT]] = True
    return held


def _read(
    published: _Set, path: Path, split: str, download: bool
) -> tuple[Tensor | list[str], Sequence[int], list[str]]:
    """Read images, labels and class names with torchvision."""
    build = getattr(import_torchvision().datasets, published.name)
    try:
        if download:
            path.mkdir(parents=True, exist_ok=True)
        source = build(path, download=download, **published.arguments(split))
    except Exception as error:  # torchvision reports missing files by many types of errors
        raise _unusable(published.name, path, error, download) from None
    classes = getattr(source, "classes", None) or range(published.classes or 0)
    names = [name[0] if isinstance(name, tuple) else str(name) for name in classes]
    if hasattr(source, "data"):
        images = torch.as_tensor(source.data)
        if images.dim() == 3:
            images = images[..., None]
        elif images.shape[1] == 3:
            images = images.permute(0, 2, 3, 1).contiguous()
        labels = source.targets if hasattr(source, "targets") else source.labels
        return images, torch.as_tensor(labels).tolist(), names
    for attribute in ("_samples", "samples", "imgs"):
        if hasattr(source, attribute):
            pairs = getattr(source, attribute)
            return [str(file) for file, _ in pairs], [int(label) for _, label in pairs], names
    files = source._images if hasattr(source, "_images") else source._image_files
    return [str(file) for file in files], [int(label) for label in source._labels], names


def _unusable(name: str, path: Path, error: Exception, download: bool) -> UsageError:
    reason = " ".join(str(error).split())[:200]
    advice = (
        "the download may have been cut off or moved"
        if download
        else "download them with --download"
    )
    return UsageError(
        f"data: expected {path} to hold the files of {name} as torchvision keeps them, "
        f"got {type(error).__name__} ({reason}); {advice}"
    )


# ---- CIFAR, which is published as pickles -------------------------------------------------------


def _read_cifar(
    name: str, path: Path, is_test: bool, download: bool
) -> tuple[Tensor, list[int], list[str]]:
    """Read images uint8 ``[n, 32, 32, 3]``, labels and class names, without running their code."""
    torchvision = import_torchvision()
    published = getattr(torchvision.datasets, name)
    folder = path / published.base_folder
    if not folder.is_dir() and (path / published.meta["filename"]).is_file():
        folder = path
    if download and not folder.is_dir():
        try:
            path.mkdir(parents=True, exist_ok=True)
            torchvision.datasets.utils.download_and_extract_archive(
                published.url, str(path), filename=published.filename, md5=published.tgz_md5
            )
        except Exception as error:  # network, server or disk
            raise _unusable(name, path, error, download) from None
    files = [file for file, _ in (published.test_list if is_test else published.train_list)]
    key = "labels" if name == "CIFAR10" else "fine_labels"
    try:
        classes = [str(text) for text in _unpickle(folder / published.meta["filename"])[
            published.meta["key"]
        ]]  # fmt: skip
        images, labels = [], []
        for file in files:
            content = _unpickle(folder / file)
            own = content["data"].pixels()
            if len(own) != len(content[key]):
                raise ValueError(f"{len(own)} images with {len(content[key])} labels in {file}")
            images.append(own)
            labels += [int(label) for label in content[key]]
    except Exception as error:  # damaged files raise many types of errors
        raise _unusable(name, path, error, download) from None
    if labels and not 0 <= min(labels) <= max(labels) < len(classes):
        raise UsageError(f"data: expected labels below {len(classes)} in {folder}, got others")
    return torch.cat(images), labels, classes


class _Array:
    """Stand-in for a NumPy array in a pickle, which keeps the array's description."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.kind, self.is_fortran, raw = state
        self.raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)

    def pixels(self) -> Tensor:
        """Return uint8 ``[n, 32, 32, 3]``.

        Raises:
            ValueError: If shape or dtype differ.
        """
        shape = tuple(self.shape)
        whole = len(shape) == 2 and shape[1] == 3 * 32 * 32 and math.prod(shape) == len(self.raw)
        if not whole or self.is_fortran or self.kind.code not in ("u1", "uint8"):
            raise ValueError(f"an array of {self.kind.code}, {shape}")
        array = torch.from_numpy(np.frombuffer(self.raw, dtype=np.uint8).copy())
        return array.view(-1, 3, 32, 32).permute(0, 2, 3, 1).contiguous()


class _Kind:
    """Stand-in for a NumPy dtype."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass


def _new_array(*_: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return str(text).encode("latin1")


class _Harmless(pickle.Unpickler):
    """Unpickler for plain values and arrays; it rejects all other classes and functions."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")
        known = {
            ("numpy.core.multiarray", "_reconstruct"): _new_array,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Kind,
            ("_codecs", "encode"): _encode,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"the file needs {module}.{name}, which is not run")
        return known[module, name]


def _unpickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content = _Harmless(file, encoding="latin1").load()
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no dictionary")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in content.items()}
