"""LAPQ: loss aware post-training quantization (Nahshan et al., Machine Learning 2021).

Weights are neither trained nor rounded anew; the ranges of all tensors are searched together, for
the cross entropy L of the quantized network on the calibration images and their labels:

1. For ten exponents p from 2 to 4, every range is the one of least ``E |x - Q(x)|^p`` of its own
   tensor; L(p) is measured.
2. A parabola through the ten ``(p, L(p))`` has its vertex at p*, whose ranges are the start.
3. Powell's direction-set method (Powell 1964; Press et al., Numerical Recipes, 10.7) minimises L
   over the multipliers m of these ranges, one line search after the other. A sweep goes along each
   direction d_i in turn; then, with x_0 and x_N the points where it began and ended, L_0 and L_N
   the losses there, L_E the loss at 2 x_N - x_0, and D the largest fall along one direction d_k,

       d_k <- d_N,  d_N <- x_N - x_0, and a search along it,   if L_E < L_0 and
           2 (L_0 - 2 L_N + L_E) (L_0 - L_N - D)^2 < D (L_0 - L_E)^2

Weight quantization shifts a layer's mean output by ``e_c = sum_j (Q(w) - w)_cj E[x_j]``, which is
taken out again, in the mean of the batch normalisation that follows or in the layer's bias.

Other than in the paper and the authors' code: weights have a range for every channel, which all
channels of a layer multiply by one m; the zero is on the grid, as `Grid` has it; every tensor that
the configuration quantizes takes part, ends included, where the code leaves first and last layer,
classifier and residual sums in float; activation ranges of phase 1 are of what one pass sees with
activations in float and weights at the first exponent, where the code's see earlier layers
quantized; calibration images are training images, where the code takes validation images; a
parabola that opens downwards or has its vertex outside the exponents gives way to the best exponent
measured; a line search is Brent's bounded one within a reach around the current point, since L is a
step function far from convex, and is only taken if L falls. The code takes the mean error of a
channel's weights from each of them, which puts them off the grid: a product with the sum of the
inputs for every pixel. An integer program has e_c, what all errors amount to on average, for
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from ..engine import must_fit, stage
from ..errors import UsageError
from ..quantization.layers import QuantizedConv2d, QuantizedLinear
from ..quantization.quantizer import ActivationQuantizer
from ..quantization.ranges import Histogram, RangeRule, find_range
from ..quantization.student import collecting
from ..reconstruction import float_copy
from .base import Method, Problem
from .patches import patches, rows

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["LAPQ", "LAPQConfig", "Powell", "vertex"]

#: Least multiplier of a range.
_LEAST = 0.05

#: Of a point and a direction: the loss at so many times the direction away from the point.
Along = Callable[[Tensor, Tensor], Callable[[float], float]]


@dataclass(frozen=True)
class LAPQConfig:
    """The search of LAPQ.

    Attributes:
        exponents: How many values of p phase 1 measures.
        least_exponent: The first.
        largest_exponent: The last.
        sweeps: Of Powell's method; a share of one ends within it.
        reach: How far a line search goes to either side, in multiples of the ranges of phase 2.
        tolerance: To which it finds the minimum, likewise.
        bias_correction: Take the shift of mean outputs out.
        batch: Images evaluated together.
        cache_megabytes: What a line search does not change is computed once, if it takes no more
            memory than this.
    """

    exponents: int = 10
    least_exponent: float = 2.0
    largest_exponent: float = 4.0
    sweeps: float = 2.0
    reach: float = 0.5
    tolerance: float = 0.01
    bias_correction: bool = True
    batch: int = 64
    cache_megabytes: int = 4096

    def __post_init__(self) -> None:
        for name, least in (("exponents", 3), ("batch", 1), ("cache_megabytes", 0), ("sweeps", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise UsageError(
                    f"lapq: expected {name} at least {least}, got {getattr(self, name)}"
                )
        for name in ("least_exponent", "reach", "tolerance"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"lapq: expected {name} above 0, got {getattr(self, name)}")
        if not self.least_exponent < self.largest_exponent < math.inf:
            raise UsageError(
                "lapq: expected largest_exponent above least_exponent, got "
                f"{self.largest_exponent} and {self.least_exponent}"
            )

    def scaled(self, share: float) -> LAPQConfig:
        """The same schedule in ``share`` of its measurements."""
        return replace(
            self, exponents=max(round(self.exponents * share), 3), sweeps=self.sweeps * share
        )


def vertex(exponents: Tensor, losses: Tensor) -> float:
    """Where the least-squares parabola through ``(exponents, losses)``, float64 ``[n]``, is least.

    The exponent of least loss, if the parabola has no minimum or has it beyond the exponents.
    """
    centre = exponents.mean()
    powers = torch.stack([(exponents - centre) ** k for k in range(3)], 1)
    _, slope, curvature = torch.linalg.lstsq(powers, losses[:, None]).solution[:, 0]
    least = centre - slope / (2 * curvature)
    if curvature > 0 and exponents.min() <= least <= exponents.max():
        return float(least)
    return float(exponents[losses.argmin()])


class Powell:
    """Powell's direction-set method, one line search at a time.

    Attributes:
        point: Best point found, float64 ``[N]``.
        value: The loss there.
    """

    def __init__(self, point: Tensor, value: float, reach: float, tolerance: float) -> None:
        self.point, self.value = point, value
        self.reach, self.tolerance = reach, tolerance
        self.directions = torch.eye(len(point), dtype=torch.float64)
        self.next_direction = 0
        self._begin_sweep()

    def _begin_sweep(self) -> None:
        self.start, self.start_value = self.point, self.value
        self.fall, self.steepest = 0.0, 0

    def step(self, along: Along) -> None:
        """Search along the next direction, or, at the end of a sweep, choose a new one."""
        i = self.next_direction
        if i < len(self.point):
            before = self.value
            self._search(along, self.directions[i])
            if before - self.value > self.fall:
                self.fall, self.steepest = before - self.value, i
            self.next_direction += 1
            return
        shift = self.point - self.start
        if self._turns(along, shift):
            self._search(along, shift)
            self.directions[self.steepest] = self.directions[-1]
            self.directions[-1] = shift
        self.next_direction = 0
        self._begin_sweep()

    def _turns(self, along: Along, shift: Tensor) -> bool:
        """Whether the way of the whole sweep is to replace its steepest direction."""
        if not shift.any() or bool((self.point + shift < _LEAST).any()):
            return False
        beyond = along(self.point, shift)(1.0)
        bend = 2 * (self.start_value - 2 * self.value + beyond)
        rest = self.start_value - self.value - self.fall
        return (
            beyond < self.start_value
            and bend * rest**2 < self.fall * (self.start_value - beyond) ** 2
        )

    def _search(self, along: Along, direction: Tensor) -> None:
        largest = float(direction.abs().max())
        low, high = -self.reach / largest, self.reach / largest
        # The point stays at _LEAST or above.
        room = (self.point - _LEAST) / direction.abs()
        low = max(low, -float(room[direction > 0].min())) if (direction > 0).any() else low
        high = min(high, float(room[direction < 0].min())) if (direction < 0).any() else high
        if not low < high:
            return
        from scipy.optimize import minimize_scalar  # slow to import

        found = minimize_scalar(
            along(self.point, direction),
            bounds=(low, high),
            method="bounded",
            options={"xatol": self.tolerance / largest},
        )
        if found.fun < self.value:
            self.point, self.value = self.point + float(found.x) * direction, float(found.fun)

    def state_dict(self) -> dict[str, Any]:
        """Where it is, and what it has seen in this sweep."""
        return {
            "point": self.point,
            "value": self.value,
            "directions": self.directions,
            "next_direction": self.next_direction,
            "start": self.start,
            "start_value": self.start_value,
            "fall": self.fall,
            "steepest": self.steepest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for name in ("point", "directions", "start"):
            setattr(self, name, state[name].cpu())
        for name in ("value", "start_value", "fall"):
            setattr(self, name, float(state[name]))
        self.next_direction, self.steepest = int(state["next_direction"]), int(state["steepest"])


class _Rest(Interpreter):
    """What a network computes from ``changed`` nodes on, on all images, again and again."""

    def __init__(
        self, network: GraphModule, changed: Iterable[Node], batches: list[Tensor], bytes_: int
    ) -> None:
        super().__init__(network)
        self.extra_traceback = False
        reached = set(changed)
        for node in self.graph.nodes:
            if any(n in reached for n in node.all_input_nodes):
                reached.add(node)
        border = {n for r in reached for n in r.all_input_nodes if n not in reached}
        size = sum(n.meta["shape"][1:].numel() for n in border if "shape" in n.meta)
        if 4 * size * sum(len(batch) for batch in batches) > bytes_:
            reached, border = set(self.graph.nodes), set()
        self.kept = border
        self.results: dict[Node, Any] = {}
        #: For each batch, the images and the values that the changed nodes look at.
        self.begun: list[tuple[Tensor, dict[Node, Any]]] = []
        others = [n for n in self.graph.nodes if n not in reached]
        for batch in batches:
            self.results = {}
            self.run(batch, initial_env=dict.fromkeys(reached))
            self.begun.append((batch, dict.fromkeys(others) | self.results))
        self.kept = set()

    @override
    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.kept:
            self.results[n] = result
        return result

    def logits(self) -> Tensor:
        """The network's output for all images."""
        return torch.cat([self.run(x, initial_env=dict(known)) for x, known in self.begun])


