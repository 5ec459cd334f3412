"""What a report measures: predictions, BN statistics and the error of every layer."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.sampling import fair_sample
from ..engine import BatchSource
from ..errors import UnreadableImageError
from ..ops import class_batch_stats
from ..quantization.tracing import trace
from ..statistics import LayerStatistics, capture

__all__ = [
    "Predictions",
    "bn_statistics",
    "judge",
    "layer_sqnr",
    "predict",
    "quartiles",
    "some_images",
    "statistics_distance",
    "time_in_turn",
]

#: Images that pass through a network together while something is kept of every layer.
_BATCH = 16


@dataclass(frozen=True)
class Predictions:
    """Of n images: the classes, and what two networks take them for, int64 ``[n]`` each."""

    labels: Tensor
    float_network: Tensor
    quantized: Tensor

    @property
    def agreement(self) -> float:
        """Per cent of the images that both networks say the same of."""
        return 100 * float((self.float_network == self.quantized).float().mean())

    def count(self, float_right: bool, quantized_right: bool) -> int:
        """How many images the two networks are right or wrong about."""
        both = ((self.float_network == self.labels) == float_right) & (
            (self.quantized == self.labels) == quantized_right
        )
        return int(both.sum())

    def losses(self, num_classes: int) -> list[tuple[int, int, int, int]]:
        """Class, images, float right, quantized right of classes that lose, the worst first."""
        images = torch.bincount(self.labels, minlength=num_classes)
        right = [
            torch.bincount(self.labels[seen == self.labels], minlength=num_classes)
            for seen in (self.float_network, self.quantized)
        ]
        lost = right[0] - right[1]
        return [
            (k, int(images[k]), int(right[0][k]), int(right[1][k]))
            for k in lost.argsort(descending=True, stable=True).tolist()
            if lost[k] > 0
        ]

    def confusion(self, num_classes: int) -> Tensor:
        """Images by float network's class and quantized network's class, int64 ``[K, K]``."""
        pairs = self.float_network * num_classes + self.quantized
        return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)

    def changes(self, num_classes: int) -> list[tuple[int, int, int]]:
        """Float network's class, quantized network's other class, images; the commonest first."""
        pairs = self.float_network * num_classes + self.quantized
        found, counts = pairs[self.float_network != self.quantized].unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        return [
            (pair // num_classes, pair % num_classes, count)
            for pair, count in zip(found[order].tolist(), counts[order].tolist(), strict=True)
        ]


@torch.no_grad()
def predict(
    teacher: nn.Module, student: nn.Module, batches: BatchSource, device: torch.device
) -> Predictions:
    """The predictions of both networks on all images of ``batches``."""
    labels, seen = [], []
    for pixels, classes in batches:
        images = batches.normalise(pixels.to(device))
        seen.append(torch.stack([net(images).argmax(1).cpu() for net in (teacher, student)]))
        labels.append(classes)
    return Predictions(torch.cat(labels), *torch.cat(seen, 1))


def some_images(batches: BatchSource, count: int, device: torch.device) -> Tensor:
    """A fair sample of at most ``count`` images ``[n, 3, H, W]`` on ``device``.

    Damaged images are left out.
    """
    kept = []
    for index in fair_sample(batches.dataset.labels, count).sort().values.tolist():
        try:
            kept.append(batches.dataset.pixels(index))
        except UnreadableImageError:
            continue  # the evaluation counts and names it
    return batches.normalise(torch.stack(kept).to(device))


@torch.no_grad()
def bn_statistics(network: nn.Module, images: Tensor) -> LayerStatistics:
    """Mean and biased variance ``[1, C_l]`` of what enters each BN layer, over all ``images``."""
    sums: list[Tensor] = []
    for batch in images.split(_BATCH):
        one = torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
        for layer, x in enumerate(capture(network, batch).inputs):
            _, mean, variance = (s.double() for s in class_batch_stats(x, one, 1))
            moments = len(batch) / len(images) * torch.stack([mean, variance + mean.square()])
            if layer == len(sums):
                sums.append(torch.zeros_like(moments))
            sums[layer] += moments
    return LayerStatistics(
        [mean.float() for mean, _ in sums],
        [(square - mean.square()).clamp(min=0).float() for mean, square in sums],
    )


def statistics_distance(seen: LayerStatistics, real: LayerStatistics) -> list[float]:
    """How far ``seen`` is from ``real`` at each layer, in standard deviations of ``real``.

    With every channel a Gaussian, the 2-Wasserstein distance over the channels together::

        d_l = sqrt( sum_c (mu - mu_r)^2 + (sigma - sigma_r)^2  /  sum_c sigma_r^2 )

    The sums are divided, not each channel, as some channels hardly vary.
    """
    distances = []
    for mean, variance, real_mean, real_variance in zip(*seen, *real, strict=True):
        moved = (mean - real_mean).square() + (variance.sqrt() - real_variance.sqrt()).square()
        distances.append(math.sqrt(float(moved.sum() / real_variance.sum().clamp(min=1e-30))))
    return distances


@torch.no_grad()
def judge(teacher: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, int]:
    """What the float network takes images ``[n, C, H, W]`` for.

    Returns:
        Of how many, in per cent, it finds the label that ``labels [n]`` has, and how many different
        classes it finds in all.
    """
    found = torch.cat([teacher(batch).argmax(1) for batch in images.split(_BATCH)])
    return 100 * float((found == labels).double().mean()), found.unique().numel()


@torch.no_grad()
def layer_sqnr(teacher: nn.Module, student: GraphModule, images: Tensor) -> dict[str, float]:
    """Signal to quantization noise, in dB, of every convolution and linear layer's result.

    Both networks run on the same images, so a layer's noise has that of the layers before in it.
    Where batch normalisation follows a layer, its result is what leaves the normalisation::

        SQNR_l = 10 log10( sum y_l^2 / sum (y_l - y_l^student)^2 )

    Args:
        teacher: The float network.
        student: The quantized one that `prepare` made of it.
        images: Normalised images ``[n, C, H, W]``.
    """
    network = trace(teacher, images[:1])
    places = _results(network)
    signal, noise = dict.fromkeys(places, 0.0), dict.fromkeys(places, 0.0)
    for batch in images.split(_BATCH):
        results, quantized = _outputs(network, places, batch), _outputs(student, places, batch)
        for layer, y in results.items():
            signal[layer] += float(y.double().square().sum())
            noise[layer] += float((y.double() - quantized[layer].double()).square().sum())
    # A layer without any noise, or without a signal, has no finite ratio.
    return {
        layer: 10 * math.log10(signal[layer] / noise[layer])
        for layer in places
        if signal[layer] and noise[layer]
    }


def _results(network: GraphModule) -> dict[str, str]:
    """Of every convolution and linear layer, in order, the module whose output is its result."""
    modules = dict(network.named_modules())
    places = {}
    for node in network.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            (user, *others) = node.users
            after = modules.get(str(user.target)) if user.op == "call_module" else None
            normalised = not others and isinstance(after, _BatchNorm)
            places[str(node.target)] = str(user.target if normalised else node.target)
    return places


def _outputs(network: nn.Module, places: Mapping[str, str], images: Tensor) -> dict[str, Tensor]:
    """The outputs of the modules ``places`` names, by layer."""
    kept: dict[str, Tensor] = {}

    def keep(layer: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: kept.__setitem__(layer, output)

    handles = [
        network.get_submodule(place).register_forward_hook(keep(layer))
        for layer, place in places.items()
    ]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return kept


@torch.no_grad()
def time_in_turn(
    runs: Mapping[str, Callable[[], object]],
    calls: int,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call; all take turns, so that a busy moment of the machine hits them all.

    Args:
        runs: What is timed, by name.
        calls: Timed calls of each.
        clock: Gives seconds; None for `time.perf_counter`.
    """
    clock = clock or time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # kernels are chosen, memory is asked for
        run()
    for _ in range(calls):
        for name, run in runs.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
