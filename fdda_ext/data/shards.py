"""``shards:PATH``: images in tar archives in the webdataset format.

An image and its label have the same name up to the first dot: ``key.jpg``, and ``key.cls`` with the
label as a decimal number. Archives are not unpacked. Their headers are read once, into a list of
the images' offsets, so that images can be read in any order.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import IO

from rich.progress import track

from ..errors import UsageError
from ..preprocessing import Preprocessing
from .folder import EXTENSIONS, ImageFiles, split_folder
from .listing import Listing, cached_listing, is_hidden, stamp_of

__all__ = ["Shards"]

#: Largest number of bytes in a label.
_LONGEST_LABEL = 20


class Shards(ImageFiles):
    """Images in ``PATH/train/*.tar`` and ``PATH/val/*.tar`` (or ``test``, ``validation``).

    Labels begin at 0. The training archives, if they exist, give the number of classes. Hidden
    archives and members are skipped, as in `ImageFolder`.

    Args:
        path: Folder PATH.
        split: "train", "calibration", "validation" or "test".
        preprocessing: Preparation of every image.

    Raises:
        UsageError: If a folder or its archives are missing, an archive is compressed or damaged,
            an image has no label, or a label is too large.
    """

    def __init__(self, path: Path, split: str, preprocessing: Preprocessing | None = None) -> None:
        self.folder = split_folder(path, split)
        listing = cached_listing(self.folder, lambda: _read_shards(self.folder))
        training = path / "train"
        if training.is_dir() and training != self.folder:
            classes = cached_listing(training, lambda: _read_shards(training)).classes
            if len(listing.classes) > len(classes):
                raise UsageError(
                    f"data: expected labels in {self.folder} below the {len(classes)} classes of "
                    f"{training}, got {len(listing.classes) - 1}"
                )
            listing.classes = classes
        super().__init__(listing, preprocessing or Preprocessing())
        self._archives = _archives(self.folder)

    def name(self, index: int) -> str:
        """Return archive and member."""
        archive = self._archives[int(self.listing.numbers["archive"][index])]
        return f"{archive}:{self.listing.name(index)}"

    def open(self, index: int) -> IO[bytes]:
        """Read the member from the archive."""
        archive, offset, size = (
            int(self.listing.numbers[name][index]) for name in ("archive", "offset", "size")
        )
        with self._archives[archive].open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


def _archives(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))


def _read_shards(folder: Path) -> Listing:
    archives = _archives(folder)
    if not archives:
        raise UsageError(f"data: expected {folder} to hold uncompressed .tar archives, got none")
    stamps = {str(folder.absolute()): stamp_of(folder)}
    labels: list[int] = []
    names: list[str] = []
    numbers: dict[str, list[int]] = {"archive": [], "offset": [], "size": []}
    for number, archive in enumerate(
        track(archives, description=f"listing {folder}", transient=True, disable=len(archives) < 10)
    ):
        stamps[str(archive.absolute())] = stamp_of(archive)
        for member, label in _read_archive(archive):
            labels.append(label)
            names.append(member.name)
            numbers["archive"].append(number)
            numbers["offset"].append(member.offset_data)
            numbers["size"].append(member.size)
    if not labels:
        raise UsageError(f"data: expected the archives in {folder} to hold images, got none")
    classes = [str(label) for label in range(max(labels) + 1)]
    return Listing.build(classes, labels, names, dict(numbers), stamps)


def _read_archive(path: Path) -> list[tuple[tarfile.TarInfo, int]]:
    """List the images of an archive with their labels, in stored order."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                place, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                key = os.path.join(place, stem)
                if not member.isreg() or member.issparse() or _is_hidden_member(member.name):
                    pass
                elif f".{extension.lower()}" in EXTENSIONS:
                    images[key] = member
                elif extension.lower() == "cls":
                    labels[key] = _label(archive, member, path)
                # The archive would keep all headers, which takes too much memory for a million.
                archive.members = []  # type: ignore[attr-defined]
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UsageError(
            f"data: expected every shard to be a whole, uncompressed tar archive, got {path} "
            f"({error})"
        ) from None
    unlabelled = images.keys() - labels.keys()
    if unlabelled:
        raise UsageError(
            f"data: expected a .cls member for every image, got none for {min(unlabelled)} "
            f"in {path}"
        )
    return [(member, labels[key]) for key, member in images.items()]


def _is_hidden_member(name: str) -> bool:
    """Whether a part of the path is hidden, apart from "." and ".."."""
    return any(is_hidden(part) for part in name.split("/") if part not in (".", ".."))


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = archive.extractfile(member)
    text = file.read(_LONGEST_LABEL).strip() if file is not None else b""
    if not text.isdigit():
        raise UsageError(
            f"data: expected {member.name} in {path} to hold a label (0 or above), got {text!r}"
        )
    return int(text)
