"""Formatting of durations, and a stopwatch."""

from __future__ import annotations

import math
import time

__all__ = ["Stopwatch", "format_duration", "format_significant"]

#: Units below an hour: name, length in seconds, and how many make the next unit.
_UNITS = (
    ("ns", 1e-9, 1000.0),
    ("µs", 1e-6, 1000.0),
    ("ms", 1e-3, 1000.0),
    ("s", 1.0, 60.0),
    ("min", 60.0, 60.0),
)


def format_significant(value: float, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits and without an exponent.

    Args:
        value: Any number.
        digits: Number of digits. Numbers from 10 to the power of ``digits`` are rounded to
            integers.

    Returns:
        "0.00400" for 0.004, "12.3" for 12.34, "1234" for 1234.5 and "0" for 0.
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits}g}")  # 9.999 has one digit before the point, 10.0 has two
    exponent = math.floor(math.log10(abs(rounded)))
    return f"{value:.{max(digits - 1 - exponent, 0)}f}"


def format_duration(seconds: float) -> str:
    """Format a duration in a suitable unit, with three significant digits.

    A duration above zero is never printed as zero.

    Args:
        seconds: The duration, at least 0.

    Returns:
        For example "0 s", "4.00 ms", "59.9 s", "1.50 h".
    """
    if seconds == 0 or not math.isfinite(seconds):
        return f"{seconds:g} s"
    for name, length, most in _UNITS:
        printed = float(f"{seconds / length:.3g}")
        if printed < most:
            return f"{format_significant(seconds / length)} {name}"
        if printed == most:  # 59.99 s become one minute
            seconds = most * length
    return f"{format_significant(seconds / 3600)} h"


class Stopwatch:
    """Counts seconds, except during pauses. The count never decreases, even after rounding.

    Args:
        seconds: Seconds counted before.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._total = seconds
        self._since: float | None = time.monotonic()

    @property
    def seconds(self) -> float:
        """All seconds so far, without pauses."""
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return self._total + running

    def pause(self) -> None:
        """Stop until `resume`."""
        self._total, self._since = self.seconds, None

    def resume(self) -> None:
        """Continue after `pause`."""
        self._since = time.monotonic()
