"""LAPQ: loss aware post-training quantization (Nahshan et al., Machine Learning 2021).

LAPQ neither trains weights nor learns their rounding. It searches the ranges of all tensors
together, to minimise the cross entropy L of the quantized network on the labelled calibration
images, in three phases:

1. For ten exponents p from 2 to 4, every tensor gets the range with the smallest
   ``E |x - Q(x)|^p``, and L(p) is measured.
2. A parabola through the ten points ``(p, L(p))`` has its vertex at p*. The search starts from the
   ranges for p*.
3. Powell's direction-set method (Powell 1964; Press et al., Numerical Recipes, 10.7) minimises L
   over the multipliers m of these ranges by one line search after another. A sweep searches along
   each direction d_i. It begins at x_0 with the loss L_0 and ends at x_N with L_N. L_E is the loss
   at 2 x_N - x_0, and D is the largest decrease along one direction, d_k. Then

       d_k <- d_N,  d_N <- x_N - x_0, and a search along it,   if L_E < L_0 and
           2 (L_0 - 2 L_N + L_E) (L_0 - L_N - D)^2 < D (L_0 - L_E)^2

Weight quantization shifts a layer's mean output by ``e_c = sum_j (Q(w) - w)_cj E[x_j]``. This shift
is subtracted again, in the running mean of the batch normalisation that follows or in the layer's
bias.

Differences::

                                 | authors' code                       | here
    -----------------------------+-------------------------------------+----------------------------
    tensors                      | first and last layer, classifier    | all that the configuration
                                 | and residual sums stay in float     | quantizes
    -----------------------------+-------------------------------------+----------------------------
    activation ranges in phase 1 | from a pass with earlier layers     | from one pass with float
                                 | quantized                           | activations and with
                                 |                                     | weights at the first
                                 |                                     | exponent
    -----------------------------+-------------------------------------+----------------------------
    calibration images           | validation images                   | training images
    -----------------------------+-------------------------------------+----------------------------
    correction of mean outputs   | subtracts the mean error of a       | subtracts e_c, the mean
                                 | channel's weights from each of      | effect of all errors; costs
                                 | them; they leave the grid, which    | nothing in an integer
                                 | costs a product with the sum of the | program
                                 | inputs for every pixel              |

* Every channel of a weight has its own range. All channels of a layer share one m.
* The zero is on the grid, see `Grid`.
* If the parabola opens downwards, or its vertex is outside the exponents, phase 3 starts from the
  best measured exponent.
* A line search is Brent's bounded method within a reach around the current point, because L is a
  step function far from convex. Its result counts only if L falls.
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
from ..quantization.student import collecting, float_copy
from .base import Method, Problem
from .patches import patches, rows

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["LAPQ", "LAPQConfig", "Powell", "vertex"]

#: Smallest multiplier of a range.
_LEAST = 0.05

#: From a point and a direction: the loss at ``point + t * direction`` as a function of t.
Along = Callable[[Tensor, Tensor], Callable[[float], float]]


@dataclass(frozen=True)
class LAPQConfig:
    """Settings of LAPQ's search.

    Attributes:
        exponents: Number of exponents p in phase 1.
        least_exponent: Smallest exponent.
        largest_exponent: Largest exponent.
        sweeps: Number of sweeps of Powell's method; a fraction ends within a sweep.
        reach: Distance that a line search covers on both sides, in multiples of the ranges of phase
            2.
        tolerance: Accuracy of a line search, in the same unit.
        bias_correction: Whether the shift of mean outputs is subtracted.
        batch: Images evaluated together.
        cache_megabytes: Memory for results that a line search reuses, in MiB. If they need more,
            they are computed again each time.
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
        """Return the same schedule with ``share`` of its measurements."""
        return replace(
            self, exponents=max(round(self.exponents * share), 3), sweeps=self.sweeps * share
        )


def vertex(exponents: Tensor, losses: Tensor) -> float:
    """Return the minimum of the least-squares parabola through ``(exponents, losses)``.

    Both are float64 ``[n]``. Without a minimum between the exponents, return the exponent with the
    smallest loss.
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
        value: Loss at this point.
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
        """Search along the next direction, or, at the end of a sweep, choose a new direction."""
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
        """Return whether the shift of the whole sweep replaces its steepest direction."""
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
        # Every multiplier stays at or above _LEAST.
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
        """Return the current point and what the current sweep has measured."""
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
        """Restore the state that `state_dict` returned."""
        for name in ("point", "directions", "start"):
            setattr(self, name, state[name].cpu())
        for name in ("value", "start_value", "fall"):
            setattr(self, name, float(state[name]))
        self.next_direction, self.steepest = int(state["next_direction"]), int(state["steepest"])


class _Rest(Interpreter):
    """The part of a network that depends on ``changed`` nodes, for repeated runs on all images."""

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
        #: Images of each batch, and the values that the changed nodes read.
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
        return torch.cat([self.run(x, initial_env=dict(known)) for x, known in self.begun])


class _Range:
    """Ranges with one multiplier: those of a layer's channels, or that of an activation.

    Attributes:
        node: Node that calls the layer or the quantizer.
        low: Lower ends from phase 1 or 2.
        high: Upper ends.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.low = self.high = torch.zeros(())

    def find(self, rule: RangeRule) -> None:
        """Choose the ends by ``rule``."""
        raise NotImplementedError

    def set(self, multiplier: float) -> None:
        """Multiply the ends by ``multiplier``."""
        raise NotImplementedError


class _WeightRanges(_Range):
    """Ranges of a layer's channels, ``[C]``, and the correction of its mean outputs."""

    def __init__(self, node: Node, layer: QuantizedConv2d | QuantizedLinear) -> None:
        super().__init__(node)
        self.layer = layer
        #: Tensor that takes the correction, its sign there, and the tensor's original values.
        self.shift: Tensor | None = None
        self.sign, self.unshifted = 1, torch.empty(0)
        self.mean_input = torch.empty(0)

    def correct(self, norm: nn.Module | None, mean_input: Tensor) -> None:
        """From now on, subtract the shift of mean outputs that weight errors cause.

        Args:
            norm: Batch normalisation that alone reads the layer's output, if any.
            mean_input: Mean inputs, ``[G, N]``, see `patches`.
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
    """Range of an activation.

    Attributes:
        histogram: Histogram of its values on all images.
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
    """All ranges, searched together to minimise the loss of the network."""

    summary = "ranges searched together for the smallest cross entropy (Powell's method)"
    presets = "lapq"
    learns_ranges = False
    corrects_biases = False
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
        """Prepare the correction: measure each layer's mean inputs in the float network."""
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
        """Collect histograms of all activations, with quantized weights and float activations."""
        for weights in self.weights:
            weights.find(RangeRule("lp", exponent=self.config.least_exponent))
        with collecting([a.quantizer for a in self.activations]) as histograms:
            for batch in self.batches:
                self.student(batch)
        for activation, histogram in zip(self.activations, histograms, strict=True):
            activation.histogram = histogram

    @torch.no_grad()
    def _set_exponent(self, p: float) -> None:
        """Give every tensor the range with the smallest error to the power ``p``."""
        for ranges in self.ranges:
            ranges.find(RangeRule("lp", exponent=p))

    def loss(self, logits: Tensor) -> float:
        """Return L for logits ``[n, K]`` of all images."""
        return float(F.cross_entropy(logits.double(), self.problem.labels))

    def along(self, point: Tensor, direction: Tensor) -> Callable[[float], float]:
        """Return L as a function of the position on a line through ``point``."""
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
