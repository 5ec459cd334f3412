"""Measurement and limits of memory, and settings of its allocator."""

from __future__ import annotations

import ctypes
import os
import resource
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..errors import UsageError

__all__ = [
    "LiveTensors",
    "free_memory",
    "is_out_of_memory",
    "keep_freed_memory",
    "large_blocks_returned",
    "must_fit",
    "parts_of",
    "peak_memory",
    "process_memory",
    "release_freed_memory",
]

#: Parameters of mallopt, as in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
#: glibc's default limit of blocks outside its heap, and the smallest size of these, in bytes.
_MMAP_MAX, _LARGE = 65536, 32 << 20
#: Whether `keep_freed_memory` was called.
_kept = False
#: Pixels that pass through a network together on a CPU: 16 images of 224x224, 784 of 32x32.
_PIXELS_AT_ONCE = 16 * 224**2


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU, torch on a CPU, or Python failed to allocate memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate" in str(error)
    )


def keep_freed_memory() -> None:
    """Keep freed memory in the process for later use.

    By default, glibc returns the memory of every large tensor to Linux, which clears each page for
    the next one. This takes over a third of a training iteration at 224x224.
    """
    global _kept
    _kept = True
    _mallopt(_M_MMAP_MAX, 0)
    _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Inside, return the memory of freed large tensors to Linux, as glibc does by default.

    Kept blocks fragment the heap, which costs memory in a step with many large tensors. Afterwards
    freed memory is kept again. See `keep_freed_memory`.
    """
    if not _kept:
        yield
        return
    _mallopt(_M_MMAP_MAX, _MMAP_MAX)
    _mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        keep_freed_memory()


def _mallopt(parameter: int, value: int) -> None:
    """Set a parameter of glibc's allocator. With other C libraries, do nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(parameter, value)


def release_freed_memory() -> None:
    """Return to Linux, once, the memory that `keep_freed_memory` kept."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def parts_of(images: int, pixels: int, device: torch.device) -> int:
    """Return into how many parts to divide a batch. This changes only the order of sums.

    On a CPU, a part has the pixels of 16 images of 224x224, because larger parts are not faster. On
    a GPU they are, and the batch stays whole.

    Args:
        images: Number of images in the batch.
        pixels: Number of pixels of each image.
        device: Device of the images.
    """
    if device.type != "cpu":
        return 1
    return -(-images // max(_PIXELS_AT_ONCE // pixels, 1))


def process_memory(device: torch.device) -> int:
    """Return the bytes that this process holds: on a GPU torch's, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory(device) << 20


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far, in MiB: on a GPU that of torch, else that of the process.

    On a GPU, all reserved memory counts, because that of CUDA graphs is part of it. On Linux the
    value is from /proc, because child processes inherit the peak of getrusage.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) >> 20
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all live tensors that were created inside the context.

    Temporary memory within operators and freed memory do not count.

    Attributes:
        now: Bytes of live tensors.
        peak: Largest value of ``now`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)
        }
        for x in tree_iter(result):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def forget(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still get, on the GPU or the machine.

    The limit of a container counts. None if the number is unknown.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    found = {line.split(":")[0]: line.split()[1] for line in table.read_text().splitlines()}
    free = int(found["MemAvailable"]) << 10
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        group = Path("/sys/fs/cgroup")
        try:
            free = min(free, int((group / limit).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return max(free, 0)


@contextmanager
def must_fit(**settings: int) -> Iterator[None]:
    """Say which of ``settings`` to lower, and to what, if the memory inside does not suffice.

    The error names the first setting above 1, so callers begin with the best one to lower. It
    proposes half of the value, because the failed request does not tell what later requests would
    need.

    Args:
        settings: Sizes that the memory use grows with. Two underscores stand for a dot.

    Raises:
        UsageError: Instead of torch's or Python's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        larger = [(name.replace("__", "."), size) for name, size in settings.items() if size > 1]
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        now, advice = "a single image", "lower image_size, or use a smaller model"
        if larger:
            name, size = larger[0]
            now, advice = f"{name} {size}", f"lower {name} from {size} to {size // 2}"
        raise UsageError(
            f"memory: expected {now} to fit in memory, got {reason}; {advice}"
        ) from None
