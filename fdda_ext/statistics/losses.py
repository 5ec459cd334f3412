"""The three losses on batch-normalisation statistics that train FDDA's generator.

With ``x_l [N, C_l, H_l, W_l]`` the input of batch-normalisation layer ``l`` of L, ``mu_l`` and
``v_l`` its mean and biased variance per channel, and MSE the mean over channels:

* BNS loss (GDFQ, Xu et al., ECCV 2020, eq. 3; FDDA's coarse term)::

      L_BNS = (1/L) sum_l  MSE(mu_l, running_mean_l) + MSE(v_l, running_var_l)

* BNS-centralised loss (FDDA, Zhong et al., ECCV 2022, eq. 6), over the deep layers ``l >= s``::

      L_C = (1/(L-s)) sum_l  MSE(mu_l, mu_l^c) + MSE(v_l, v_l^c)

* BNS-distorted loss (FDDA, eq. 7): the same with fresh Gaussian noise on the centre::

      L_D = (1/(L-s)) sum_l  MSE(mu_l, mu_l^c + 0.5 e_l) + MSE(v_l, v_l^c + 1.0 e'_l)

A batch may hold images of several classes; every class then has statistics of its own, and the
losses are means over the classes. One class per batch is the paper's case.

Of several processes, each passes its share of the images and gets its share of the loss.
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
    "bns_loss",
    "centralised_and_distorted_loss",
    "first_class_layer",
    "noise_pull_loss",
]


class LayerStatistics(NamedTuple):
    """Mean and biased variance per class and channel, ``[K, C_l]`` each, for L layers."""

    means: list[Tensor]
    variances: list[Tensor]

    def of_classes(self, classes: Tensor, first_layer: int = 0) -> LayerStatistics:
        """The rows of ``classes [P]``, from layer ``first_layer`` on."""
        return LayerStatistics(
            [mean[classes] for mean in self.means[first_layer:]],
            [variance[classes] for variance in self.variances[first_layer:]],
        )


@dataclass(frozen=True)
class Distortion:
    """Standard deviations of the Gaussian noise on the centres (FDDA, eq. 7).

    Attributes:
        mean_std: Of the noise added to the centre's means.
        variance_std: Of the noise added to the centre's variances; the sum may be negative and is
            not clamped, as in the authors' code.
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
    """Index ``s`` of the first layer that the class losses use: the deep half and a little more.

    ``int((L + 1) / 2) - 2``, at least 0: 8 of 20 for ResNet-18, 24 of 52 for MobileNetV2.
    """
    return max(int((num_layers + 1) / 2) - 2, 0)


def _noise_like(tensors: list[Tensor], std: float, generator: torch.Generator) -> list[Tensor]:
    """Gaussian noise in the shapes of ``tensors [P, C_l]``, drawn in one call."""
    channels = [tensor.shape[1] for tensor in tensors]
    noise = torch.randn(
        (tensors[0].shape[0], sum(channels)), generator=generator, device=tensors[0].device
    )
    return list((noise * std).split(channels, dim=1))


def _distances(
    inputs: Sequence[Tensor],
    class_index: Tensor,
    means: list[Tensor],
    variances: list[Tensor],
    class_weight: Tensor,
) -> Tensor:
    """`class_stats_loss` of the batch of all ranks; of several, each gets an equal share of it."""
    if world_size() == 1:
        return class_stats_loss(inputs, class_index, means, variances, class_weight)
    own = [class_batch_stats(x, class_index, class_weight.shape[1]) for x in inputs]
    count, *seen = pooled_moments(own[0][0], [s[1] for s in own], [s[2] for s in own])
    weight = class_weight * (count > 0)  # [T, K]
    losses = [
        (weight * ((mean - m).square() + (variance - v).square()).mean(2)).sum(1)
        for mean, variance, m, v in zip(*seen, means, variances, strict=True)
    ]
    return torch.stack(losses, 1) / world_size()


def bns_loss(inputs: Sequence[Tensor], running: LayerStatistics) -> Tensor:
    """L_BNS: distance of the whole batch's statistics to the teacher's running statistics.

    Args:
        inputs: The L layers' inputs ``[N, C_l, *]``.
        running: The running statistics ``[1, C_l]``.

    Returns:
        A scalar, the mean over the layers.
    """
    one_class = torch.zeros(inputs[0].shape[0], dtype=torch.int64, device=inputs[0].device)
    weight = torch.ones((1, 1), device=inputs[0].device)
    return _distances(
        inputs,
        one_class,
        [mean.unsqueeze(0) for mean in running.means],
        [variance.unsqueeze(0) for variance in running.variances],
        weight,
    ).mean()


def centralised_and_distorted_loss(
    inputs: Sequence[Tensor],
    class_index: Tensor,
    centres: LayerStatistics,
    class_weight: Tensor,
    distortion: Distortion,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """L_C and L_D of one batch, from one read of each layer's input.

    Args:
        inputs: The deep layers' inputs ``[N, C_l, *]``, ``l >= s``.
        class_index: Row of ``centres`` that each image belongs to, int64 ``[N]``.
        centres: The centres ``[P, C_l]`` of the batch's P classes, same layers.
        class_weight: ``[P]``; 0 leaves a class out. The losses are sums over classes weighted so.
        distortion: Standard deviations of the noise.
        generator: Source of the noise, fresh for every layer and call.

    Returns:
        The two scalars ``(L_C, L_D)``.
    """
    noisy = LayerStatistics(
        [
            m + e
            for m, e in zip(
                centres.means,
                _noise_like(centres.means, distortion.mean_std, generator),
                strict=True,
            )
        ],
        [
            v + e
            for v, e in zip(
                centres.variances,
                _noise_like(centres.variances, distortion.variance_std, generator),
                strict=True,
            )
        ],
    )
    losses = _distances(
        inputs,
        class_index,
        [torch.stack(pair) for pair in zip(centres.means, noisy.means, strict=True)],
        [torch.stack(pair) for pair in zip(centres.variances, noisy.variances, strict=True)],
        class_weight.expand(2, -1).contiguous(),
    ).mean(dim=1)
    return losses[0], losses[1]


def noise_pull_loss(
    inputs: Sequence[Tensor], class_index: Tensor, class_weight: Tensor, generator: torch.Generator
) -> Tensor:
    """What replaces L_D, early on, for classes that the teacher gets wrong on their own image.

    Their centre does not describe the class, so their statistics are pulled towards standard
    normal noise instead, over all layers and with twice the weight (the authors' code)::

        2 (1/L) sum_l  MSE(mu_l, n_l) + MSE(v_l, n'_l),      n_l, n'_l ~ N(0, I)

    Args:
        inputs: All L layers' inputs ``[N, C_l, *]``.
        class_index: Class of each image within the batch, int64 ``[N]``, below P.
        class_weight: ``[P]``; 0 leaves a class out.
        generator: Source of the noise.

    Returns:
        A scalar.
    """
    shapes = [x.new_empty((class_weight.shape[0], x.shape[1]), dtype=torch.float32) for x in inputs]
    means = _noise_like(shapes, 1.0, generator)
    variances = _noise_like(shapes, 1.0, generator)
    return (
        2
        * _distances(
            inputs,
            class_index,
            [mean.unsqueeze(0) for mean in means],
            [variance.unsqueeze(0) for variance in variances],
            class_weight.unsqueeze(0),
        ).mean()
    )
