"""Tandem: reconstruction of one block after another, then distillation of all layers together.

Phase 1 is QDrop: it learns the rounding of the weights and the activation scales of each block.
Phase 2 begins with this student and takes the student
step of FDDA on the calibration images: now all layers learn together, so later layers can correct
what earlier ones lose. AE-QDrop (2024) proposed this order. No image is generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule
from typing_extensions import override

from .base import Method, Phase, Problem
from .calibration import CalibrationDistillation
from .qdrop import QDrop
from .reconstructing import write_units

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["Tandem"]


class Tandem(Method):
    """QDrop, then distillation of all layers."""

    summary = "block reconstruction (qdrop), then distillation of all layers on calibration images"
    presets = "tandem"
    distils = True
    corrects_biases = False
    sections = ("qdrop", "distillation")

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.problem, self.settings = problem, settings
        self.blocks: QDrop | None = QDrop(problem, settings)
        self.network: CalibrationDistillation | None = None
        self.quantization = self.blocks.quantization
        self.student: GraphModule = self.blocks.student
        #: Iterations of phase 1.
        self.first_iterations = self.blocks.iterations
        self.iterations = self.first_iterations + settings.distillation.steps
        self._phases = [
            *self.blocks.phases,
            Phase(settings.distillation.steps, independent=True),
        ]
        #: Results of phase 1, see `write_units`.
        self.progress: list[dict[str, Any]] = []

    def _begin_distillation(self) -> CalibrationDistillation:
        self.blocks = None  # frees the stored tensors of all blocks
        self.student.requires_grad_(True)
        self.network = CalibrationDistillation(self.problem, self.settings, self.student)
        return self.network

    @property
    @override
    def phases(self) -> list[Phase]:
        return [phase for phase in self._phases if phase.iterations]

    @property
    @override
    def part(self) -> str:
        return "all layers" if self.blocks is None else self.blocks.part

    @override
    def step(self, iteration: int) -> Mapping[str, Tensor]:
        if self.blocks is not None and iteration < self.first_iterations:
            metrics = self.blocks.step(iteration)
            self.progress = self.blocks.progress
            return metrics
        network = self.network or self._begin_distillation()
        return network.step(iteration - self.first_iterations)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "blocks": None if self.blocks is None else self.blocks.state_dict(),
            "network": None if self.network is None else self.network.state_dict(),
            "progress": self.progress,
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.progress = [dict(unit) for unit in state["progress"]]
        if state["network"] is not None:
            (self.network or self._begin_distillation()).load_state_dict(state["network"])
        elif self.blocks is not None:
            self.blocks.load_state_dict(state["blocks"])

    @override
    def save_artifacts(self, folder: Path) -> None:
        """Write ``units.json``, see `write_units`."""
        write_units(folder, self.progress)
