"""Time that a method's schedule takes, measured in short trials."""

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

#: Share of the available time that all trials of a method together may take.
TRIAL_SHARE = 0.1
#: Iterations of the first trial. Each further trial has four times as many.
_FIRST_TRIAL = 8
#: Schedule share with which iterations are counted.
_FIRST_SHARE = 1 / 64


@dataclass(frozen=True)
class Pace:
    """Result of the trials of a method on a network.

    Attributes:
        fixed: Seconds of a run that do not depend on the schedule.
        whole: Further seconds for the whole schedule.
        iterations: Iterations of the longest trial; 0 if the method does not train.
    """

    fixed: float
    whole: float
    iterations: int

    def share_in(self, seconds: float, most: float) -> float:
        """Return the schedule share that fits into ``seconds``, at most ``most``, to 3 digits.

        Return ``most`` if the method does not train or the clock did not advance.
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
    """Measure with short trials how long a schedule takes.

    Each trial is longer than the one before. Trials end when the last took at least 1.5 times as
    long as the first, which separates the fixed time from the time per iteration. They also end
    after the whole schedule, or if there is no time for another. When the time runs out, a trial
    stops after the current step, even the first trial.

    Args:
        build: Function that builds the method with given settings.
        settings: Settings of the whole schedule.
        most: Seconds for all trials together. The first step is always taken.
        now: Clock, in seconds.
    """
    begin = now()
    share = _FIRST_SHARE
    method = build(settings.scaled(share))
    fixed = now() - begin
    while method.iterations == 0 and share < 1:  # a small share rounds to no iterations
        share = min(8 * share, 1.0)
        method = build(settings.scaled(share))
    if method.iterations == 0:
        return Pace(fixed, 0.0, 0)
    shares, took, done = list[float](), list[float](), 0
    if method.iterations > 2 * _FIRST_TRIAL:  # shorten a long schedule
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
    """Find the schedule share that a method can run in ``seconds``, trials included.

    Args:
        build: Function that builds the method with given settings.
        settings: Settings of the whole schedule.
        seconds: Time for trials and run.
        device: Device of the method.
        now: Clock, in seconds; None for the system's clock.

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
            f"quantize: expected minutes for more than the {format_duration(spent)} of trials and "
            f"the {format_duration(pace.fixed)} before the first iteration, "
            f"got {format_duration(seconds)}"
        )
    return share
