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


def progress_bar(*, transient: bool = False, shown: bool = True) -> ProgressBar:
    """A bar whose tasks have a field ``shown``, a short text at its end.

    Only the first of several processes shows it.

    Args:
        transient: Whether the bar vanishes in the end.
        shown: False for no bar at all.
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
        disable=not (shown and is_first()),
    )
