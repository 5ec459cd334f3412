"""One unit of a student made to compute again what it computed in float."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from ..quantization import project_scales_
from ..quantization.layers import QuantizedConv2d, QuantizedLinear
from ..quantization.quantizer import ActivationQuantizer
from ..quantization.student import activation_quantizers, collecting
from .cache import BATCH, Cache, collect
from .rounding import RoundingConfig, SoftlyRounded, share_decided
from .units import Unit, region

__all__ = [
    "Data",
    "Dropped",
    "Reconstruction",
    "RelativeAdam",
    "activations_in_float",
    "float_copy",
    "output_error",
    "set_ranges",
    "squared_gradients",
    "values_of",
]

#: Of a unit's output, its target and, where errors weigh differently, their weights: the loss.
Objective = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def output_error(
    output: Tensor, target: Tensor, weights: Tensor | None = None, exponent: float = 2.0
) -> Tensor:
    """``mean over images and positions of sum_c weights |output - target|^exponent`` (BRECQ).

    Args:
        output: ``[N, C, *]``.
        target: Likewise.
        weights: Likewise; None for 1.
        exponent: 2 while weights are learned, 2.4 for ranges.
    """
    error = (output - target).abs().pow(exponent) if exponent != 2 else (output - target).square()
    if weights is not None:
        error = error * weights
    return error.sum(1).mean()


# ---- networks -------------------------------------------------------------------------------


def float_copy(student: GraphModule) -> GraphModule:
    """The network that ``student`` was made of, on the student's own graph."""
    reference = copy.deepcopy(student).requires_grad_(False)
    for module in list(reference.modules()):
        if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
            module.set_submodule("weight_quantizer", nn.Identity())
    for quantizer in activation_quantizers(reference):
        quantizer.mode = "float"
    return reference


