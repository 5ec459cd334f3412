"""Bit-Split: bit-split and stitching (Wang et al., ICML 2020).

A symmetric integer of b bits is a weighted sum of b - 1 digits -1, 0 or 1. So the weights w of one
output are written as ``w ~ alpha v`` with ``v = sum_i B_i / 2^i``, i = 0 .. b - 2. The codes v
2^(b-2) reach from -(2^(b-1) - 1) to 2^(b-1) - 1. Each layer takes three steps:

A. Rounding. Start with ``alpha = max|w| / (2^(b-1) - 1)``. Repeat ``q = clip(round(w / alpha))``
   and ``alpha = <w, q> / <q, q>`` until alpha is constant. The digits are the bits of |q| with the
   sign of q.
B. Weights. Repeat ``alpha = <w, v> / <v, v>``, then find for every i the digits with the smallest
   ``|w - alpha v|^2``. With ``r = w - alpha (v - B_i / 2^i)`` and c = alpha / 2^i, they are
   ``B_i = sign(r)`` where ``2 |r| >= c``, else 0.
C. Responses. The rows of X are the inputs that the weights multiply, in the network quantized so
   far. Y holds the float network's responses. Minimise ``|Y - alpha X v|^2`` over alpha, which
   gives ``<Y, X v> / <X v, X v>``, and over one digit after another, for all outputs at once. Let
   ``A = X^T X``, ``D = (Y - alpha X v)^T X`` and ``h = D_n + c B_in A_nn``. Digit n of plane i
   becomes ``sign(h)`` if ``2 |h| >= c A_nn``, else 0. Then ``D -= c (new - old) A_n``.

Finally, Lloyd's iterations ``q = clip(round(x / s))``, ``s = <x, q> / <q, q>``, started at the full
range, minimise the squared error of every unsigned activation over its scale s. Weights are
quantized, all activations float. Before and after that, the BN statistics are measured again.

Differences::

                             | paper             | authors' code        | here
    -------------------------+-------------------+----------------------+-----------------------
    inputs X of step C       | quantized network | float network (the   | quantized network,
                             |                   | other is an unused   | unless `compensate` is
                             |                   | option)              | false
    -------------------------+-------------------+----------------------+-----------------------
    convolutions             |                   | the first with 8     | steps A to C with the
                             |                   | bits                 | configured bits
    -------------------------+-------------------+----------------------+-----------------------
    classifier               |                   | A and B with 8 bits  | A and B with the
                             |                   |                      | configured bits
    -------------------------+-------------------+----------------------+-----------------------
    input that is always 0,  |                   | formulas divide by 0 | digits do not change
    output with zero weights |                   |                      |
    -------------------------+-------------------+----------------------+-----------------------
    images for X             |                   | augmented training   | augmented calibration
                             |                   | images per layer     | images, the same for
                             |                   |                      | all layers
    -------------------------+-------------------+----------------------+-----------------------
    images for BN statistics |                   | augmented training   | other views of the
                             |                   | images               | calibration images
    -------------------------+-------------------+----------------------+-----------------------
    scale per channel of an  | yes               | no                   | optional
    activation               |                   |                      |

* With b = 2 there is one plane of digits -1, 0 or 1.
* Step C can be damped. It ends when no digit changes.
* Signed tensors use the configured range rule.
* Lloyd's iterations use a histogram. Its zeros cannot change s.
* With `channel_scales`, every channel of an activation has its own scale, where one layer alone
  reads a BN and a ReLU, see `fdda_ext.methods.channel_scales`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from ..data import augment
from ..engine import must_fit, restore_random, stage
from ..errors import UsageError
from ..quantization.equalisation import clip_exactly_
from ..quantization.layers import QuantizedConv2d, QuantizedLinear
from ..quantization.operations import tensor_inputs
from ..quantization.prepare import quantize_traced
from ..quantization.ranges import RangeRule
from ..quantization.student import activation_quantizers, collecting, float_copy
from ..reconstruction import BATCH, Frontier, partition
from .base import Method, Problem
from .channel_scales import fold_channel_scales_
from .patches import patches, rows

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["BitSplit", "BitSplitConfig", "Planes", "Responses"]

#: Inputs whose products with all other inputs are subtracted together.
_BLOCK = 64


@dataclass(frozen=True)
class BitSplitConfig:
    """Data and rounds of Bit-Split.

    Attributes:
        views: Augmented views of each calibration image for the layers; 0 for the image itself.
        positions: Output positions drawn at random from each view of a convolution's input.
        weight_rounds: Largest number of rounds of step B.
        rounds: Largest number of rounds of step C.
        damping: Value added to the diagonal of A, as a multiple of its mean. It keeps weights
            closer to their float values. The paper has 0.
        compensate: Whether inputs come from the network quantized so far, so that a layer corrects
            the errors of earlier ones; if not, from the float network.
        channel_scales: Whether every channel of an activation has its own scale. The weights take
            these scales over before they are split, so that they also correct the errors.
        statistics_views: Views of each image for the new BN statistics; 0 keeps the old ones.
        batch: Images in a forward pass, except in passes that fill caches.
        cache_megabytes: Largest inputs of a layer kept in memory, in MiB; larger ones go to a file.
    """

    views: int = 2
    positions: int = 6
    weight_rounds: int = 50
    rounds: int = 100
    damping: float = 0.0
    compensate: bool = True
    channel_scales: bool = False
    statistics_views: int = 13
    batch: int = 64
    cache_megabytes: int = 4096

    def __post_init__(self) -> None:
        for name, least in (
            ("views", 0),
            ("positions", 1),
            ("weight_rounds", 0),
            ("rounds", 0),
            ("damping", 0),
            ("statistics_views", 0),
            ("batch", 2),
            ("cache_megabytes", 0),
        ):
            if not least <= getattr(self, name) < math.inf:
                raise UsageError(
                    f"bitsplit: expected {name} at least {least}, got {getattr(self, name)}"
                )

    def scaled(self, share: float) -> BitSplitConfig:
        """Return the same settings with ``share`` of the rounds and as many iterations."""
        return replace(
            self,
            weight_rounds=round(self.weight_rounds * share),
            rounds=round(self.rounds * share),
        )


class Planes:
    """Weights as digits and scales, for steps A and B.

    Attributes:
        weight: w, float64 ``[G, m, N]``: G groups of m outputs with N weights each.
        digits: B, with values -1, 0 or 1, float64 ``[b - 1, G, m, N]``.
        alpha: Positive factors of v, float64 ``[G, m]``.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        self.weight = weight.double().cpu()  # the loop over digits runs on the CPU
        self.bits = bits
        self.largest = 2 ** (bits - 1) - 1
        self.digits = self.weight.new_zeros(bits - 1, *weight.shape)
        self.alpha = self.weight.new_ones(weight.shape[:2])

    @property
    def v(self) -> Tensor:
        """The stitched digits v, ``[G, m, N]``."""
        shares = 0.5 ** torch.arange(self.bits - 1, dtype=torch.float64, device=self.digits.device)
        return torch.einsum("i,igmn->gmn", shares, self.digits)

    @property
    def integers(self) -> Tensor:
        """The codes, ``[G, m, N]``."""
        return self.v * 2 ** (self.bits - 2)

    @property
    def scale(self) -> Tensor:
        """The scale of the codes, ``[G, m]``."""
        return self.alpha * 0.5 ** (self.bits - 2)

    def fit(self, like: Tensor, by: Tensor) -> float:
        """Set alpha to ``<like, v> / <by, v>`` where positive; return its largest change."""
        v = self.v
        best = (like * v).sum(2) / (by * v).sum(2)
        new = torch.where(best.isfinite() & (best > 0), best, self.alpha)
        moved = float((new - self.alpha).abs().max())
        self.alpha = new
        return moved

    def round(self) -> None:
        """Run step A."""
        scale = self.weight.abs().amax(2) / self.largest
        scale = torch.where(scale > 0, scale, 1.0)
        moved = math.inf
        while moved > 1e-9:
            q = (self.weight / scale[..., None]).round().clamp(-self.largest, self.largest)
            best = (self.weight * q).sum(2) / (q * q).sum(2)
            best = torch.where(best.isfinite(), best, scale)
            moved, scale = float((best - scale).abs().max()), best
        self.alpha = scale * 2 ** (self.bits - 2)
        magnitude = q.abs().long()
        for i in range(self.bits - 1):
            self.digits[i] = q.sign() * (magnitude >> (self.bits - 2 - i) & 1)

    def split(self, rounds: int) -> None:
        """Run step B."""
        for _ in range(rounds):
            moved = self.fit(self.weight, self.v)
            for i in range(self.bits - 1):
                c = self.alpha[..., None] / 2**i
                rest = self.weight - self.alpha[..., None] * self.v + c * self.digits[i]
                self.digits[i] = _digit(rest, c)
            if moved <= 1e-9:
                break


