"""AdaQuant: layer-wise calibration (Hubara et al., ICML 2021).

Each layer learns its weights, its bias and the ranges of weights and input by itself, with
straight-through gradients, to match the output of the float layer::

    L = mean ( f(Q_w(w), b, Q_x(x)) - y )^2

f is the layer with its batch normalisation (BN) and the activation function that may follow. The
inputs x come from the quantized layers before it (sequential) or from the float network (parallel,
as in the paper's first version). Optionally, the BN statistics are then measured again through the
quantized network.

Differences, besides those of `fdda_ext.methods.reconstructing`::

                             | authors' code                   | here
    -------------------------+---------------------------------+------------------------------------
    learning rates of ranges | absolute, 1e-1 and 1e-3; they   | relative: a share of the range
                             | can ruin layers of small values |
    -------------------------+---------------------------------+------------------------------------
    result                   | the last state                  | the best on random held-out images
                             |                                 | of 11 states: the first and one
                             |                                 | after each tenth of the steps
    -------------------------+---------------------------------+------------------------------------
    learned bias             | of the layer, BN folded into it | of the BN, or of a layer without
                             |                                 | BN; not quantized

* An activation that several layers read has one range, which the first of them learns.
* Zero points are learned only with quantization.learn_zero_points.
* The paper grid has no ranges to learn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from ..quantization.layers import QuantizedConv2d, QuantizedLinear
from ..quantization.quantizer import LearnedWeightQuantizer
from ..reconstruction import (
    Reconstruction,
    RelativeAdam,
    Unit,
    partition,
    retune_norms,
    set_ranges,
)
from .base import Problem
from .reconstructing import ReconstructionConfig, ReconstructionMethod, drawn

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["AdaQuant", "AdaQuantConfig"]


@dataclass(frozen=True)
class AdaQuantConfig(ReconstructionConfig):
    """Settings of AdaQuant. The defaults are those of its code, except the rates of ranges.

    Attributes:
        lr: Learning rate of weights (Adam).
        bias_lr: Learning rate of biases.
        weight_range_lr: Learning rate of weight scales, relative to the scale.
        activation_range_lr: Learning rate of activation scales, relative to the scale; of learned
            zero points, relative to the largest code.
        sequential: Whether a layer's input comes from the quantized network instead of the float
            one.
        relu_loss: Whether outputs are compared after the activation function.
        held_out: Share of the calibration images that only selects the best state.
        bn_tuning: Whether the BN statistics are measured again at the end.
    """

    name = "adaquant"

    steps: int = 1_000
    batch: int = 50
    lr: float = 1e-5
    bias_lr: float = 1e-3
    weight_range_lr: float = 1e-3
    activation_range_lr: float = 1e-3
    sequential: bool = True
    relu_loss: bool = True
    held_out: float = 0.1
    bn_tuning: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "bias_lr", "weight_range_lr", "activation_range_lr"):
            self.check("above 0 and finite", **{name: 0 < getattr(self, name) < math.inf})
        self.check("at least 0 and below 1", held_out=0 <= self.held_out < 1)


def mean_squared_error(output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return L for ``output`` and ``target``, both ``[N, C, *]``."""
    return F.mse_loss(output, target)


class AdaQuant(ReconstructionMethod):
    """Reconstruction of one layer after another."""

    summary = "layer by layer: learned weights, biases and ranges"
    presets = "adaquant"
    sections = ("adaquant",)

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.adaquant
        super().__init__(problem, self.config)
        images = len(problem.images)
        self.held_out = drawn(problem, min(round(self.config.held_out * images), images - 1))

    @override
    def partition(self) -> list[Unit]:
        return partition(
            self.student,
            "layer",
            self.problem.images[:1],
            quantize="input",
            activation=self.config.relu_loss,
        )

    @override
    def begin(self, phase: str, unit: Unit) -> Reconstruction:
        data = self.data(unit) if self.config.sequential else self.float_data(unit)
        function = unit.of(self.student)
        set_ranges(self.quantizers(unit), function, data)
        return Reconstruction(
            function,
            data,
            mean_squared_error,
            self._optimizers(unit, function),
            steps=self.config.steps,
            batch=self.config.batch,
            random=self.random,
            held_out=self.held_out,
        )

    def _optimizers(self, unit: Unit, function: GraphModule) -> list[torch.optim.Optimizer]:
        config = self.config
        (layer,) = (self.student.get_submodule(name) for name in unit.layers)
        assert isinstance(layer, (QuantizedConv2d, QuantizedLinear))
        groups: list[dict[str, Any]] = [{"params": [layer.weight], "lr": config.lr}]
        if (bias := self._bias(unit, function)) is not None:
            groups.append({"params": [bias], "lr": config.bias_lr})
        for quantizer in self.quantizers(unit):
            zero_point = getattr(quantizer, "zero_point", None)
            if isinstance(zero_point, nn.Parameter):
                rate = config.activation_range_lr * quantizer.grid.quant_max
                groups.append({"params": [zero_point], "lr": rate})
        optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(groups)]
        ranges = []
        if isinstance(layer.weight_quantizer, LearnedWeightQuantizer):
            ranges.append({"params": [layer.weight_quantizer.scale], "lr": config.weight_range_lr})
        if scales := self.scales(unit):
            ranges.append({"params": scales, "lr": config.activation_range_lr})
        # LSQ scales the gradients of ranges down, so Adam's usual eps would be too large.
        return [*optimizers, RelativeAdam(ranges, eps=1e-20)] if ranges else optimizers

    def _bias(self, unit: Unit, function: GraphModule) -> nn.Parameter | None:
        """Return the bias of the BN after the layer, else that of the layer."""
        (name,) = unit.layers
        (node,) = (n for n in function.graph.nodes if n.target == name)
        for user in node.users:
            norm = function.get_submodule(str(user.target)) if user.op == "call_module" else None
            if isinstance(norm, _BatchNorm):
                return cast("nn.Parameter | None", norm.bias)
        return cast("nn.Parameter | None", function.get_submodule(name).bias)

    @override
    def end(self) -> None:
        if self.config.bn_tuning:
            retune_norms(self.student, self.reference, self.problem.images)
