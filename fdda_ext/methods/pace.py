"""How much of a method's schedule fits into the time there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError
from .base import Method, Problem

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["fitting_share"]

#: The share of the schedule that the first trial runs.
_FIRST_SHARE = 1 / 256
#: The share of the time that trials may take.
_TRIAL_SHARE = 0.1


def fitting_share(
    build: Callable[[MethodSettings], Method],
    problem: Problem,
    settings: MethodSettings,
    seconds: float,
    *,
    now: Callable[[], float] = time.perf_counter,
) -> float:
    """Find the share of its schedule that a method can run in ``seconds``, trials included.

    Short trials are run, each of a longer schedule than the one before, until the whole schedule is
    seen to fit, or another trial would make them longer than a tenth of the time.

    Args:
        build: Builds the method with the settings of a schedule.
        problem: What it is built for.
        settings: Of the whole schedule.
        seconds: Time for everything.
        now: The clock, in seconds.

    Returns:
        A share above 0 and at most 1.

    Raises:
        UsageError: If the time is over before the first iteration.
    """

    def clock() -> float:
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        return now()

    begin = clock()
    limit = _TRIAL_SHARE * seconds
    share = _FIRST_SHARE
    shorter: tuple[float, float] | None = None  # share and seconds of the trial before
    while True:
        start = clock()
        method = build(settings.scaled(share))
        if method.iterations == 0:
            return 1.0
        built = end = clock()
        done = 0
        while done < method.iterations and (done < 2 or end - begin < limit):
            method.step(done)
            done, end = done + 1, clock()
        fixed, steps = built - start, (end - built) / done * method.iterations
        whole = steps / share
        if shorter is not None and fixed + steps > shorter[1]:
            # Two trials also tell what iterations take that is the same for any schedule.
            whole = (fixed + steps - shorter[1]) / (share - shorter[0])
            fixed = max(fixed + steps - whole * share, 0.0)
        left = seconds - (end - begin) - fixed
        if left <= 0:
            raise UsageError(
                f"quantize: expected minutes above the {(seconds - left) / 60:.2g} that the method "
                f"takes here to begin and to be timed, got {seconds / 60:.2g}"
            )
        if whole <= left:
            return 1.0
        # A schedule of few iterations is rounded up to them, and says little of a longer one.
        growth = 4 if method.iterations >= 8 else 16
        if share == 1 or end - begin + built - start + growth * steps > limit:
            return float(f"{left / whole:.3g}")
        shorter = (share, built - start + steps)
        share = min(growth * share, 1.0)
