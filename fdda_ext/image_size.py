"""Height and width of images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .errors import UsageError

__all__ = ["ImageSize", "height_and_width", "parse_image_size", "show_image_size", "to_image_size"]

#: One number for a square, otherwise (height, width).
ImageSize = int | tuple[int, int]

_WRITTEN = re.compile(r"(\d+)\s*[xX×]\s*(\d+)")


def parse_image_size(value: Any, command: str = "data") -> ImageSize:
    """Read a size: ``32``, ``"32"``, ``"32x64"`` (height x width), ``[32, 64]`` or ``(32, 64)``.

    Args:
        value: Size from the user or from a stored file.
        command: Name at the beginning of errors.

    Returns:
        One number for a square, otherwise (height, width). Equal sizes compare equal.

    Raises:
        UsageError: If ``value`` has another form.
    """
    numbers: Sequence[Any] = ()
    if isinstance(value, str):
        text = value.strip().strip("[]()").replace(",", "x")
        written = _WRITTEN.fullmatch(text.replace(" ", ""))
        numbers = [int(n) for n in written.groups()] if written else []
        if text.strip().isdigit():
            numbers = [int(text)]
    elif isinstance(value, Sequence):
        numbers = value
    elif isinstance(value, int):
        numbers = [value]
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if len(numbers) not in (1, 2) or not whole:
        raise UsageError(
            f"{command}: expected image_size to be a number or HEIGHTxWIDTH, such as 32 or 32x64, "
            f"got {value}"
        )
    return to_image_size(numbers[0], numbers[-1])


def to_image_size(height: int, width: int) -> ImageSize:
    """Return the size of images ``[..., height, width]``."""
    return height if height == width else (height, width)


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Return (height, width), also for a square."""
    return (size, size) if isinstance(size, int) else size


def show_image_size(size: ImageSize) -> str:
    """Format a size for people, such as ``32x64``."""
    return "{}x{}".format(*height_and_width(size))
