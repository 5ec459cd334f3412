"""What BRECQ, QDrop and AdaQuant share: one unit of the student after the other is reconstructed.

It learns to compute in integers what it computed in float, on calibration images without labels.

Where they all differ from their papers: BN stays separate and fixed, where the papers fold it into
the layer before, which is the same function and, with a scale for every channel, the same grid.
Calibration images are not augmented. Biases stay in float, as the integer program folds them into
its epilogue. The first and the last layer are reconstructed like all others, whatever their bits.
Mixed precision (`average_bits`) is an integer program as in AdaQuant, where BRECQ has a genetic
search, on what the rounding of one layer alone does to predictions.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F
from typing_extensions import Self, override

from ..engine import must_fit, restore_random, stage
from ..engine.checkpoint import atomic_write_text
from ..errors import UsageError
from ..quantization import allocate_bits, bits_table, calibrate
from ..quantization.quantizer import ActivationQuantizer, LearnedActivationQuantizer
from ..reconstruction import (
    Data,
    Frontier,
    Reconstruction,
    SoftlyRounded,
    Unit,
    check_ranges_stay,
    float_copy,
    prediction_costs,
    share_decided,
    soften_,
)
from .base import Method, Problem

__all__ = ["ReconstructionConfig", "ReconstructionMethod", "drawn"]


@dataclass(frozen=True)
class ReconstructionConfig:
    """What every reconstruction has.

    Attributes:
        steps: Of each unit.
        batch: Calibration images in a step.
        cache_megabytes: Inputs or targets of a unit that are larger are kept in a file.
        average_bits: Of weights, over all layers: each gets 2, 4 or 8 bits, those whose rounding
            changes predictions least the fewest; None for the bits of the quantization.
    """

    #: The method's name in messages.
    name: ClassVar[str]

    steps: int = 20_000
    batch: int = 32
    cache_megabytes: int = 4096
    average_bits: float | None = None

    def __post_init__(self) -> None:
        self.check("at least 1", steps=self.steps >= 1, batch=self.batch >= 1)
        self.check("at least 0", cache_megabytes=self.cache_megabytes >= 0)
        self.check(
            "between 2 and 8", average_bits=self.average_bits is None or 2 <= self.average_bits <= 8
        )

    def check(self, rule: str, **allowed: bool) -> None:
        """Refuse settings, by name, that are not ``allowed``: that do not obey ``rule``."""
        for name, good in allowed.items():
            if not good:
                raise UsageError(f"{self.name}: expected {name} {rule}, got {getattr(self, name)}")

    def scaled(self, share: float) -> Self:
        """The same schedule in ``share`` of its steps."""
        return replace(self, steps=max(round(self.steps * share), 1))


#: Bits that a layer may have, and images on which that is decided.
_CHOICES, _LOOKED_AT = (2, 4, 8), 256
#: Images on which predictions are compared after each unit.
_WATCHED = 64


def drawn(problem: Problem, count: int) -> Tensor:
    """Indices of at most ``count`` images at random: they come class by class."""
    images = len(problem.images)
    order = torch.randperm(images, generator=problem.random(), device=problem.device)
    return order[:count]


def _with_average_bits(problem: Problem, average_bits: float) -> Problem:
    """Bits of layers by integer programming (AdaQuant), from the costs of each alone.

    Layers that have bits of their own already, by name or as first and last, keep them.
    """
    config, student = problem.quantization, problem.student()
    rows = bits_table(student)
    ends = [] if config.first_last_bits is None else [rows[0].name, rows[-1].name]
    choices = {
        row.name: (row.weight_bits,) if row.name in (*config.layer_bits, *ends) else _CHOICES
        for row in rows
    }
    images = problem.images[drawn(problem, _LOOKED_AT)]
    costs = prediction_costs(student, config, images, choices)
    sizes = {row.name: math.prod(row.weight_shape) for row in rows}
    layer_bits = allocate_bits(costs, sizes, average_bits)
    return replace(problem, quantization=replace(config, layer_bits=layer_bits))


class ReconstructionMethod(Method):
    """Units in turn; a method says what is learned of each, and for how long."""

    def __init__(self, problem: Problem, config: ReconstructionConfig) -> None:
        check_ranges_stay(problem.quantization, config.name)
        if config.average_bits is not None:
            with must_fit():
                problem = _with_average_bits(problem, config.average_bits)
        self.problem = problem
        self.schedule = config
        self.quantization = problem.quantization
        self.random = problem.random()
        #: Some of the images, which come class by class, to watch the student with.
        self.watched = problem.images[drawn(problem, _WATCHED)]
        self.student = problem.student().requires_grad_(False)
        calibrate(self.student, problem.images)
        self.reference = float_copy(self.student)
        self.units = self.partition()
        #: Inputs of every unit as the student has them when its turn comes.
        self.inputs = self.frontier(self.student, [unit.inputs for unit in self.units])
        #: Output and inputs of every unit in the float network.
        self.float_values = self.frontier(
            self.reference, [(unit.output, *unit.inputs) for unit in self.units]
        )
        #: What to do, in order: phase, unit, steps.
        self.tasks = self.plan()
        self.iterations = sum(steps for _, _, steps in self.tasks)
        self.task = -1
        self.current: Reconstruction | None = None
        #: Of each task so far, what `save_artifacts` writes.
        self.progress: list[dict[str, Any]] = []

    @abstractmethod
    def partition(self) -> list[Unit]:
        """The units of the student."""

    def plan(self) -> list[tuple[str, Unit, int]]:
        """Phase, unit and number of steps of everything to be done."""
        return [("", unit, self.schedule.steps) for unit in self.units]

    @abstractmethod
    def begin(self, phase: str, unit: Unit) -> Reconstruction:
        """Look at the images and build what the steps are taken with."""

    def end(self) -> None:
        """Do what comes after the last unit."""

    # ---- what a method builds a reconstruction from ------------------------------------------

    def frontier(self, network: GraphModule, stops: Sequence[Sequence[str]]) -> Frontier:
        """Values of nodes of the student or the reference on all images."""
        limit = self.schedule.cache_megabytes * 2**20
        return Frontier(network, stops, self.problem.images, limit)

    def float_data(self, unit: Unit) -> Data:
        """Inputs and targets of the float network."""
        targets, *inputs = self.float_values.at(self.units.index(unit))
        return Data(inputs, targets)

    def data(self, unit: Unit) -> Data:
        """Inputs of the student as it is, targets of the float network."""
        inputs = self.inputs.at(self.units.index(unit))
        return replace(self.float_data(unit), inputs=inputs)

    def softened(self, unit: Unit) -> tuple[GraphModule, list[SoftlyRounded]]:
        """The unit as a function with soft weights, and these."""
        function = unit.of(self.student)
        return function, soften_(function, unit.layers)

    def quantizers(self, unit: Unit) -> list[ActivationQuantizer]:
        """The unit's own activation quantizers."""
        found = [self.student.get_submodule(name) for name in unit.quantizers]
        return [q for q in found if isinstance(q, ActivationQuantizer)]

    def scales(self, unit: Unit) -> list[torch.nn.Parameter]:
        """Their scales; the paper's grid has none to learn."""
        return [q.scale for q in self.quantizers(unit) if isinstance(q, LearnedActivationQuantizer)]

    # ---- schedule and state -------------------------------------------------------------------

    def _start(self, task: int) -> Reconstruction:
        phase, unit, _ = self.tasks[task]
        setting = f"settings__{self.schedule.name}__cache_megabytes"
        with (
            must_fit(**{setting: self.schedule.cache_megabytes}),
            stage("reconstruction: caches"),
        ):
            return self.begin(phase, unit)

    @property
    @override
    def part(self) -> str:
        return f"unit {max(self.task, 0) + 1}/{len(self.tasks)}"

    @torch.no_grad()
    def divergence(self) -> float:
        """The task's loss: the divergence of the student's predictions from the float network's.

        Of Kullback and Leibler, as it is now, the mean over at most 64 calibration images.
        """
        expected = F.log_softmax(self.reference(self.watched), dim=1)
        found = F.log_softmax(self.student(self.watched), dim=1)
        return float(F.kl_div(found, expected, reduction="batchmean", log_target=True))

    @override
    def step(self, iteration: int) -> Mapping[str, Tensor]:
        task, step = 0, iteration
        while step >= self.tasks[task][2]:
            step -= self.tasks[task][2]
            task += 1
        if self.current is None:
            self.task, self.current = task, self._start(task)
        with (
            must_fit(**{f"settings__{self.schedule.name}__batch": self.schedule.batch}),
            stage("reconstruction: step"),
        ):
            metrics = self.current.step(step)
        if step == 0:
            phase, unit, steps = self.tasks[task]
            first = float(metrics["reconstruction"])
            self.progress.append(
                {"phase": phase, "layers": list(unit.layers), "steps": steps, "first": first}
            )
        if step + 1 == self.tasks[task][2]:
            self.progress[-1]["last"] = float(metrics["reconstruction"])
            if self.current.soft:
                self.progress[-1]["decided"] = float(share_decided(self.current.soft))
            self.current.finish()
            self.current = None
            self.progress[-1]["divergence"] = self.divergence()
            if task + 1 == len(self.tasks):
                self.end()
        return metrics

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "task": self.task,
            "progress": self.progress,
            "current": None if self.current is None else self.current.state_dict(),
            "random": self.random.get_state(),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.inputs.restart()
        self.task, self.current = state["task"], None
        self.progress = [dict(unit) for unit in state["progress"]]
        if state["current"] is not None:
            self.current = self._start(self.task)
            # Building it has set ranges, which training has moved since.
            self.student.load_state_dict(state["student"])
            self.current.load_state_dict(state["current"])
        restore_random(self.random, state["random"])

    @override
    def save_artifacts(self, folder: Path) -> None:
        """``units.json``: what every unit's loss was on its first batch and on its last.

        A list of objects: ``phase``, ``layers`` by name, ``steps``, ``first``; once it is finished
        ``last``, ``divergence``, see `divergence`, and, where rounding was learned, ``decided``,
        the share of roundings within 0.01 of 0 or 1 at the end.
        """
        atomic_write_text(folder / "units.json", json.dumps(self.progress, indent=1) + "\n")
