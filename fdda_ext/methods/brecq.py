"""BRECQ: block reconstruction (Li et al., ICLR 2021).

For one block after another, with quantized weights in all earlier ones and float activations, the
rounding of all its weights is learned (AdaRound, see `fdda_ext.reconstruction.rounding`). Then the
activation scales are learned block by block on the float network's activations, with fixed zero
points::

    L_rounding = mean_{n,h,w} sum_c g^2 (Y' - Y)^2 + lambda sum (1 - |2 h - 1|^beta)      (eq. 10)
    L_scales   = mean_{n,h,w} sum_c |Y' - Y|^2.4

Y is the output of the float block, with its activation function, Y' that of the quantized block. g
weighs the errors::

       | paper                              | authors' code   | here
    ---+------------------------------------+-----------------+---------------------------------
    g  | gradient of the KL divergence of   | 1, or           | objective "mse": 1; "fisher":
       | the predictions at the block's     | |gradient| + 1  | the gradient, scaled to a mean
       | output                             |                 | square of 1

Further differences, besides those of `fdda_ext.methods.reconstructing`:

* Blocks are found in the graph, see `fdda_ext.reconstruction.units`. A layer outside all blocks is
  its own unit.
* Weights are symmetric on the deploy grid.
* Learning rates of scales are relative, see `RelativeAdam`. The scale of an 8-bit image is a
  hundred times smaller than others, and the absolute rate of the paper, 4e-5, would move it by as
  many per cent. 2e-4 equals this rate for a scale of 0.2.
* The paper grid has no scales to learn. Its ranges are only measured, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from typing_extensions import Self, override

from ..reconstruction import (
    Data,
    Granularity,
    Reconstruction,
    RelativeAdam,
    RoundingConfig,
    Unit,
    activations_in_float,
    output_error,
    partition,
    set_ranges,
    squared_gradients,
)
from .base import Problem
from .reconstructing import ReconstructionConfig, ReconstructionMethod

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["BRECQ", "BRECQConfig", "BlockConfig", "scale_optimizers"]


@dataclass(frozen=True)
class BlockConfig(ReconstructionConfig):
    """Settings that BRECQ and QDrop share.

    Attributes:
        granularity: Size of a unit: "layer", "block" or "network".
        rounding: Settings of learned rounding.
        keep_means: Whether the biases keep the means of all layers' outputs while roundings are
            learned, see `fdda_ext.reconstruction.rounding`.
        scale_lr: Learning rate of activation scales (Adam), relative to the scale; a cosine takes
            it to 0.
    """

    granularity: Granularity = "block"
    rounding: RoundingConfig = field(default_factory=RoundingConfig)
    keep_means: bool = False
    scale_lr: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("above 0 and finite", scale_lr=0 < self.scale_lr < math.inf)
        self.check(
            "to be one of layer, block, network",
            granularity=self.granularity in ("layer", "block", "network"),
        )


@dataclass(frozen=True)
class BRECQConfig(BlockConfig):
    """Settings of BRECQ. The defaults are those of the paper, except the objective.

    Attributes:
        objective: Weights of output errors: "mse" for equal weights, "fisher" for gradients of the
            predictions.
        scale_steps: Steps per unit in the second phase; 0 to skip it.
        scale_exponent: Exponent of the loss in the second phase.
    """

    name = "brecq"

    objective: Literal["mse", "fisher"] = "mse"
    scale_steps: int = 5_000
    scale_exponent: float = 2.4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("at least 0", scale_steps=self.scale_steps >= 0)
        self.check("above 0 and finite", scale_exponent=0 < self.scale_exponent < math.inf)
        self.check("to be one of mse, fisher", objective=self.objective in ("mse", "fisher"))

    @override
    def scaled(self, share: float) -> Self:
        steps = max(round(self.scale_steps * share), min(self.scale_steps, 1))
        return replace(super().scaled(share), scale_steps=steps)


def scale_optimizers(scales: Sequence[nn.Parameter], lr: float) -> list[torch.optim.Optimizer]:
    """Return the optimizer of activation scales, in a list that is empty without scales."""
    groups = [{"params": list(scales), "lr": lr, "cosine": True}]
    return [RelativeAdam(groups, eps=1e-20)] if scales else []


class BRECQ(ReconstructionMethod):
    """Learned rounding for all blocks, then learned activation scales."""

    summary = "block by block: learned rounding of weights, then activation scales"
    presets = "brecq"
    sections = ("brecq",)

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.brecq
        super().__init__(problem, self.config)

    @override
    def partition(self) -> list[Unit]:
        return partition(self.student, self.config.granularity, self.problem.images[:1])

    @override
    def plan(self) -> list[tuple[str, Unit, int]]:
        rounding = [("rounding", unit, self.config.steps) for unit in self.units]
        steps = self.config.scale_steps
        scales = [("scales", unit, steps) for unit in self.units if steps and self.scales(unit)]
        return rounding + scales

    @override
    def begin(self, phase: str, unit: Unit) -> Reconstruction:
        if phase == "scales":
            return self._scales(unit, self.float_data(unit))
        with activations_in_float(self.student):
            data = self.data(unit)
        if self.config.objective == "fisher":
            limit = self.config.cache_megabytes * 2**20
            weights = squared_gradients(
                self.student, self.reference, unit, self.problem.images, limit
            )
            data = replace(data, weights=weights)
        function, layers = self.softened(unit, keep_means=self.config.keep_means)
        for name in unit.quantizers:
            function.set_submodule(name, nn.Identity())
        return Reconstruction(
            function,
            data,
            output_error,
            [torch.optim.Adam([layer.alpha for layer in layers], lr=self.config.rounding.lr)],
            steps=self.config.steps,
            batch=self.config.batch,
            random=self.random,
            rounding=self.config.rounding,
        )

    @override
    def end(self) -> None:
        """Set the ranges that the second phase has not set, from the current weights."""
        staged = [unit for phase, unit, _ in self.tasks if phase == "scales"]
        for unit in self.units:
            if unit not in staged and unit.quantizers:
                set_ranges(self.quantizers(unit), unit.of(self.student), self.float_data(unit))

    def _scales(self, unit: Unit, data: Data) -> Reconstruction:
        function = unit.of(self.student)
        set_ranges(self.quantizers(unit), function, data)
        return Reconstruction(
            function,
            data,
            partial(output_error, exponent=self.config.scale_exponent),
            scale_optimizers(self.scales(unit), self.config.scale_lr),
            steps=self.config.scale_steps,
            batch=self.config.batch,
            random=self.random,
        )
