"""Time of an iteration by stage."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.table import Table

from .duration import format_duration, format_significant

__all__ = ["Profile", "is_profiling", "profile", "stage"]


class Profile:
    """Seconds of stages and iterations.

    Attributes:
        seconds: Seconds of each stage over all iterations, in order of appearance.
        iterations: Seconds of each iteration.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.iterations: list[float] = []

    def now(self) -> float:
        """Wait for all submitted work, and return the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def table(self) -> Table:
        """Return a table of the time and share of every stage in the mean iteration."""
        count, total = len(self.iterations), sum(self.iterations)
        table = Table(title=f"mean of {count} iterations: {format_duration(total / count)}")
        table.add_column("stage")
        table.add_column("ms", justify="right")
        table.add_column("%", justify="right")
        rest = max(round(total - sum(self.seconds.values()), 9), 0.0)
        for name, seconds in [*self.seconds.items(), ("anything else", rest)]:
            share = f"{100 * seconds / total:.1f}" if total else ""  # too short for the clock
            table.add_row(name, format_significant(1e3 * seconds / count), share)
        return table


_active: Profile | None = None


def is_profiling() -> bool:
    """Return whether stages are being measured."""
    return _active is not None


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name a stage for `profile`. Stages do not nest. Without a profile, this costs nothing."""
    if _active is None:
        yield
        return
    with torch.profiler.record_function(name):
        begin = _active.now()
        yield
        _active.seconds[name] += _active.now() - begin


@contextmanager
def profile(device: torch.device, trace: Path | None = None) -> Iterator[Profile]:
    """Measure the stages that run inside. The caller adds to `Profile.iterations`.

    On a GPU every stage waits for its work, so that it is not counted in the next stage.

    Args:
        device: Device of the work.
        trace: File for a trace in Chrome's format, for chrome://tracing or Perfetto.
    """
    global _active
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    _active = Profile(device)
    try:
        if trace is None:
            yield _active
        else:
            with torch.profiler.profile(activities=activities) as recorded:
                yield _active
            recorded.export_chrome_trace(str(trace))
    finally:
        _active = None
