"""The operators in plain PyTorch: slow, simple and differentiable. Tests compare with them."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "class_batch_stats_reference",
    "class_stats_loss_reference",
    "fake_quantize_reference",
]


def _round_straight_through(value: Tensor) -> Tensor:
    """Round halves to even, with the identity as gradient."""
    return value + (torch.round(value) - value).detach()


def fake_quantize_reference(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """Compute :func:`fdda_ext.ops.fake_quantize` with plain operations and autograd."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    scale = scale.reshape(shape)
    zero = _round_straight_through(zero_point.reshape(shape))
    t = x.float() * (1.0 / scale)
    low = quant_min - zero
    high = quant_max - zero
    inside = _round_straight_through(t)
    y = torch.where(t < low, low, torch.where(t > high, high, inside)) * scale
    return y.to(x.dtype)


def class_batch_stats_reference(
    x: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`fdda_ext.ops.class_batch_stats`, class by class."""
    x = x if x.dtype == torch.float64 else x.float()
    count = torch.zeros(num_classes, dtype=torch.int64, device=x.device)
    means = []
    variances = []
    for k in range(num_classes):
        # [C, samples * positions]
        values = x[labels == k].transpose(0, 1).flatten(1)
        count[k] = values.shape[1]
        if values.shape[1] == 0:
            means.append(x.new_zeros(x.shape[1]))
            variances.append(x.new_zeros(x.shape[1]))
            continue
        mean = values.mean(1)
        means.append(mean)
        variances.append((values - mean[:, None]).square().mean(1))
    return count, torch.stack(means), torch.stack(variances)


def class_stats_loss_reference(
    xs: Sequence[Tensor],
    labels: Tensor,
    target_means: Sequence[Tensor],
    target_vars: Sequence[Tensor],
    weight: Tensor,
) -> Tensor:
    """Compute :func:`fdda_ext.ops.class_stats_loss`, layer by layer."""
    losses = []
    for x, target_mean, target_var in zip(xs, target_means, target_vars, strict=True):
        count, mean, var = class_batch_stats_reference(x, labels, weight.shape[1])
        distance = ((mean - target_mean).square() + (var - target_var).square()).mean(2)  # [T, K]
        losses.append((weight * (count > 0) * distance).sum(1))
    return torch.stack(losses, 1)
