"""Measures of a report: predictions, BN statistics and the error of every layer."""

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
    "time_interleaved",
]

#: Batch size of forward passes that store values of every layer.
_BATCH = 16


@dataclass(frozen=True)
class Predictions:
    """Labels of n images and the classes that two networks predict, int64 ``[n]`` each."""

    labels: Tensor
    float_network: Tensor
    quantized: Tensor

    @property
    def agreement(self) -> float:
        """Percentage of images for which both networks predict the same class."""
        return 100 * float((self.float_network == self.quantized).float().mean())

    def count(self, float_right: bool, quantized_right: bool) -> int:
        """Count the images that each network classifies right or wrong, as given."""
        both = ((self.float_network == self.labels) == float_right) & (
            (self.quantized == self.labels) == quantized_right
        )
        return int(both.sum())

    def losses(self, num_classes: int) -> list[tuple[int, int, int, int]]:
        """List class, images, float right, quantized right of classes that lose, worst first."""
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
        """Count images by the classes of float and quantized network, int64 ``[K, K]``."""
        pairs = self.float_network * num_classes + self.quantized
        return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)

    def changes(self, num_classes: int) -> list[tuple[int, int, int]]:
        """List float class, different quantized class and images, most frequent first."""
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
    """Predict the classes of all images in ``batches`` with both networks."""
    labels, seen = [], []
    for pixels, classes in batches:
        images = batches.normalise(pixels.to(device))
        seen.append(torch.stack([net(images).argmax(1).cpu() for net in (teacher, student)]))
        labels.append(classes)
    return Predictions(torch.cat(labels), *torch.cat(seen, 1))


def some_images(batches: BatchSource, count: int, device: torch.device) -> Tensor:
    """Load a sample of at most ``count`` images ``[n, C, H, W]`` to ``device``.

    Damaged images are skipped.
    """
    kept = []
    for index in fair_sample(batches.dataset.labels, count).sort().values.tolist():
        try:
            kept.append(batches.dataset.pixels(index))
        except UnreadableImageError:
            continue  # the evaluation reports it
    return batches.normalise(torch.stack(kept).to(device))


@torch.no_grad()
def bn_statistics(network: nn.Module, images: Tensor) -> LayerStatistics:
    """Compute mean and biased variance ``[1, C_l]`` of the input of each BN layer."""
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
    """Compute the distance of ``seen`` from ``real`` by layer, in standard deviations of ``real``.

    It is the 2-Wasserstein distance over all channels, where each channel is a Gaussian::

        d_l = sqrt( sum_c (mu - mu_r)^2 + (sigma - sigma_r)^2  /  sum_c sigma_r^2 )

    The division follows the sums, because some channels hardly vary.
    """
    distances = []
    for mean, variance, real_mean, real_variance in zip(*seen, *real, strict=True):
        moved = (mean - real_mean).square() + (variance.sqrt() - real_variance.sqrt()).square()
        distances.append(math.sqrt(float(moved.sum() / real_variance.sum().clamp(min=1e-30))))
    return distances


@torch.no_grad()
def judge(teacher: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, int]:
    """Classify images ``[n, C, H, W]`` with the float network.

    Returns:
        Percentage of images whose predicted class is that of ``labels [n]``, and number of
        different predicted classes.
    """
    found = torch.cat([teacher(batch).argmax(1) for batch in images.split(_BATCH)])
    return 100 * float((found == labels).double().mean()), found.unique().numel()


@torch.no_grad()
def layer_sqnr(teacher: nn.Module, student: GraphModule, images: Tensor) -> dict[str, float]:
    """Compute the signal to quantization noise ratio of every convolution and linear layer, in dB.

    Both networks run on the same images, so the noise includes that of the layers before. The
    output y includes a batch normalisation that follows the layer::

        SQNR_l = 10 log10( sum y_l^2 / sum (y_l - y_l^student)^2 )

    Args:
        teacher: Float network.
        student: Quantized network that `prepare` made from ``teacher``.
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
    # A layer without noise or signal has no finite ratio.
    return {
        layer: 10 * math.log10(signal[layer] / noise[layer])
        for layer in places
        if signal[layer] and noise[layer]
    }


def _results(network: GraphModule) -> dict[str, str]:
    """Map every convolution and linear layer to the module whose output is compared."""
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
    """Outputs of the modules in ``places``, by layer."""
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
def time_interleaved(
    runs: Mapping[str, Callable[[], object]],
    calls: int,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Time functions alternately, so that other load on the machine slows all of them.

    Args:
        runs: Functions by name.
        calls: Timed calls of each function.
        clock: Clock in seconds; None for `time.perf_counter`.

    Returns:
        Seconds of every call, by name.
    """
    clock = clock or time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # warm-up
        run()
    for _ in range(calls):
        for name, run in runs.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Compute first quartile, median and third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
