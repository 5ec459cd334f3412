"""Memory that does not suffice, answered by the setting to lower."""

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

#: Names that glibc's malloc.h gives to what mallopt sets.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
#: glibc's own number of blocks that lie outside its heap; bytes of the smallest of them.
_MMAP_MAX, _LARGE = 65536, 32 << 20
#: Whether `keep_freed_memory` was called.
_kept = False
#: Pixels that pass a network together on a CPU: 16 images of 224x224, 784 of 32x32.
_PIXELS_AT_ONCE = 16 * 224**2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, torch on a CPU, or Python itself could not get the memory it asked for."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate" in str(error)
    )


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, to be used again.

    By default glibc gives the memory of every large tensor back, and the kernel clears each page
    again for the next: over a third of the time of a training iteration at 224x224 on a CPU.
    """
    global _kept
    _kept = True
    _mallopt(_M_MMAP_MAX, 0)
    _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Inside, the memory of a large tensor goes back when it is freed, as glibc has it by default.

    Blocks that are kept come to lie between others, so a step that holds many large tensors takes
    more than they have bytes. Afterwards freed memory is kept again, see `keep_freed_memory`.
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
    """Set a parameter of glibc's allocator; other C libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(parameter, value)


def release_freed_memory() -> None:
    """Give back, once, what `keep_freed_memory` kept, when another phase begins."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def parts_of(images: int, pixels: int, device: torch.device) -> int:
    """Into how many parts to divide a batch where that changes no result but the order of sums.

    On a CPU a part has 16 images of 224x224, or as many as have its pixels: larger ones are not
    faster there. On a GPU they are, and the batch stays whole.

    Args:
        images: In the batch.
        pixels: Of each.
        device: Where they are.
    """
    if device.type != "cpu":
        return 1
    return -(-images // max(_PIXELS_AT_ONCE // pixels, 1))


def process_memory(device: torch.device) -> int:
    """Bytes that the process has now: on a GPU what torch keeps there, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory(device) << 20


def peak_memory(device: torch.device) -> int:
    """The most memory that was in use at a time so far, MiB: on a GPU torch's, else the process's.

    On a GPU with what torch keeps for itself, as a CUDA graph's memory lies there between replays.

    Linux hands the peak that getrusage knows on to programs a process starts; /proc has their own.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) >> 20
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside the context and still alive.

    Temporary memory within an operator is not seen, nor is what an allocator keeps beside it.

    Attributes:
        now: Bytes alive.
        peak: The most that were alive at a time.
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
    """Bytes that this process can still get: on a GPU of it, else of the machine.

    A limit of its control group counts, such as a container has. None where it cannot be told.
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
    """Say which of ``settings`` to lower, and to what, where the memory does not suffice.

    The first that is above 1 is named: callers put the one that helps most, or costs least, first.
    Half of it is proposed: the request that failed tells how much was missing then, not how much
    would have been asked for afterwards.

    Args:
        settings: Sizes that the memory needed inside grows with; two underscores stand for a dot.

    Raises:
        UsageError: In place of the error of torch or Python.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        larger = [(name.replace("__", "."), size) for name, size in settings.items() if size > 1]
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        now, advice = "a single image", "lower image_size, or take a smaller model"
        if larger:
            name, size = larger[0]
            now, advice = f"{name} {size}", f"lower {name} from {size} to {size // 2}"
        raise UsageError(
            f"memory: expected {now} to fit the memory, got {reason}; {advice}"
        ) from None
