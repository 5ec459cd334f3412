"""Memory that does not suffice, answered by the setting to lower."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import UsageError

__all__ = ["is_out_of_memory", "keep_freed_memory", "must_fit", "peak_memory"]

#: Names that glibc's malloc.h gives to what mallopt sets.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, torch on a CPU, or Python itself could not get the memory it asked for."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate" in str(error)
    )


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, to be used again.

    By default glibc gives the memory of every large tensor back, and the kernel clears each page
    again for the next: over a third of the time of a training iteration at 224x224 on a CPU.
    Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


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


@contextmanager
def must_fit(**settings: int) -> Iterator[None]:
    """Say which of ``settings`` to lower, and to what, where the memory does not suffice.

    Half is proposed: the request that failed tells how much was missing then, not how much would
    have been asked for afterwards.

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
        larger = {name.replace("__", "."): size for name, size in settings.items() if size > 1}
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        now = " and ".join(f"{name} {size}" for name, size in larger.items())
        half = " and ".join(f"{name} from {size} to {size // 2}" for name, size in larger.items())
        advice = f"lower {half}" if larger else "lower image_size, or take a smaller model"
        raise UsageError(
            f"memory: expected {now or 'a single image'} to fit the memory, got {reason}; {advice}"
        ) from None
