"""Cached lists of many files, because listing a million files takes minutes.

A cached list is valid while the modification times of its folders, and the sizes and times of its
archives, are unchanged. A new or deleted file changes the time of its folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Listing", "cached_listing", "is_hidden", "stamp_of"]

#: The number changes with the rule for which files are listed.
_FORMAT = "fdda_ext.listing.2"
#: Folders that operating systems and network drives create.
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
#: Smallest list that is cached; a shorter one is read faster than its cache is checked.
CACHE_FROM = 10_000
#: A folder that changed less than this many seconds ago may change again without a new time.
_SETTLED_SECONDS = 2.0

_log = logging.getLogger("fdda_ext")


@dataclass
class Listing:
    """Names, classes and other properties of many files.

    The names are one block of bytes: a million strings would be copied into every worker process.

    Attributes:
        classes: Class names in the order of the labels.
        labels: Labels, int64 ``[n]``.
        names: All names, one after the other, uint8.
        ends: End of each name, int64 ``[n]``.
        numbers: Further tensors by name, int64 ``[n]``.
        stamps: Folders and archives of the list, see `stamp_of`.
    """

    classes: tuple[str, ...]
    labels: Tensor
    names: Tensor
    ends: Tensor
    numbers: dict[str, Tensor] = field(default_factory=dict)
    stamps: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def build(
        classes: Sequence[str],
        labels: Sequence[int],
        names: Sequence[str],
        numbers: dict[str, Sequence[int]] | None = None,
        stamps: dict[str, list[int]] | None = None,
    ) -> Listing:
        """Build a list from ordinary sequences."""
        encoded = [os.fsencode(name) for name in names]
        block = bytearray(b"".join(encoded))
        return Listing(
            tuple(classes),
            torch.tensor(labels, dtype=torch.int64),
            torch.frombuffer(block, dtype=torch.uint8) if block else torch.empty(0).byte(),
            torch.tensor([len(name) for name in encoded], dtype=torch.int64).cumsum(0),
            {k: torch.tensor(v, dtype=torch.int64) for k, v in (numbers or {}).items()},
            stamps or {},
        )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the name of file ``index``."""
        end = int(self.ends[index])  # first, because it raises IndexError at the end
        begin = int(self.ends[index - 1]) if index % len(self) else 0
        return os.fsdecode(self.names[begin:end].numpy().tobytes())


def is_hidden(name: str) -> bool:
    """Return whether ``name`` begins with a dot or is a folder of the operating system."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def stamp_of(path: str | Path) -> list[int]:
    """Return the modification time in nanoseconds, and the size, 0 for a folder."""
    status = os.stat(path)
    return [status.st_mtime_ns, 0 if os.path.isdir(path) else status.st_size]


def _cache_file(path: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]
    return Path(base) / "fdda_ext" / f"listing-{name}.safetensors"


def _read(file: Path) -> Listing | None:
    """Read the list in ``file``; None if it is missing, damaged or out of date."""
    try:
        with safe_open(str(file), framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            if metadata.get("format") != _FORMAT:
                return None
            stamps = json.loads(metadata["stamps"])
            if any(stamp_of(path) != stamp for path, stamp in stamps.items()):
                return None
            own = {"labels", "names", "ends"}
            listing = Listing(
                tuple(json.loads(metadata["classes"])),
                tensors.get_tensor("labels"),
                tensors.get_tensor("names"),
                tensors.get_tensor("ends"),
                {name: tensors.get_tensor(name) for name in tensors.keys() if name not in own},
                stamps,
            )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        return None
    whole = len(listing.ends) == len(listing) > 0 and int(listing.ends[-1]) == len(listing.names)
    return listing if whole else None


def cached_listing(path: Path, read: Callable[[], Listing]) -> Listing:
    """Return the cached list of ``path``, or read and cache it.

    Args:
        path: Folder that the list belongs to. The cache is below ``$XDG_CACHE_HOME`` or
            ``~/.cache``.
        read: Function that lists the files and names all it reads in ``stamps``.
    """
    file = _cache_file(path)
    listing = _read(file) if file.exists() else None
    if listing is not None:
        return listing
    begin = time.time()
    listing = read()
    newest = max((stamp[0] for stamp in listing.stamps.values()), default=0) / 1e9
    if len(listing) < CACHE_FROM or newest > begin - _SETTLED_SECONDS:
        return listing
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format": _FORMAT,
            "stamps": json.dumps(listing.stamps),
            "classes": json.dumps(listing.classes),
        }
        tensors = {"labels": listing.labels, "names": listing.names, "ends": listing.ends}
        save_file({**tensors, **listing.numbers}, str(temporary), metadata=metadata)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        _log.warning(
            "data: the list of %s could not be kept in the cache %s (%s)", path, file, error
        )
    return listing