class _Range:
    """Ranges that one multiplier moves: those of a layer's channels, or that of an activation.

    Attributes:
        node: Where the graph calls the layer or the quantizer.
        low: Lower ends that phase 1 or 2 found.
        high: Upper ends.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.low = self.high = torch.zeros(())

    def find(self, rule: RangeRule) -> None:
        """Choose the ends by ``rule``."""
        raise NotImplementedError

    def set(self, multiplier: float) -> None:
        """Multiply the ends."""
        raise NotImplementedError


class _WeightRanges(_Range):
    """Those of a layer's channels, ``[C]``, and the mean outputs that come with them."""

    def __init__(self, node: Node, layer: QuantizedConv2d | QuantizedLinear) -> None:
        super().__init__(node)
        self.layer = layer
        #: Where the outputs' means are corrected, in which direction, and what was there before.
        self.shift: Tensor | None = None
        self.sign, self.unshifted = 1, torch.empty(0)
        self.mean_input = torch.empty(0)

    def correct(self, norm: nn.Module | None, mean_input: Tensor) -> None:
        """From now on, take out what the errors of the weights add to the outputs' means.

        Args:
            norm: The batch normalisation that alone reads the result, if there is one.
            mean_input: ``[G, N]``, see `patches`.
        """
        if isinstance(norm, _BatchNorm):
            self.shift, self.sign = norm.running_mean, 1
        else:
            self.shift, self.sign = self.layer.bias, -1
        if self.shift is not None:
            self.unshifted, self.mean_input = self.shift.detach().clone(), mean_input

    @override
    def find(self, rule: RangeRule) -> None:
        weight = self.layer.weight.detach().flatten(1)
        grid = self.layer.weight_quantizer.grid
        self.low, self.high = find_range(weight, None, *weight.aminmax(dim=1), grid, rule)
        self.set(1.0)

    @override
    def set(self, multiplier: float) -> None:
        quantizer, weight = self.layer.weight_quantizer, self.layer.weight
        quantizer.set_range(self.low * multiplier, self.high * multiplier)
        if self.shift is not None:
            errors = rows(self.layer, quantizer(weight) - weight)
            moved = torch.einsum("gmn,gn->gm", errors, self.mean_input).flatten()
            self.shift.copy_(self.unshifted + self.sign * moved)