@contextmanager
def activations_in_float(student: nn.Module) -> Iterator[None]:
    """Let activations pass through while inside."""
    quantizers = activation_quantizers(student)
    modes = [quantizer.mode for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.mode = "float"
        yield
    finally:
        for quantizer, mode in zip(quantizers, modes, strict=True):
            quantizer.mode = mode


def values_of(
    network: GraphModule, names: Sequence[str], known: Collection[str] = ()
) -> Callable[..., Sequence[Tensor]]:
    """A function of images that gives the values of the nodes ``names``.

    With nodes ``known``, of those and the images that it takes, see `arguments_of`.
    """
    function, _ = region(network, names, known)

    def run(*arguments: Tensor) -> Sequence[Tensor]:
        found = function(*arguments)
        return (found,) if len(names) == 1 else cast(Sequence[Tensor], found)

    return run


@torch.no_grad()
def set_ranges(quantizers: Sequence[ActivationQuantizer], function: nn.Module, data: Data) -> None:
    """Set the ranges of ``quantizers`` from what ``function`` makes of all inputs.

    As at inference: a layer of the deploy grid rounds its inputs, if they are not rounded yet.
    """
    if not quantizers:
        return
    with collecting(quantizers):
        for inputs in zip(*(cache.split(BATCH) for cache in data.inputs), strict=True):
            function(*inputs)


def squared_gradients(
    student: GraphModule, reference: GraphModule, unit: Unit, images: Tensor, limit: int
) -> Cache:
    """How much the prediction minds an error of each output of ``unit``: the diagonal of Fisher.

    The square of the gradient, with respect to the unit's output, of the Kullback-Leibler
    divergence of the predictions: those of ``reference`` against those with all units up to this
    one quantized (BRECQ, eq. 10). It is scaled to mean 1, so that the weight of other losses keeps
    its meaning.
    """
    logits = str(reference.graph.output_node().args[0])
    behind, names = region(reference, [logits], unit.known)
    before = values_of(student, names)
    at = names.index(unit.output)

    def squares(batch: Tensor) -> Sequence[Tensor]:
        values = list(before(batch))
        with torch.enable_grad():
            values[at] = values[at].detach().requires_grad_()
            divergence = F.kl_div(
                F.log_softmax(behind(*values), dim=1),
                F.log_softmax(reference(batch), dim=1),
                reduction="sum",
                log_target=True,
            )
            (gradient,) = torch.autograd.grad(divergence, values[at])
        return (gradient.square(),)

    with activations_in_float(student):
        (cache,) = collect(squares, [images], limit)
    cache.rows /= cache.rows.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return cache


# ---- one unit -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What a unit is reconstructed from, on all calibration images.

    Attributes:
        inputs: Values of the unit's inputs, one cache each.
        targets: What its output is to be.
        float_inputs: The inputs in the float network, to be mixed in; none for no mixing.
        weights: Of errors of the output; None for 1.
    """

    inputs: Sequence[Cache]
    targets: Cache
    float_inputs: Sequence[Cache] = ()
    weights: Cache | None = None


class Dropped(nn.Module):
    """An activation quantizer that lets elements pass at random (QDrop).

    Args:
        quantizer: What it is put around.
        probability: That an element is quantized.
        random: Where chance comes from.
    """

    def __init__(
        self, quantizer: ActivationQuantizer, probability: float, random: torch.Generator
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.probability = probability
        self.random = random

    def forward(self, x: Tensor) -> Tensor:
        """Each element of ``x`` quantized or not."""
        if self.quantizer.mode != "quantize":
            return cast(Tensor, self.quantizer(x))
        return mixed(self.quantizer(x), x, self.probability, self.random)


def mixed(first: Tensor, second: Tensor, probability: float, random: torch.Generator) -> Tensor:
    """Each element of ``first`` with ``probability``, else that of ``second``."""
    chance = torch.rand(first.shape, generator=random, device=first.device)
    return torch.where(chance < probability, first, second)


class RelativeAdam(torch.optim.Adam):
    """Adam on the logarithms of positive parameters: a step is a share of what they are."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(parameter)
            parameter.log_()
        super().step(closure)
        for parameter in parameters:
            parameter.exp_()


@dataclass
class Reconstruction:
    """One unit while it is reconstructed.

    Attributes:
        function: What the unit computes, of its inputs.
        data: From what, and to what end.
        objective: Of output, target and weights of errors.
        optimizers: Of everything that is learned. The rates of groups with "cosine" fall to 0.
        steps: In all.
        batch: Images in a step, drawn anew for each.
        random: Where chance comes from.
        rounding: Of the layers that `function` rounds softly.
        quantized_share: Of the elements of the inputs, where `data` has those of the float network.
        held_out: Indices of images, int64, that only judge: in the end, the best of the first state
            and of those after each tenth of the steps is restored. None for the last state.
    """

    function: GraphModule
    data: Data
    objective: Objective
    optimizers: Sequence[torch.optim.Optimizer]
    steps: int
    batch: int
    random: torch.Generator
    rounding: RoundingConfig = field(default_factory=RoundingConfig)
    quantized_share: float = 1.0
    held_out: Tensor | None = None

    def __post_init__(self) -> None:
        self.soft = [m for m in self.function.modules() if isinstance(m, SoftlyRounded)]
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.parameters = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.best_error = math.inf
        self.best: list[Tensor] = []
        images = torch.arange(len(self.data.targets), device=self.random.device)
        self.seen = images
        if self.held_out is not None:
            self.seen = images[~torch.isin(images, self.held_out)]
            self._keep_if_best()

    def step(self, step: int) -> Mapping[str, Tensor]:
        """Take step ``step``; name the scalar losses, and the share of decided roundings."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine if group.get("cosine") else rate
        order = torch.randperm(len(self.seen), generator=self.random, device=self.random.device)
        loss = error = self._error(self.seen[order[: self.batch]])
        metrics: dict[str, Tensor] = {}
        if self.soft:
            metrics["decided"] = share_decided(self.soft)
            metrics["regulariser"] = error.new_zeros(())
            beta = self.rounding.beta(step / self.steps)
            if beta is not None:
                metrics["regulariser"] = sum(
                    (layer.regulariser(beta) for layer in self.soft), error.new_zeros(())
                )
                loss = loss + self.rounding.weight * metrics["regulariser"]
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        project_scales_(self.function)
        if (step + 1) * 10 // self.steps > step * 10 // self.steps:
            self._keep_if_best()
        metrics["reconstruction"] = error
        return {name: value.detach() for name, value in metrics.items()}

    def _error(self, images: Tensor) -> Tensor:
        data = self.data
        inputs = [cache.read(images) for cache in data.inputs]
        if data.float_inputs:
            inputs = [
                mixed(x, cache.read(images), self.quantized_share, self.random)
                for x, cache in zip(inputs, data.float_inputs, strict=True)
            ]
        weights = None if data.weights is None else data.weights.read(images)
        return self.objective(self.function(*inputs), data.targets.read(images), weights)

    @torch.no_grad()
    def _keep_if_best(self) -> None:
        if self.held_out is None or not len(self.held_out):
            return
        batches = self.held_out.split(self.batch)
        error = float(sum(len(i) * self._error(i) for i in batches)) / len(self.held_out)
        if error < self.best_error:
            self.best_error = error
            self.best = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def finish(self) -> None:
        """Leave in the student what was learned."""
        if self.best:
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)
        for layer in self.soft:
            layer.bake()
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """All that is not the student's, random numbers aside."""
        return {
            "alphas": [layer.alpha.detach() for layer in self.soft],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "best_error": self.best_error,
            "best": self.best,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for layer, alpha in zip(self.soft, state["alphas"], strict=True):
            layer.alpha.copy_(alpha)
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.best_error, self.best = state["best_error"], state["best"]
