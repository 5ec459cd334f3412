"""Reconstruction of one unit of the student after another, for BRECQ, QDrop and AdaQuant.

Each unit learns to compute with quantized values what it computed in float. The calibration images
need no labels.

Common differences::

                             | papers                         | here
    -------------------------+--------------------------------+-------------------------------------
    batch normalisation (BN) | folded into the layer before   | separate, with fixed statistics: the
                             |                                | same function and, with a scale per
                             |                                | channel, the same grid
    -------------------------+--------------------------------+-------------------------------------
    calibration images       | augmented                      | not augmented
    -------------------------+--------------------------------+-------------------------------------
    `average_bits`           | AdaQuant: integer programming; | integer programming; the cost is the
                             | BRECQ: a genetic search        | change of predictions when one layer
                             |                                | alone is rounded

* Biases stay in float, because the integer program folds them into its epilogue.
* The first and the last layer are reconstructed like all others, with any number of bits.
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
from ..quantization import allocate_bits, bits_table, calibrate, float_copy
from ..quantization.quantizer import ActivationQuantizer, LearnedActivationQuantizer
from ..reconstruction import (
    Data,
    Frontier,
    Reconstruction,
    SoftlyRounded,
    Unit,
    check_ranges_stay,
    mean_inputs,
    prediction_costs,
    share_decided,
    soften_,
)
from .base import Method, Phase, Problem

__all__ = ["ReconstructionConfig", "ReconstructionMethod", "drawn", "write_units"]


@dataclass(frozen=True)
class ReconstructionConfig:
    """Settings that all reconstruction methods share.

    Attributes:
        steps: Steps per unit.
        batch: Calibration images in a step.
        cache_megabytes: Largest inputs or targets of a unit kept in memory, in MiB; larger ones go
            to a file.
        average_bits: Average bits of all weights. Each layer gets 2, 4 or 8 bits, fewest where
            rounding changes predictions least. None for the bits of the quantization.
    """

    #: Name of the method in messages.
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
        """Refuse the settings that are False in ``allowed``. ``rule`` says what they must be."""
        for name, good in allowed.items():
            if not good:
                raise UsageError(f"{self.name}: expected {name} {rule}, got {getattr(self, name)}")

    def scaled(self, share: float) -> Self:
        """Return the same schedule with ``share`` of its steps."""
        return replace(self, steps=max(round(self.steps * share), 1))


#: Bits that a layer can get, and number of images for this choice and for means.
_CHOICES, _LOOKED_AT = (2, 4, 8), 256
#: Number of images on which predictions are compared after each unit.
_WATCHED = 64


def drawn(problem: Problem, count: int) -> Tensor:
    """Return at most ``count`` random indices of the images, which are sorted by class."""
    images = len(problem.images)
    order = torch.randperm(images, generator=problem.random(), device=problem.device)
    return order[:count]


def _with_average_bits(problem: Problem, average_bits: float) -> Problem:
    """Choose the bits of layers by integer programming (AdaQuant).

    Each layer's cost is measured with only this layer quantized. Layers keep bits that are set by
    name or for the first and last layer.
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
    """Reconstruction unit by unit. A method defines what each unit learns, in how many steps."""

    corrects_biases = False

    def __init__(self, problem: Problem, config: ReconstructionConfig) -> None:
        check_ranges_stay(problem.quantization, config.name)
        if config.average_bits is not None:
            with must_fit():
                problem = _with_average_bits(problem, config.average_bits)
        self.problem = problem
        self.schedule = config
        self.quantization = problem.quantization
        self.random = problem.random()
        #: Random images for `divergence`.
        self.watched = problem.images[drawn(problem, _WATCHED)]
        self.student = problem.student().requires_grad_(False)
        calibrate(self.student, problem.images)
        self.reference = float_copy(self.student)
        self.units = self.partition()
        #: Inputs of every unit in the student when its reconstruction begins.
        self.inputs = self.frontier(self.student, [unit.inputs for unit in self.units])
        #: Output and inputs of every unit in the float network.
        self.float_values = self.frontier(
            self.reference, [(unit.output, *unit.inputs) for unit in self.units]
        )
        #: Phase, unit and number of steps of every task, in order.
        self.tasks = self.plan()
        self.iterations = sum(steps for _, _, steps in self.tasks)
        self.task = -1
        self.current: Reconstruction | None = None
        #: Results of each task so far, for `save_artifacts`.
        self.progress: list[dict[str, Any]] = []

    @abstractmethod
    def partition(self) -> list[Unit]:
        """Return the units of the student."""

    def plan(self) -> list[tuple[str, Unit, int]]:
        """Return phase, unit and number of steps of every task."""
        return [("", unit, self.schedule.steps) for unit in self.units]

    @abstractmethod
    def begin(self, phase: str, unit: Unit) -> Reconstruction:
        """Collect the data of ``unit`` and build its reconstruction."""

    def end(self) -> None:
        """Do what follows the last unit."""

    # ---- what a method needs for a reconstruction ---------------------------------------------

    def frontier(self, network: GraphModule, stops: Sequence[Sequence[str]]) -> Frontier:
        """Build a frontier for nodes of student or reference, on all images."""
        limit = self.schedule.cache_megabytes * 2**20
        return Frontier(network, stops, self.problem.images, limit)

    def float_data(self, unit: Unit) -> Data:
        """Return inputs and targets of the float network."""
        targets, *inputs = self.float_values.at(self.units.index(unit))
        return Data(inputs, targets)

    def data(self, unit: Unit) -> Data:
        """Return inputs of the current student and targets of the float network."""
        inputs = self.inputs.at(self.units.index(unit))
        return replace(self.float_data(unit), inputs=inputs)

    def softened(
        self, unit: Unit, *, keep_means: bool = False
    ) -> tuple[GraphModule, list[SoftlyRounded]]:
        """Return the unit as a function with soft weights, and its softly rounded layers.

        Args:
            unit: The unit.
            keep_means: Whether biases change with the weights, see `SoftlyRounded`. The means are
                those of at most 256 images in the float network.
        """
        function, means = unit.of(self.student), None
        if keep_means:
            images = drawn(self.problem, _LOOKED_AT)
            inputs = [cache.read(images) for cache in self.float_data(unit).inputs]
            means = mean_inputs(unit.of(self.reference), unit.layers, inputs)
        return function, soften_(function, unit.layers, means)

    def quantizers(self, unit: Unit) -> list[ActivationQuantizer]:
        """Return the activation quantizers that belong to the unit."""
        found = [self.student.get_submodule(name) for name in unit.quantizers]
        return [q for q in found if isinstance(q, ActivationQuantizer)]

    def scales(self, unit: Unit) -> list[torch.nn.Parameter]:
        """Return their learned scales; the paper grid has none."""
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
    def phases(self) -> list[Phase]:
        return [Phase(steps, prepares=True) for _, _, steps in self.tasks]

    @property
    @override
    def part(self) -> str:
        return f"unit {max(self.task, 0) + 1}/{len(self.tasks)}"

    @torch.no_grad()
    def divergence(self) -> float:
        """Return the Kullback-Leibler divergence of the student's predictions from the teacher's.

        It is a mean over at most 64 calibration images.
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
            # `_start` has reset ranges that training had moved.
            self.student.load_state_dict(state["student"])
            self.current.load_state_dict(state["current"])
        restore_random(self.random, state["random"])

    @override
    def save_artifacts(self, folder: Path) -> None:
        """Write ``units.json``, see `write_units`."""
        write_units(folder, self.progress)


def write_units(folder: Path, progress: Sequence[Mapping[str, Any]]) -> None:
    """Write ``units.json``: the loss of every unit on its first and last batch.

    It is a list of objects with ``phase``, ``layers`` by name, ``steps`` and ``first``. Finished
    units also have ``last``, ``divergence``, see `ReconstructionMethod.divergence`, and, if
    rounding was learned, ``decided``: the share of roundings within 0.01 of 0 or 1.
    """
    atomic_write_text(folder / "units.json", json.dumps(list(progress), indent=1) + "\n")
