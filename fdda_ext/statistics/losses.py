"""The three losses on BN statistics that train FDDA's generator.

``x_l [N, C_l, H_l, W_l]`` is the input of BN layer ``l`` of L, ``mu_l`` and ``v_l`` are its mean
and biased variance per channel, and MSE is the mean squared error over channels:

* BNS loss (GDFQ, Xu et al., ECCV 2020, eq. 3; FDDA's coarse term)::

      L_BNS = (1/L) sum_l  MSE(mu_l, running_mean_l) + MSE(v_l, running_var_l)

* BNS-centralised loss (FDDA, Zhong et al., ECCV 2022, eq. 6), over the deep layers ``l >= s``::

      L_C = (1/(L-s)) sum_l  MSE(mu_l, mu_l^c) + MSE(v_l, v_l^c)

* BNS-distorted loss (FDDA, eq. 7), with fresh Gaussian noise on the centre::

      L_D = (1/(L-s)) sum_l  MSE(mu_l, mu_l^c + 0.5 e_l) + MSE(v_l, v_l^c + 1.0 e'_l)

If a batch has images of several classes, each class has its own statistics, and the losses are
means over the classes. The paper has one class per batch.

Each of several ranks computes its share of the images and gets its share of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..distribution import pooled_moments, world_size
from ..errors import UsageError
from ..ops import class_batch_stats, class_stats_loss

__all__ = [
    "Distortion",
    "LayerStatistics",
    "StatisticsTargets",
    "bns_loss",
    "centralised_and_distorted_targets",
    "first_class_layer",
    "noise_pull_loss",
    "noise_pull_targets",
    "running_targets",
]


class LayerStatistics(NamedTuple):
    """Mean and biased variance per class and channel, ``[K, C_l]`` each, for L layers."""

    means: list[Tensor]
    variances: list[Tensor]

    def of_classes(self, classes: Tensor, first_layer: int = 0) -> LayerStatistics:
        """Return the rows of ``classes [P]``, from layer ``first_layer`` on."""
        return LayerStatistics(
            [mean[classes] for mean in self.means[first_layer:]],
            [variance[classes] for variance in self.variances[first_layer:]],
        )


@dataclass(frozen=True)
class Distortion:
    """Standard deviations of the Gaussian noise on the centres (FDDA, eq. 7).

    Attributes:
        mean_std: Standard deviation of the noise on means.
        variance_std: Standard deviation of the noise on variances. A noisy variance may be negative
            and is not clamped, as in the authors' code.
    """

    mean_std: float = 0.5
    variance_std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mean_std", "variance_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(
                    f"distortion: expected {name} at least 0 and finite, got {getattr(self, name)}"
                )


def first_class_layer(num_layers: int) -> int:
    """Return the index ``s`` of the first layer of the class losses, slightly before the middle.

    It is ``int((L + 1) / 2) - 2``, at least 0: 8 of 20 for ResNet-18, 24 of 52 for MobileNetV2.
    """
    return max(int((num_layers + 1) / 2) - 2, 0)


def _noise_like(tensors: list[Tensor], std: float, generator: torch.Generator) -> list[Tensor]:
    """Draw Gaussian noise in the shapes of ``tensors [P, C_l]``, in one call."""
    channels = [tensor.shape[1] for tensor in tensors]
    noise = torch.randn(
        (tensors[0].shape[0], sum(channels)), generator=generator, device=tensors[0].device
    )
    return list((noise * std).split(channels, dim=1))


@dataclass(frozen=True)
class StatisticsTargets:
    """Targets for the statistics of a batch: T sets for P classes and L layers.

    Attributes:
        class_index: Class of each image of the batch, int64 ``[N]``, below P.
        means: L tensors ``[T, P, C_l]``.
        variances: L tensors ``[T, P, C_l]``.
        class_weight: Weights of the classes in a distance, ``[T, P]``.
    """

    class_index: Tensor
    means: list[Tensor]
    variances: list[Tensor]
    class_weight: Tensor

    def distances(self, inputs: Sequence[Tensor], first_layer: int = 0) -> Tensor:
        """Return the distances of layers to their targets, without a mean over the layers.

        Args:
            inputs: Inputs ``[N, C_l, *]`` of consecutive layers.
            first_layer: Index of the first of these layers in the targets.

        Returns:
            Distances ``[T, len(inputs)]``. One call per layer is bit-identical to one call for all.
            With several ranks, each gets the distances divided by the number of ranks.
        """
        layers = slice(first_layer, first_layer + len(inputs))
        means, variances = self.means[layers], self.variances[layers]
        if world_size() == 1:
            return class_stats_loss(inputs, self.class_index, means, variances, self.class_weight)
        own = [class_batch_stats(x, self.class_index, self.class_weight.shape[1]) for x in inputs]
        count, *seen = pooled_moments(own[0][0], [s[1] for s in own], [s[2] for s in own])
        weight = self.class_weight * (count > 0)  # [T, P]
        losses = [
            (weight * ((mean - m).square() + (variance - v).square()).mean(2)).sum(1)
            for mean, variance, m, v in zip(*seen, means, variances, strict=True)
        ]
        return torch.stack(losses, 1) / world_size()


def running_targets(running: LayerStatistics, images: int) -> StatisticsTargets:
    """Return the targets of L_BNS, the running statistics ``[1, C_l]``, for ``images`` images."""
    device = running.means[0].device
    return StatisticsTargets(
        torch.zeros(images, dtype=torch.int64, device=device),
        [mean.unsqueeze(0) for mean in running.means],
        [variance.unsqueeze(0) for variance in running.variances],
        torch.ones((1, 1), device=device),
    )


def bns_loss(inputs: Sequence[Tensor], running: LayerStatistics) -> Tensor:
    """Return L_BNS, a scalar: distance of the whole batch's statistics to the running ones.

    Args:
        inputs: Inputs ``[N, C_l, *]`` of the L layers.
        running: Running statistics ``[1, C_l]``.
    """
    return running_targets(running, inputs[0].shape[0]).distances(inputs).mean()


def centralised_and_distorted_targets(
    class_index: Tensor,
    centres: LayerStatistics,
    class_weight: Tensor,
    distortion: Distortion,
    generator: torch.Generator,
) -> StatisticsTargets:
    """Return the targets of L_C and of L_D as two sets, so each layer's input is read only once.

    Args:
        class_index: Row of ``centres`` for each image, int64 ``[N]``.
        centres: Centres ``[P, C_l]`` of the batch's P classes in the deep layers.
        class_weight: Weights of the classes in the losses, ``[P]``; 0 leaves a class out.
        distortion: Standard deviations of the noise.
        generator: Source of the noise, which is new for every layer and call.
    """
    parts = [
        (part, _noise_like(part, std, generator))
        for part, std in zip(centres, (distortion.mean_std, distortion.variance_std), strict=True)
    ]
    means, variances = (
        [torch.stack((centre, centre + e)) for centre, e in zip(*part, strict=True)]
        for part in parts
    )
    return StatisticsTargets(class_index, means, variances, class_weight.expand(2, -1).contiguous())


def noise_pull_targets(
    class_index: Tensor, like: LayerStatistics, class_weight: Tensor, generator: torch.Generator
) -> StatisticsTargets:
    """Return the targets of `noise_pull_loss`: standard normal noise.

    Args:
        class_index: Class of each image in the batch, int64 ``[N]``, below P.
        like: Statistics with ``C_l`` channels per layer, of any number of classes.
        class_weight: Weights of the classes, ``[P]``; 0 leaves a class out.
        generator: Source of the noise.
    """
    classes = class_weight.shape[0]
    shapes = [mean.new_empty((classes, mean.shape[1])) for mean in like.means]
    means = _noise_like(shapes, 1.0, generator)
    variances = _noise_like(shapes, 1.0, generator)
    return StatisticsTargets(
        class_index,
        [mean.unsqueeze(0) for mean in means],
        [variance.unsqueeze(0) for variance in variances],
        class_weight.unsqueeze(0),
    )


def noise_pull_loss(distances: Tensor) -> Tensor:
    """Return the scalar loss that replaces L_D, early on, for classes with a misclassified image.

    The centre of such a class does not describe it. Its statistics are pulled towards standard
    normal noise instead, over all layers and with twice the weight (the authors' code)::

        2 (1/L) sum_l  MSE(mu_l, n_l) + MSE(v_l, n'_l),      n_l, n'_l ~ N(0, I)

    Args:
        distances: Distances ``[1, L]`` from `noise_pull_targets`.
    """
    return 2 * distances.mean()
