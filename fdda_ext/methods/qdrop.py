"""QDrop: block reconstruction with randomly dropped quantization (Wei et al., ICLR 2022).

QDrop changes BRECQ in two points. Rounding and activation scales are learned together, and every
element of the block's input and of its activations is quantized only with probability p::

    x' = Q(x) with probability p, else x

The unquantized input comes from the float network. At inference everything is quantized. A block's
ranges are set just before it is trained, from weights not yet rounded.

Differences, besides those of `fdda_ext.methods.reconstructing`: weights are symmetric on the deploy
grid, and the paper grid has no scales to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from ..reconstruction import (
    Dropped,
    Reconstruction,
    Unit,
    output_error,
    partition,
    set_ranges,
)
from .base import Problem
from .brecq import BlockConfig, scale_optimizers
from .reconstructing import ReconstructionMethod

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["QDrop", "QDropConfig"]


@dataclass(frozen=True)
class QDropConfig(BlockConfig):
    """Settings of QDrop. The defaults are those of the paper.

    Attributes:
        probability: Probability p that an element is quantized; rounded to a multiple of 1/256.
    """

    name = "qdrop"

    probability: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("between 0 and 1", probability=0 <= self.probability <= 1)


class QDrop(ReconstructionMethod):
    """Rounding and activation scales, learned together block by block."""

    summary = "block by block: learned rounding while activations are quantized at random"
    presets = "qdrop"
    sections = ("qdrop",)

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.qdrop
        super().__init__(problem, self.config)

    @override
    def partition(self) -> list[Unit]:
        return partition(self.student, self.config.granularity, self.problem.images[:1])

    @override
    def begin(self, phase: str, unit: Unit) -> Reconstruction:
        data = replace(self.data(unit), float_inputs=self.float_data(unit).inputs)
        function, layers = self.softened(unit, keep_means=self.config.keep_means)
        quantizers = self.quantizers(unit)
        set_ranges(quantizers, function, data)
        for name, quantizer in zip(unit.quantizers, quantizers, strict=True):
            dropped = Dropped(quantizer, self.config.probability, self.random)
            function.set_submodule(name, dropped)
        alphas = [layer.alpha for layer in layers]
        return Reconstruction(
            function,
            data,
            output_error,
            [
                torch.optim.Adam(alphas, lr=self.config.rounding.lr),
                *scale_optimizers(self.scales(unit), self.config.scale_lr),
            ],
            steps=self.config.steps,
            batch=self.config.batch,
            random=self.random,
            rounding=self.config.rounding,
            quantized_share=self.config.probability,
        )
