"""The progress bar of all commands: progress, remaining time, and one number to watch."""

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
    """Return a bar whose tasks have a field ``shown``, a short text at its end.

    Only the first rank shows it.

    Args:
        transient: Whether the bar disappears at the end.
        shown: Whether to show the bar at all.
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
