"""Estimate of a method's memory, measured on a few images before the run."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..engine import LiveTensors, free_memory, parts_of, process_memory, release_freed_memory
from ..errors import UsageError
from ..quantization import IMAGES_AT_ONCE, calibrate
from ..statistics import BNSCentres, LayerStatistics, capture, running_statistics
from .alternating import AlternatingTraining
from .base import Method, Problem
from .calibration import Ranges
from .distillation import Student
from .fdda import FDDA
from .optimised_images import OptimisedImages
from .settings import MethodSettings

__all__ = ["MemoryEstimate", "MemoryPhase", "check_memory", "estimate_memory"]

#: Memory of allocators and libraries, as a share of the tensors' bytes.
_BESIDE = 0.1


@dataclass(frozen=True)
class MemoryPhase:
    """Memory for one part of a run: ``fixed + per_image * images`` bytes.

    Attributes:
        name: Name of the part.
        fixed: Bytes that do not depend on the number of images.
        per_image: Bytes per image.
        images: Images at a time.
        setting: Option that determines this number.
        value: Value of this option.
    """

    name: str
    fixed: float
    per_image: float
    images: int
    setting: str
    value: int

    @property
    def bytes(self) -> float:
        """Total number of bytes."""
        return self.fixed + self.per_image * self.images


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory that a run needs.

    Attributes:
        present: Bytes already in use, for the network, the images and torch itself.
        kept: Bytes that stay between steps, for student, generator and optimizers.
        phases: Further memory for each part of the run, one part after another.
    """

    present: int
    kept: int
    phases: list[MemoryPhase]

    @property
    def largest(self) -> MemoryPhase:
        """The part that needs most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def added(self) -> int:
        """Bytes that the process does not use yet."""
        return int((1 + _BESIDE) * (self.kept + self.largest.bytes))

    @property
    def total(self) -> int:
        """Bytes of the whole process at its peak."""
        return self.present + self.added

    def describe(self, free: int | None) -> str:
        """Return one line for the user; ``free`` is what the process can still get, in bytes."""
        text = f"memory: needs about {_gigabytes(self.total)}"
        if free is not None:
            text += f"; {_gigabytes(free + self.present)} are available"
        return text

    def check(self, free: int | None) -> None:
        """Refuse a run that does not fit, and name the setting that helps most.

        Args:
            free: Bytes that the process can still get; None if unknown.

        Raises:
            UsageError: If the run adds more than ``free``.
        """
        if free is None or self.added <= free:
            return
        largest = self.largest
        room = free / (1 + _BESIDE) - self.kept - largest.fixed
        fitting = math.floor(largest.value * room / (largest.per_image * largest.images))
        advice = "use a smaller model or smaller images"
        if 1 <= fitting < largest.value:
            advice = f"lower {largest.setting} from {largest.value} to {fitting}"
        raise UsageError(
            f"memory: expected a run that fits {_gigabytes(free + self.present)}, got one that "
            f"needs about {_gigabytes(self.total)}, most of it for {largest.name}; {advice}"
        )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def estimate_memory(
    name: str, problem: Problem, settings: MethodSettings, *, test_batch: int = 0
) -> MemoryEstimate | None:
    """Estimate a run's memory by running each part on a few images and counting bytes.

    The bytes are linear in the number of images, so two numbers are enough. ``problem`` and the
    global random numbers do not change.

    Args:
        name: Name of the method.
        problem: Input of the method.
        settings: Settings of all methods.
        test_batch: Images evaluated together; 0 to leave out evaluation.

    Returns:
        The estimate; None for methods whose memory depends on more than batches of images.
    """
    from . import method_class  # not at the top, because the package imports this module

    kind = method_class(name)
    if not (kind.distils or issubclass(kind, Ranges)):
        return None
    present = process_memory(problem.device)
    quick = replace(problem.quickly_prepared(), cuda_graphs=False)
    probe = _Probe(name, kind, quick, settings)
    phases = [probe.ranges()]
    if test_batch:
        phases.append(probe.evaluation(test_batch))
    if kind.distils and settings.distillation.steps:
        phases.append(probe.student_step())
    if issubclass(kind, AlternatingTraining):
        phases.append(probe.generator_step())
    if issubclass(kind, OptimisedImages):
        phases.append(probe.image_step())
    found = MemoryEstimate(present, probe.kept, phases)
    del probe
    release_freed_memory()  # else the run finds fragmented memory
    return found


def check_memory(
    name: str,
    problem: Problem,
    settings: MethodSettings,
    console: Console | None = None,
    *,
    test_batch: int = 0,
) -> None:
    """Print how much memory a run needs; refuse it if there is less.

    Args:
        name: Name of the method.
        problem: Input of the method.
        settings: Settings of all methods.
        console: Console to print to; None for no output.
        test_batch: Images evaluated together; 0 to leave out evaluation.

    Raises:
        UsageError: If the run does not fit; names the setting that helps most.
    """
    found = estimate_memory(name, problem, settings, test_batch=test_batch)
    if found is None:
        return
    free = free_memory(problem.device)
    if console is not None:
        console.print(found.describe(free), highlight=False)
    found.check(free)


class _Probe:
    """The parts of a run, on a few images.

    Attributes:
        kept: Bytes that stay between steps, for the parts measured so far.
    """

    def __init__(
        self, name: str, kind: type[Method], problem: Problem, settings: MethodSettings
    ) -> None:
        self.name, self.kind = name, kind
        self.problem, self.settings = problem, settings
        with LiveTensors() as live:
            self.student = problem.student()
            gc.collect()  # reference cycles from tracing
        self.kept = self.student_bytes = live.now
        calibrate(self.student, self.images(1))

    def images(self, count: int) -> Tensor:
        """Return ``count`` images, with repetitions if there are fewer."""
        return self.problem.images[torch.arange(count) % len(self.problem.images)]

    def inference(self, count: int) -> int:
        """Return the peak bytes of the student on ``count`` images of full size."""
        images = self.problem.full_size_images
        images = images[torch.arange(count) % len(images)]
        with torch.no_grad(), LiveTensors() as live:
            self.student(images)
        return live.peak

    def ranges(self) -> MemoryPhase:
        count = min(len(self.problem.images), IMAGES_AT_ONCE)
        line = _line(self.inference, count)
        return MemoryPhase("calibration", *line, count, "images_per_class", count)

    def evaluation(self, batch: int) -> MemoryPhase:
        pixels = self.problem.full_size_images[0, 0].numel()
        count = -(-batch // parts_of(batch, pixels, self.problem.device))
        return MemoryPhase("evaluation", *_line(self.inference, count), count, "test_batch", batch)

    def student_step(self) -> MemoryPhase:
        config = self.settings.distillation
        kept = 0

        def step(count: int) -> int:
            nonlocal kept
            trainer = Student(self.student, replace(self.problem, images_at_once=count), config)
            images = self.images(count)
            labels = torch.zeros(count, dtype=torch.int64, device=images.device)
            with LiveTensors() as live:
                trainer.step(images, labels)
                kept = live.now
            return live.peak - kept

        batch = config.real_batch + config.generated_batch
        parts = self.problem.parts(batch)
        setting, value = "images_at_once", -(-batch // parts)
        line = _line(step, value)
        self.kept += kept
        if parts == 1:
            name = max("real_batch", "generated_batch", key=lambda name: getattr(config, name))
            setting, value = f"settings.distillation.{name}", getattr(config, name)
        return MemoryPhase("a student step", *line, -(-batch // parts), setting, value)

    def generator_step(self) -> MemoryPhase:
        batch = getattr(self.settings, self.name).batch
        one_batch_at_a_time = self.problem.parts(2 * batch) > 1
        kept = 0

        def step(count: int) -> int:
            nonlocal kept
            at_once = count if one_batch_at_a_time else 2 * count
            with LiveTensors() as built:
                method = self.small(count, at_once, batch=count)
                gc.collect()
                kept = built.now - self.student_bytes
            assert isinstance(method, AlternatingTraining)
            with LiveTensors() as live:
                method.generator_step(0)
                kept += live.now
                return live.peak - live.now

        line = _line(step, batch)
        self.kept += kept
        return MemoryPhase("a generator step", *line, batch, f"settings.{self.name}.batch", batch)

    def image_step(self) -> MemoryPhase:
        """Measure a step on the pixels of images."""
        config = getattr(self.settings, self.name).synthesis
        batch = min(config.batch, config.images)

        def step(count: int) -> int:
            method = self.small(count, count, synthesis=replace(config, batch=count))
            with LiveTensors() as live:
                method.step(0)
            return live.peak

        setting = f"settings.{self.name}.synthesis.batch"
        return MemoryPhase("a step on images", *_line(step, batch), batch, setting, batch)

    def small(self, count: int, at_once: int, **changes: Any) -> Method:
        """Build the method with ``changes`` to its settings and ``count`` calibration images."""
        config = getattr(self.settings, self.name)
        settings = replace(self.settings, **{self.name: replace(config, **changes)})
        problem = replace(
            self.problem,
            images=self.problem.images[:count],
            labels=self.problem.labels[:count],
            large_images=None,
            images_at_once=at_once,
        )
        if self.kind is not FDDA:
            return self.kind(problem, settings)
        # Centres only need the right shapes: the real ones take a pass over all images.
        with torch.no_grad():
            means, variances = running_statistics(
                capture(problem.teacher, problem.images[:1]).layers
            )
        classes = problem.num_classes
        statistics = LayerStatistics(
            [mean.expand(classes, -1) for mean in means],
            [variance.expand(classes, -1) for variance in variances],
        )
        right = torch.ones(classes, dtype=torch.bool, device=problem.device)
        return FDDA(problem, settings, BNSCentres(statistics, right))


def _line(measured: Callable[[int], int], images: int) -> tuple[float, float]:
    """Return constant and slope of ``measured``, from about an eighth and a quarter of ``images``.

    With fewer images, the weights would determine the peak.
    """
    few = max(images // 8, 2)
    first, second = measured(few), measured(2 * few)
    slope = max((second - first) / few, 0.0)
    return max(first - slope * few, 0.0), slope
