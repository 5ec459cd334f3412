"""One look for all progress bars: how far, how long still, and a number to watch."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as ProgressBar,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..distribution import is_first

__all__ = ["ProgressBar", "progress_bar"]


def progress_bar(*, transient: bool = False) -> ProgressBar:
    """A bar whose tasks have a field ``shown``, a short text at its end.

    Of several processes, the first alone shows it.
    """
    return ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        transient=transient,
        disable=not is_first(),
    )
