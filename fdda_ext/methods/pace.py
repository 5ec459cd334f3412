"""Time that a method's schedule takes, measured in a short trial."""

from __future__ import annotations

import statistics
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
#: Iterations of the shortest phase in a trial: the first, a usual one, and the last.
_ITERATIONS = 3
#: Calibration images of a trial.
_FEW_IMAGES = 32


@dataclass(frozen=True)
class Pace:
    """Result of the trial of a method on a network.

    Attributes:
        fixed: Seconds of a run that do not depend on the schedule.
        whole: Further seconds for the whole schedule.
        iterations: Iterations of the trial; 0 if the method does not train.
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
    """Measure in a short trial how long a schedule takes.

    The trial has a few iterations of each phase. The first one may also prepare the phase, and the
    last one may end it, which takes equally long with every schedule. The trial has few images,
    because preparing all may take longer than the whole trial should. Construction with twice as
    many images shows how much time an image takes there.

    When the time runs out, the trial stops after the current iteration. Phases that it has not
    reached count as long as those before on average.

    Args:
        build: Function that builds the method with given settings on so many images.
        settings: Settings of the whole schedule.
        images: Number of images of the run.
        most: Seconds for all of this. The first iteration is always taken.
        now: Clock, in seconds.
    """

    def built(settings: MethodSettings, images: int) -> tuple[Method, float]:
        start = now()
        return build(settings, images), now() - start

    begin = now()
    few = min(images, _FEW_IMAGES)
    method, construction = built(settings, few)
    planned = method.phases if method.iterations else []
    if images > few:
        more = min(images, 2 * few)
        slope = (built(settings, more)[1] - construction) / (more - few)
        construction += max(slope, 0.0) * (images - few)
    if not planned:
        return Pace(construction, 0.0, 0)
    share = min(_ITERATIONS / min(phase.iterations for phase in planned), 1.0)
    method = build(settings.scaled(share), few)
    fixed, done, first = construction, 0, 0
    # Seconds of a usual iteration, by the number of the phase.
    paces = dict[int, float]()
    for number, (count, prepares) in enumerate(method.phases):
        times = list[float]()
        for i in range(min(count, _ITERATIONS) if number + 1 == len(planned) else count):
            if done and now() - begin > most:
                break
            start = now()
            method.step(first + i)
            times.append(now() - start)
            done += 1
        first += count
        if times:
            usual = statistics.median(times[1:-1]) if len(times) > 2 else min(times)
            paces[number] = usual
            fixed += max(times[0] - usual, 0.0) * (images / few if prepares else 1)
            fixed += max(times[-1] - usual, 0.0) if len(times) == count > 1 else 0.0
    others = sum(paces.values()) / max(len(paces), 1)
    whole = sum(phase.iterations * paces.get(n, others) for n, phase in enumerate(planned))
    return Pace(fixed, whole, done)


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