def _digit(target: Tensor, unit: Tensor) -> Tensor:
    """Return the digit whose multiple of ``unit`` is nearest to ``target``; of two, not 0."""
    return torch.where(2 * target.abs() >= unit, target.sign(), 0.0)


class Responses:
    """Products of a layer's inputs X and float responses Y, for step C.

    Attributes:
        gram: A, float64 ``[G, N, N]``.
        cross: Y^T X, float64 ``[G, m, N]``.
        energy: |Y|^2 of every output, float64 ``[G, m]``.
    """

    def __init__(self, weight: Tensor) -> None:
        groups, m, n = weight.shape
        self.weight = weight.double()
        self.gram = self.weight.new_zeros(groups, n, n)
        self.cross = self.weight.new_zeros(groups, m, n)
        self.energy = self.weight.new_zeros(groups, m)

    def add(self, x: Tensor, float_x: Tensor) -> None:
        """Add rows ``x [G, K, N]`` and the float responses to the rows ``float_x``.

        Both inputs and their products are float32; the sums are float64.
        """
        y = self.weight.to(float_x) @ float_x.transpose(1, 2)
        self.gram += x.transpose(1, 2) @ x
        self.cross += y @ x
        self.energy += y.square().sum(2)

    def damp(self, share: float) -> None:
        """Apply `BitSplitConfig.damping`, given as ``share``."""
        strength = share * self.gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        self.gram.diagonal(dim1=1, dim2=2).add_(strength[:, 0])
        self.cross += strength * self.weight
        self.energy += strength[:, 0] * self.weight.square().sum(2)

    def error(self, planes: Planes) -> Tensor:
        """Return |Y - alpha X v|^2 of every output, ``[G, m]``."""
        v, alpha = planes.v, planes.alpha
        fitted = alpha * (v * (v @ self.gram.cpu())).sum(2) - 2 * (v * self.cross.cpu()).sum(2)
        return self.energy.cpu() + alpha * fitted

    def reconstruct(self, planes: Planes, rounds: int) -> None:
        """Run step C."""
        self.gram, self.cross = self.gram.cpu(), self.cross.cpu()
        products = planes.v @ self.gram
        for _ in range(rounds):
            planes.fit(self.cross, products)
            changed = [self._improve(planes, i, products) for i in range(planes.bits - 1)]
            if not any(changed):
                break

    def _improve(self, planes: Planes, i: int, products: Tensor) -> bool:
        """Improve the digits of plane ``i`` and update ``products``, v A; return if one changed."""
        changed = False
        alpha = planes.alpha[..., None]
        for begin in range(0, self.gram.shape[1], _BLOCK):
            block = slice(begin, begin + _BLOCK)
            digits = planes.digits[i, :, :, block]
            slack = (self.cross[:, :, block] - alpha * products[:, :, block]) * 2**i / alpha
            moved = _improve_block(digits, slack, self.gram[:, block, block])
            if moved.any():
                changed = True
                digits += moved
                products += moved @ self.gram[:, block] / 2**i
        return changed


