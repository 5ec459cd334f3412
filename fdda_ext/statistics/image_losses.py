"""Losses for optimised images: BN statistics of single images and of batches.

``m_nl`` and ``s_nl`` are mean and standard deviation over the positions of image ``n`` in
``x_l [N, C_l, H_l, W_l]``, the input of BN layer ``l``. ``mu_l`` and ``sigma_l`` are the running
mean and standard deviation of the layer.

* alignment (ZeroQ, Cai et al., CVPR 2020; with margins DSG, Zhang et al., CVPR 2021)::

      l_nl = |max(|m_nl - mu_l| - delta_l, 0)|^2 + |max(|s_nl - sigma_l| - gamma_l, 0)|^2

* feature distance (DeepInversion, Yin et al., CVPR 2020) of mean ``m_l`` and biased variance
  ``v_l`` of the whole batch::

      R_feat = sum_l c_l (|v_l - sigma_l^2| + |m_l - mu_l|),    c_0 = 10, else 1

* total variation (DeepInversion): sum of the norms of the differences to four neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import class_batch_stats
from .losses import LayerStatistics

__all__ = ["deviations", "feature_distance", "image_alignment", "norm", "total_variation"]

#: Added to variances before the square root (ZeroQ's code).
_EPS = 1e-6


def norm(x: Tensor) -> Tensor:
    """Return the L2 norm over all of ``x``, with a finite gradient at 0."""
    return (x.float().square().sum() + 1e-12).sqrt()


def deviations(inputs: Sequence[Tensor], targets: LayerStatistics) -> list[Tensor]:
    """Return the differences of every image's mean and standard deviation to the running ones.

    Args:
        inputs: Inputs ``[N, C_l, *]`` of the L layers.
        targets: Running mean and variance ``[1, C_l]``.

    Returns:
        ``m - mu`` and ``s - sigma`` of every layer, stacked to ``[2, N, C_l]``. Variances of images
        are unbiased; those of a single position are 0.
    """
    count = inputs[0].shape[0]
    own_class = torch.arange(count, device=inputs[0].device)
    found = []
    for x, target_mean, target_variance in zip(inputs, *targets, strict=True):
        _, mean, variance = class_batch_stats(x, own_class, count)
        positions = x[0, 0].numel()
        unbiased = variance * (positions / max(positions - 1, 1))
        std = (unbiased + _EPS).sqrt() - (target_variance + _EPS).sqrt()
        found.append(torch.stack([mean - target_mean, std]))
    return found


def image_alignment(
    inputs: Sequence[Tensor], targets: LayerStatistics, margins: Tensor | None = None
) -> Tensor:
    """Return the alignment l_nl of every image in every layer.

    Args:
        inputs: Inputs ``[N, C_l, *]`` of the L layers.
        targets: Running mean and variance ``[1, C_l]``.
        margins: Margins ``delta_l`` and ``gamma_l``, ``[L, 2]``; None for 0.

    Returns:
        ``[N, L]``, summed over channels.
    """
    found = [deviation.abs() for deviation in deviations(inputs, targets)]
    if margins is not None:
        found = [
            (deviation - margin.view(2, 1, 1)).clamp(min=0)
            for deviation, margin in zip(found, margins, strict=True)
        ]
    return torch.stack([deviation.square().sum((0, 2)) for deviation in found], 1)


def feature_distance(
    inputs: Sequence[Tensor], running: LayerStatistics, first_layer_weight: float
) -> Tensor:
    """Return R_feat of a batch, a scalar.

    Args:
        inputs: Inputs ``[N, C_l, *]`` of the L layers.
        running: Running statistics ``[1, C_l]``.
        first_layer_weight: Weight ``c_0`` of the first layer.
    """
    one_class = torch.zeros(inputs[0].shape[0], dtype=torch.int64, device=inputs[0].device)
    distances = []
    for x, running_mean, running_variance in zip(inputs, *running, strict=True):
        _, mean, variance = class_batch_stats(x, one_class, 1)
        distances.append(norm(variance - running_variance) + norm(mean - running_mean))
    distances[0] = first_layer_weight * distances[0]
    return torch.stack(distances).sum()


def total_variation(images: Tensor) -> Tensor:
    """Return the sum of the norms of the differences to four neighbours, over the whole batch.

    The neighbours are the right, the lower and both lower diagonal ones.

    Args:
        images: Images ``[N, C, H, W]``.
    """
    upper, lower = images[:, :, :-1], images[:, :, 1:]
    return (
        norm(images[..., 1:] - images[..., :-1])
        + norm(lower - upper)
        + norm(lower[..., 1:] - upper[..., :-1])
        + norm(lower[..., :-1] - upper[..., 1:])
    )
