"""Height and width of images, as users write them, as code takes them and as files store them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .errors import UsageError

__all__ = ["ImageSize", "height_and_width", "parse_image_size", "show_image_size", "to_image_size"]

#: One number for a square, otherwise height and width.
ImageSize = int | tuple[int, int]

_WRITTEN = re.compile(r"(\d+)\s*[xX×]\s*(\d+)")


def parse_image_size(value: Any, command: str = "data") -> ImageSize:
    """Read a size: ``32``, ``"32"``, ``"32x64"`` (height x width), ``[32, 64]`` or ``(32, 64)``.

    Args:
        value: What the user, or a stored file, gives.
        command: Named in errors.

    Returns:
        A number for a square, so that equal sizes are equal; otherwise (height, width).

    Raises:
        UsageError: If it is anything else.
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
    """The size of images ``[..., height, width]``."""
    return height if height == width else (height, width)


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Both, also of a square."""
    return (size, size) if isinstance(size, int) else size


def show_image_size(size: ImageSize) -> str:
    """For people: ``32x64``."""
    return "{}x{}".format(*height_and_width(size))
