"""Reconstruction of one unit of a student."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from ..quantization import project_scales_
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
    "mean_inputs",
    "output_error",
    "set_ranges",
    "squared_gradients",
    "values_of",
]

#: Loss as a function of a unit's output, its target and the weights of errors, None for 1.
Objective = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def output_error(
    output: Tensor, target: Tensor, weights: Tensor | None = None, exponent: float = 2.0
) -> Tensor:
    """Return the mean over images and positions of ``sum_c weights |output - target|^exponent``.

    This is the loss of BRECQ.

    Args:
        output: Output of a unit, ``[N, C, *]``.
        target: Target of the output, in its shape.
        weights: Weights of errors, in the same shape; None for 1.
        exponent: Exponent of the error: 2 to learn weights, 2.4 to learn ranges.
    """
    error = (output - target).abs().pow(exponent) if exponent != 2 else (output - target).square()
    if weights is not None:
        error = error * weights
    return error.sum(1).mean()


# ---- networks -------------------------------------------------------------------------------


@contextmanager
def activations_in_float(student: nn.Module) -> Iterator[None]:
    """Leave activations in float inside this context."""
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
    """Return a function of images that computes the values of the nodes ``names``.

    If nodes are ``known``, the function takes the values that `arguments_of` names.
    """
    function, _ = region(network, names, known)

    def run(*arguments: Tensor) -> Sequence[Tensor]:
        found = function(*arguments)
        return (found,) if len(names) == 1 else cast(Sequence[Tensor], found)

    return run


@torch.no_grad()
def set_ranges(quantizers: Sequence[ActivationQuantizer], function: nn.Module, data: Data) -> None:
    """Set the ranges of ``quantizers`` from a pass of ``function`` over all inputs.

    The pass computes as in evaluation: layers of the deploy grid round inputs to integers.
    """
    if not quantizers:
        return
    with collecting(quantizers):
        for inputs in zip(*(cache.split(BATCH) for cache in data.inputs), strict=True):
            function(*inputs)


def mean_inputs(
    function: nn.Module, layers: Sequence[str], inputs: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the mean input of every weight, by layer and in the shape of its weight.

    The mean is over images and positions, with padding. It is the gradient of the layer's mean
    output with respect to the weight.

    Args:
        function: Float network, or a part of it.
        layers: Names of its convolutions and linear layers.
        inputs: Arguments of ``function``.
    """
    found: dict[str, Tensor] = {}

    def measure(name: str, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].mean(0, keepdim=True)
        with torch.enable_grad():
            weight = cast(Tensor, layer.weight).detach().requires_grad_()
            if isinstance(layer, nn.Conv2d):
                mean = layer._conv_forward(x, weight, None).mean((0, 2, 3))
            else:
                mean = F.linear(x, weight).flatten(0, -2).mean(0)
            (found[name],) = torch.autograd.grad(mean.sum(), weight)

    handles = [
        function.get_submodule(name).register_forward_pre_hook(partial(measure, name))
        for name in layers
    ]
    try:
        with torch.no_grad():
            function(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def squared_gradients(
    student: GraphModule, reference: GraphModule, unit: Unit, images: Tensor, limit: int
) -> Cache:
    """Return how much the prediction depends on each output of ``unit``: the Fisher diagonal.

    It is the squared gradient, with respect to the unit's output, of the Kullback-Leibler
    divergence between two predictions: that of ``reference``, and that with all units up to this
    one quantized (BRECQ, eq. 10). It is scaled to mean 1, so the weights of other losses keep their
    meaning.
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
    """Inputs and targets of a unit on all calibration images.

    Attributes:
        inputs: Values of the unit's inputs, one cache each.
        targets: Targets of its output.
        float_inputs: Inputs in the float network, to mix in; empty for no mixing.
        weights: Weights of the output's errors; None for 1.
    """

    inputs: Sequence[Cache]
    targets: Cache
    float_inputs: Sequence[Cache] = ()
    weights: Cache | None = None


class Dropped(nn.Module):
    """Activation quantizer that leaves random elements in float (QDrop).

    Args:
        quantizer: Quantizer to wrap.
        probability: Probability that an element is quantized.
        random: Source of random numbers.
    """

    def __init__(
        self, quantizer: ActivationQuantizer, probability: float, random: torch.Generator
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.probability = probability
        self.random = random

    def forward(self, x: Tensor) -> Tensor:
        """Quantize random elements of ``x``."""
        if self.quantizer.mode != "quantize":
            return cast(Tensor, self.quantizer(x))
        return mixed(self.quantizer(x), x, self.probability, self.random)


def mixed(first: Tensor, second: Tensor, probability: float, random: torch.Generator) -> Tensor:
    """Take each element from ``first`` with ``probability``, otherwise from ``second``.

    The probability is rounded to a multiple of 1/256, because each element uses 8 random bits.
    Drawing a float32 for each takes several times longer.
    """
    below = round(probability * 256)
    if below in (0, 256):
        return first if below else second
    words = torch.empty(-(-first.numel() // 8), dtype=torch.int64, device=first.device)
    words.random_(-(2**63), 2**63 - 1, generator=random)
    # In the memory order of `first`, so that no operation mixes memory orders.
    strides = torch.empty_like(first, device="meta").stride()
    bits = words.view(torch.uint8).as_strided(first.shape, strides)
    # With weights of 0 and 1, `lerp` returns exactly one of two finite values. Its forward and
    # backward pass together are faster than those of `where`.
    return torch.lerp(second, first, (bits < below).to(first.dtype))


class RelativeAdam(torch.optim.Adam):
    """Adam on the logarithms of positive parameters, so that each step is relative to the value."""

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
    """Reconstruction of one unit.

    Attributes:
        function: The unit as a function of its inputs.
        data: Inputs and targets.
        objective: Loss of output, target and weights of errors.
        optimizers: Optimizers of all learned parameters. The learning rates of groups with
            "cosine" fall to 0.
        steps: Number of steps.
        batch: Images in a step, drawn anew for each.
        random: Source of random numbers.
        rounding: Settings of the layers that `function` rounds softly.
        quantized_share: Share of input elements that are not from `data.float_inputs`, if these
            are given.
        held_out: Indices of images, int64, that are used only for validation. The best state among
            the first one and those after each tenth of the steps is restored at the end. None to
            keep the last state.
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
        """Take step ``step``; return scalar losses and the share of decided roundings, by name."""
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
        """Write the learned values to the student."""
        if self.best:
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)
        for layer in self.soft:
            layer.bake()
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """Return all state except the student's and random numbers."""
        return {
            "alphas": [layer.alpha.detach() for layer in self.soft],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "best_error": self.best_error,
            "best": self.best,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        for layer, alpha in zip(self.soft, state["alphas"], strict=True):
            layer.alpha.copy_(alpha)
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.best_error, self.best = state["best_error"], state["best"]
