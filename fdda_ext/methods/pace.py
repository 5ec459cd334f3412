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
#: Calibration images of the first trial.
_FEW_IMAGES = 64


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
    build: Callable[[MethodSettings, int], Method],
    settings: MethodSettings,
    images: int,
    most: float,
    now: Callable[[], float],
) -> Pace:
    """Measure with short trials how long a schedule takes.

    The trials use few images, because the preparation of all may take longer than all trials
    should. The second trial has twice as many as the first, which shows how much fixed time an
    image takes. Then each trial is longer than the one before. They end when the last took at
    least 1.5 times as long as the first, which separates the fixed time from the time per
    iteration. They also end after the whole schedule, or if there is no time for another. When the
    time runs out, a trial stops after the current step, even the first trial.

    Args:
        build: Function that builds the method with given settings on so many images.
        settings: Settings of the whole schedule.
        images: Number of images of the run.
        most: Seconds for all trials together. The first two trials always take a step.
        now: Clock, in seconds.
    """
    begin = now()

    def trial(share: float, images: int) -> list[float]:
        """Return the seconds of a trial until its construction and until each of its iterations."""
        start = now()
        method = build(settings.scaled(share), images)
        times = [now() - start]
        while len(times) <= method.iterations and (len(times) == 1 or now() - begin < most):
            method.step(len(times) - 1)
            times.append(now() - start)
        return times

    few = min(images, _FEW_IMAGES)
    planned = build(settings, few).iterations
    fixed = now() - begin
    share = min(_FIRST_TRIAL / planned, 1.0) if planned else 1.0
    first = trial(share, few)
    after = 0.0  # seconds for the other images
    if images > few:
        more = min(images, 2 * few)
        second = trial(share, more)
        both = min(len(first), len(second)) - 1
        after = max(second[both] - first[both], 0.0) / (more - few) * (images - few)
    if not planned:
        return Pace(first[-1] + after, 0.0, 0)
    done = len(first) - 1
    took, shares = [first[-1]], [done / planned]
    while (
        took[-1] < 1.5 * took[0]
        and shares[-1] < 1
        and now() - begin + fixed + 4 * (took[-1] - fixed) <= most
    ):
        share = min(4 * share, 1.0)
        times = trial(share, few)
        done = len(times) - 1
        took.append(times[-1])
        shares.append(done / planned)
    if len(took) > 1 and shares[-1] > shares[0] and took[-1] > took[0]:
        whole = (took[-1] - took[0]) / (shares[-1] - shares[0])
        return Pace(max(took[0] - whole * shares[0], 0.0) + after, whole, done)
    return Pace(fixed + after, max(took[-1] - fixed, 0.0) / shares[-1], done)


def fitting_share(
    build: Callable[[MethodSettings, int], Method],
    settings: MethodSettings,
    images: int,
    seconds: float,
    device: torch.device,
    *,
    most: float = 1.0,
    now: Callable[[], float] | None = None,
) -> float:
    """Find the schedule share that a method can run in ``seconds``, trials included.

    Args:
        build: Function that builds the method with given settings on so many images.
        settings: Settings of the whole schedule.
        images: Number of images of the run.
        seconds: Time for trials and run.
        device: Device of the method.
        most: Largest share.
        now: Clock, in seconds; None for the system's clock.

    Returns:
        A share above 0 and at most ``most``.

    Raises:
        UsageError: If the time is over before the first iteration.
    """

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (now or time.perf_counter)()

    begin = clock()
    pace = measure_pace(build, settings, images, TRIAL_SHARE * seconds, clock)
    spent = clock() - begin
    share = pace.share_in(seconds - spent, most)
    if share <= 0:
        raise UsageError(
            f"minutes: expected time for more than the {format_duration(spent)} of trials and "
            f"the {format_duration(pace.fixed)} before the first iteration, "
            f"got {format_duration(seconds)}"
        )
    return share