class _ActivationRange(_Range):
    """That of an activation.

    Attributes:
        histogram: Of its values on all images.
    """

    def __init__(self, node: Node, quantizer: ActivationQuantizer) -> None:
        super().__init__(node)
        self.quantizer = quantizer
        self.histogram = Histogram()

    @override
    def find(self, rule: RangeRule) -> None:
        self.quantizer.rule = rule
        self.quantizer.calibrate(self.histogram)
        self.quantizer.mode = "quantize"
        self.low, self.high = self.quantizer.low.clone(), self.quantizer.high.clone()

    @override
    def set(self, multiplier: float) -> None:
        self.quantizer.low.copy_(self.low * multiplier)
        self.quantizer.high.copy_(self.high * multiplier)
        self.quantizer.range_changed()


class LAPQ(Method):
    """All ranges searched together for the loss of the network."""

    summary = "ranges searched together for the least cross entropy (Powell's method)"
    presets = "lapq"
    learns_ranges = False
    sections = ("lapq",)
    fixed_ranges: ClassVar[Mapping[str, str]] = {"weight_range": "lp", "activation_range": "lp"}

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.lapq
        self.problem = problem
        self.quantization = replace(problem.quantization, weight_range="lp", activation_range="lp")
        self.student = replace(problem, quantization=self.quantization).student()
        self.student.requires_grad_(False)
        self.batches = list(problem.images.split(self.config.batch))
        modules = dict(self.student.named_modules())
        self.weights: list[_WeightRanges] = []
        self.activations: list[_ActivationRange] = []
        for node in self.student.graph.nodes:
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
                self.weights.append(_WeightRanges(node, module))
            elif isinstance(module, ActivationQuantizer):
                self.activations.append(_ActivationRange(node, module))
        with must_fit(settings__lapq__batch=self.config.batch):
            if self.config.bias_correction:
                self._correct(modules)
            self._see_activations()
        self.ranges: list[_Range] = [*self.weights, *self.activations]
        self.exponents = torch.linspace(
            self.config.least_exponent,
            self.config.largest_exponent,
            self.config.exponents,
            dtype=torch.float64,
        )
        self.losses = torch.zeros_like(self.exponents)
        ones = torch.ones(len(self.ranges), dtype=torch.float64)
        self.powell = Powell(ones, math.inf, self.config.reach, self.config.tolerance)
        searches = self.config.sweeps * (len(self.ranges) + 1)
        self.iterations = self.config.exponents + 1 + round(searches)

    @torch.no_grad()
    def _correct(self, modules: dict[str, nn.Module]) -> None:
        """See what every layer reads on average in the float network."""
        network = float_copy(self.student)
        sums: dict[nn.Module, Tensor] = {}

        def add(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            total = patches(layer, arguments[0].sum(0)[None]).mean(1)
            sums[layer] = sums[layer] + total if layer in sums else total

        layers = [network.get_submodule(str(ranges.node.target)) for ranges in self.weights]
        for layer in layers:
            layer.register_forward_pre_hook(add)
        for batch in self.batches:
            network(batch)
        for ranges, layer in zip(self.weights, layers, strict=True):
            after = list(ranges.node.users)
            norm = modules.get(str(after[0].target)) if len(after) == 1 else None
            ranges.correct(norm, sums[layer] / len(self.problem.images))

    @torch.no_grad()
    def _see_activations(self) -> None:
        """Count the values of activations that nothing but weights have changed."""
        for weights in self.weights:
            weights.find(RangeRule("lp", exponent=self.config.least_exponent))
        with collecting([a.quantizer for a in self.activations]) as histograms:
            for batch in self.batches:
                self.student(batch)
        for activation, histogram in zip(self.activations, histograms, strict=True):
            activation.histogram = histogram

    @torch.no_grad()
    def _set_exponent(self, p: float) -> None:
        """Every tensor's own range of least error to the power ``p``."""
        for ranges in self.ranges:
            ranges.find(RangeRule("lp", exponent=p))

    def loss(self, logits: Tensor) -> float:
        """L of logits ``[n, K]`` of all images."""
        return float(F.cross_entropy(logits.double(), self.problem.labels))

    def along(self, point: Tensor, direction: Tensor) -> Callable[[float], float]:
        """L of the ranges' multipliers on the line through ``point``."""
        moved = direction.nonzero().flatten().tolist()
        changed = [self.ranges[i].node for i in moved]
        rest = _Rest(self.student, changed, self.batches, self.config.cache_megabytes * 2**20)

        def value(t: float) -> float:
            for i in moved:
                self.ranges[i].set(float(point[i] + t * direction[i]))
            return self.loss(rest.logits())

        return value

    @override
    @torch.no_grad()
    def step(self, iteration: int) -> Mapping[str, Tensor]:
        with must_fit(settings__lapq__batch=self.config.batch):
            value = self._measured(iteration)
        return {"loss": torch.tensor(value)}

    def _measured(self, iteration: int) -> float:
        if iteration > self.config.exponents:
            with stage("line search"):
                self.powell.step(self.along)
                for ranges, multiplier in zip(self.ranges, self.powell.point, strict=True):
                    ranges.set(float(multiplier))
            return self.powell.value
        p = vertex(self.exponents, self.losses)
        if iteration < self.config.exponents:
            p = float(self.exponents[iteration])
        with stage("exponent"):
            self._set_exponent(p)
            value = self.loss(torch.cat([self.student(batch) for batch in self.batches]))
        if iteration < self.config.exponents:
            self.losses[iteration] = value
        else:
            self.powell.value = self.powell.start_value = value
        return value

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "low": [ranges.low for ranges in self.ranges],
            "high": [ranges.high for ranges in self.ranges],
            "losses": self.losses,
            "powell": self.powell.state_dict(),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        for ranges, low, high in zip(self.ranges, state["low"], state["high"], strict=True):
            ranges.low, ranges.high = low, high
        self.losses = state["losses"].cpu()
        self.powell.load_state_dict(state["powell"])
