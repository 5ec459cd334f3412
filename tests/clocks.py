"""Fake clocks that stand still or jump, for the package and its programs.

Python's own modules, torch and pytest keep the real clock, since some of them wait by it.
"""

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

KINDS = ("still", "jumping")
PROGRAMS = str(Path(__file__).parent.parent / "python")
_NAMES = ("monotonic", "perf_counter", "process_time", "time")
_HOUR = 3600.0


def _ours(frame) -> bool:
    """Return whether the caller is a module of the package or a program in python/."""
    name = frame.f_globals.get("__name__", "")
    return name.startswith("fdda_ext") or frame.f_code.co_filename.startswith(PROGRAMS)


def _fake(real: Callable[[], float], name: str, kind: str) -> Callable[[], float]:
    """Return a clock that stands still, or one that jumps whenever it is read.

    A jump is 0, a nanosecond, a millisecond or five hours. Only `time.time` may run backwards.
    """
    now, jumps = [real()], random.Random(name)

    def clock() -> float:
        if not _ours(sys._getframe(1)):
            return real()
        if kind == "jumping":
            jump = jumps.choice((0.0, 1e-9, 1e-3, 5 * _HOUR))
            backwards = name == "time" and jumps.random() < 0.5
            now[0] += -jump if backwards else jump
        return now[0]

    return clock


def install(kind: str) -> None:
    """Replace the clocks of this process; see `running`."""
    for name in _NAMES:
        setattr(time, name, _fake(getattr(time, name), name, kind))


@contextmanager
def running(kind: str, folder: Path) -> Iterator[None]:
    """Let the package read a fake clock, in this process and in those that it starts.

    Args:
        kind: One of `KINDS`.
        folder: Folder for a ``sitecustomize.py``, which installs the clock in other processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here = str(Path(__file__).parent)
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {here!r})\nimport clocks\nsys.path.pop(0)\n"
        f"clocks.install({kind!r})\n"
    )
    before = {name: getattr(time, name) for name in _NAMES}
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([path] if path else [])])
    install(kind)
    try:
        yield
    finally:
        for name, clock in before.items():
            setattr(time, name, clock)
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
