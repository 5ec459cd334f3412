"""How long a method's schedule takes, told by short trials."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..engine import format_duration
from ..errors import UsageError
from .base import Method

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["TRIAL_SHARE", "Pace", "fitting_share", "measure_pace"]

#: The part of the available time that the trials of one method may take, all together.
TRIAL_SHARE = 0.1
#: Iterations of the first trial. Every other trial has four times as many as the one before.
_FIRST_TRIAL = 8
#: The share of the schedule that shows how many iterations a schedule has.
_FIRST_SHARE = 1 / 64


@dataclass(frozen=True)
class Pace:
    """What trials tell about a method on a network.

    Attributes:
        fixed: Seconds that a run takes whatever its schedule.
        whole: Seconds that the whole schedule takes besides.
        iterations: Iterations of the longest trial; 0 if the method does not train.
    """

    fixed: float
    whole: float
    iterations: int

    def share_in(self, seconds: float, most: float) -> float:
        """The share of the schedule that fits into ``seconds``, at most ``most``; 3 digits.

        ``most`` for a method that does not train, and where the clock did not move.
        """
        if self.iterations == 0 or self.whole <= 0:
            return most
        return min(float(f"{(seconds - self.fixed) / self.whole:.3g}"), most)


def measure_pace(
    build: Callable[[MethodSettings], Method],
    settings: MethodSettings,
    most: float,
    now: Callable[[], float],
) -> Pace:
    """Judge how long a schedule takes by shortened ones.

    Each trial is longer than the one before, until one takes half as long again as the first, so
    that two tell what any schedule takes from what an iteration takes; or until there is no time
    for the next. A trial ends with the step in which the time is up, so the first may be cut short.

    Args:
        build: Builds the method with the settings of a schedule.
        settings: Settings of the whole schedule.
        most: Seconds that all trials together may take. The first step is always taken.
        now: The clock, in seconds.
    """
    begin = now()
    share = _FIRST_SHARE
    method = build(settings.scaled(share))
    fixed = now() - begin
    while method.iterations == 0 and share < 1:  # a share of few steps is rounded to none
        share = min(8 * share, 1.0)
        method = build(settings.scaled(share))
    if method.iterations == 0:
        return Pace(fixed, 0.0, 0)
    shares, took, done = list[float](), list[float](), 0
    if method.iterations > 2 * _FIRST_TRIAL:  # a long schedule: less of it
        share *= _FIRST_TRIAL / method.iterations
        method = build(settings.scaled(share))
    while True:
        done, start = 0, now()
        while done < method.iterations and (done == 0 or now() - begin < most):
            method.step(done)
            done += 1
        shares.append(share * done / method.iterations)
        took.append(fixed + now() - start)
        four_times = fixed + 4 * (took[-1] - fixed)
        if (
            (len(took) > 1 and took[-1] >= 1.5 * took[0])
            or share >= 1
            or now() - begin + four_times > most
        ):
            break
        share = min(4 * share, 1.0)
        method = build(settings.scaled(share))
    if len(took) > 1 and shares[-1] > shares[0] and took[-1] > took[0]:
        whole = (took[-1] - took[0]) / (shares[-1] - shares[0])
        return Pace(max(took[0] - whole * shares[0], 0.0), whole, done)
    return Pace(fixed, (took[-1] - fixed) / shares[-1], done)


def fitting_share(
    build: Callable[[MethodSettings], Method],
    settings: MethodSettings,
    seconds: float,
    device: torch.device,
    *,
    now: Callable[[], float] | None = None,
) -> float:
    """Find the share of its schedule that a method can run in ``seconds``, trials included.

    Args:
        build: Builds the method with the settings of a schedule.
        settings: Settings of the whole schedule.
        seconds: Time for everything.
        device: Where the method runs.
        now: The clock, in seconds; None for that of the machine.

    Returns:
        A share above 0 and at most 1.

    Raises:
        UsageError: If the time is over before the first iteration.
    """

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (now or time.perf_counter)()

    begin = clock()
    pace = measure_pace(build, settings, TRIAL_SHARE * seconds, clock)
    spent = clock() - begin
    share = pace.share_in(seconds - spent, 1.0)
    if share <= 0:
        raise UsageError(
            f"quantize: expected minutes for more than the {format_duration(spent)} of a trial and "
            f"the {format_duration(pace.fixed)} before the first iteration, "
            f"got {format_duration(seconds)}"
        )
    return share