def _improve_block(digits: Tensor, slack: Tensor, gram: Tensor) -> Tensor:
    """Return the changes of the digits of a block of T inputs: the loop of step C.

    NumPy takes a fraction of torch's time for operations on so few values.

    Args:
        digits: Digits ``[G, m, T]``, on the CPU like all arguments.
        slack: D / c, ``[G, m, T]``.
        gram: A of the block, ``[G, T, T]``.
    """
    old = digits.permute(2, 0, 1).contiguous().numpy()
    rest = slack.permute(2, 0, 1).contiguous().numpy()
    rows_of_gram = gram.permute(1, 2, 0)[..., None].contiguous().numpy()  # [T, T, G, 1]
    moved = np.zeros_like(old)
    for n in range(len(old)):
        # An input that is always 0 has no slack: any divisor but 0 keeps its digit.
        size = rows_of_gram[n, n]
        target = old[n] + rest[n] / np.where(size > 0, size, 1.0)
        moved[n] = np.sign(target) * (np.abs(target) >= 0.5) - old[n]
        if moved[n].any():
            rest[n + 1 :] -= rows_of_gram[n, n + 1 :] * moved[n]
    return torch.from_numpy(moved).permute(1, 2, 0)


class BitSplit(Method):
    """Integer weights for each layer's responses, digit by digit, then activation scales."""

    summary = "integer weights with the smallest response error, found digit by digit"
    presets = "bitsplit"
    learns_ranges = False
    corrects_biases = False
    sections = ("bitsplit",)

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.bitsplit
        self.problem = problem
        #: Not min-max, which on the paper grid follows the weights and would change the codes.
        self.quantization = problem.quantization
        if self.quantization.weight_range == "minmax":
            self.quantization = replace(self.quantization, weight_range="mse")
        self.random = problem.random()
        self.teacher = problem.network()
        if self.config.channel_scales:
            with must_fit(settings__bitsplit__batch=self.config.batch):
                bits = self.quantization.activation_bits
                folded = fold_channel_scales_(self.teacher, problem.images, bits)
            if not folded:
                raise UsageError(
                    "bitsplit: expected channel_scales false, because no layer of this network is "
                    "the only reader of a batch normalisation and a ReLU (not ReLU6), got true"
                )
        student = quantize_traced(copy.deepcopy(self.teacher), self.quantization)
        self.student = student.requires_grad_(False)
        clip_exactly_(self.teacher)
        modules = dict(self.student.named_modules())
        #: Nodes that call convolutions and linear layers, in order.
        self.layers: list[Node] = [
            node
            for node in self.student.graph.nodes
            if node.op == "call_module"
            and isinstance(modules[str(node.target)], (QuantizedConv2d, QuantizedLinear))
        ]
        self.iterations = len(self.layers) + 1
        with must_fit(settings__bitsplit__views=self.config.views):
            # From a new generator, so that a resumed run has the same views.
            views = torch.cat(list(self._views(self.config.views, problem.random())))
        units = partition(self.student, "layer", views[:1], quantize="input")
        stops = [
            (tensor_inputs(layer)[0].name, *unit.inputs)
            for layer, unit in zip(self.layers, units, strict=True)
        ]
        limit = self.config.cache_megabytes * 2**20
        #: Inputs of every layer, in the float network and in the partly quantized student.
        self.float_inputs = Frontier(float_copy(self.student), stops, views, limit)
        self.inputs = Frontier(self.student, stops, views, limit)

    def _views(self, count: int, random: torch.Generator) -> Iterator[Tensor]:
        """Yield ``count`` augmented views of each calibration image, in batches.

        If ``count`` is 0, yield the images themselves. Views are shuffled: images are sorted by
        class, and the BN statistics of a batch from few classes differ from those of all images.
        """
        images = self.problem.images
        batches = -(-len(images) // self.config.batch)
        if not count:
            yield from images.tensor_split(batches)
        for _ in range(count):
            order = torch.randperm(len(images), generator=random, device=images.device)
            for chosen in order.tensor_split(batches):
                yield augment(images[chosen], self.problem.augmentation, random)

    @override
    @torch.no_grad()
    def step(self, iteration: int) -> Mapping[str, Tensor]:
        if iteration < len(self.layers):
            with must_fit(settings__bitsplit__cache_megabytes=self.config.cache_megabytes):
                return {"error": self._quantize_weights(iteration)}
        self.float_inputs.restart()
        self.inputs.restart()
        with must_fit(settings__bitsplit__batch=self.config.batch):
            return {"error": self._quantize_activations()}

    def _quantize_weights(self, iteration: int) -> Tensor:
        """Run steps A to C on one layer; return the relative squared error of its responses.

        For a classifier, run A and B; return that of its weights.
        """
        layer = self.student.get_submodule(str(self.layers[iteration].target))
        assert isinstance(layer, (QuantizedConv2d, QuantizedLinear))
        weight = rows(layer, layer.weight)
        planes = Planes(weight, layer.weight_quantizer.grid.bits)
        with stage("weights"):
            planes.round()
            planes.split(self.config.weight_rounds)
            error = (planes.weight - planes.alpha[..., None] * planes.v).square()
            relative = error.sum() / planes.weight.square().sum()
        if isinstance(layer, QuantizedConv2d):
            with stage("responses"):
                responses = self._responses(iteration, layer)
            with stage("reconstruction"):
                responses.reconstruct(planes, self.config.rounds)
                relative = responses.error(planes).sum() / responses.energy.sum()
        _bake(layer, planes)
        return relative

    def _responses(self, iteration: int, layer: QuantizedConv2d) -> Responses:
        responses = Responses(rows(layer, layer.weight))
        float_inputs, *_ = self.float_inputs.at(iteration)
        image = float_inputs.read(torch.zeros(1, dtype=torch.int64))
        count = layer._conv_forward(image, layer.weight, None).shape[2:].numel()
        inputs, *_ = self.inputs.at(iteration) if self.config.compensate else (float_inputs,)
        for x, float_x in zip(inputs.split(BATCH), float_inputs.split(BATCH), strict=True):
            order = torch.rand(len(x), count, generator=self.random, device=x.device).argsort(1)
            positions = order[:, : self.config.positions]
            responses.add(patches(layer, x, positions), patches(layer, float_x, positions))
        responses.damp(self.config.damping)
        return responses

    def _quantize_activations(self) -> Tensor:
        """Set scales and BN statistics; return the relative squared error of the logits."""
        self._renew_statistics()
        quantizers = activation_quantizers(self.student)
        for quantizer in quantizers:
            if not quantizer.signed:
                quantizer.rule = RangeRule("lloyd")
        with stage("activations"), collecting(quantizers):
            for images in self._views(self.config.views, self.random):
                self.student(images)
        self._renew_statistics()
        expected = torch.cat([self.teacher(images) for images in self._views(0, self.random)])
        logits = torch.cat([self.student(images) for images in self._views(0, self.random)])
        return (logits - expected).square().sum() / expected.square().sum()

    def _renew_statistics(self) -> None:
        """Normalise each batch by its own mean and variance; keep the averages as BN statistics."""
        if not self.config.statistics_views:
            return
        count = self.config.statistics_views * len(self.problem.images)
        totals: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}

        def follow(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert isinstance(norm, _BatchNorm)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            (x,) = arguments
            variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            sums = totals.setdefault(norm, (torch.zeros_like(mean), torch.zeros_like(mean)))
            sums[0].add_(mean, alpha=len(x) / count)
            sums[1].add_(variance, alpha=len(x) / count)

        handles = [
            module.register_forward_pre_hook(follow)
            for module in self.student.modules()
            if isinstance(module, _BatchNorm)
        ]
        try:
            with stage("statistics"), torch.enable_grad():  # without gradients, layers fold BN
                for images in self._views(self.config.statistics_views, self.random):
                    self.student(images)
        finally:
            for handle in handles:
                handle.remove()
        for norm, (mean, variance) in totals.items():
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"student": self.student.state_dict(), "random": self.random.get_state()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.inputs.restart()
        restore_random(self.random, state["random"])


def _bake(layer: QuantizedConv2d | QuantizedLinear, planes: Planes) -> None:
    """Set weight and range of ``layer`` so that its codes are the integers of ``planes``."""
    quantizer = layer.weight_quantizer
    scale = planes.scale.flatten().to(layer.weight.device, torch.float32)
    quantizer.set_range(scale * quantizer.grid.quant_min, scale * quantizer.grid.quant_max)
    integers = planes.integers.reshape(layer.weight.shape).to(scale)
    scale = scale.view((-1,) + (1,) * (integers.dim() - 1))
    layer.weight.copy_(quantizer(integers * scale))
    assert torch.equal((quantizer(layer.weight) / scale).round(), integers)
