"""Ctrl-C that takes effect between two iterations."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["held_interrupt"]


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C, so that the loop inside can end after a whole iteration.

    A second Ctrl-C raises KeyboardInterrupt. Nothing is held back outside the main thread, which
    alone receives signals, or if the program has its own handler.

    Yields:
        A function that tells whether Ctrl-C was pressed.
    """
    pressed = False
    usual = signal.getsignal(signal.SIGINT)
    if (
        threading.current_thread() is not threading.main_thread()
        or usual is not signal.default_int_handler
    ):
        yield lambda: False
        return

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, usual)
