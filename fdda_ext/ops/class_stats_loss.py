"""Distance between per-class BN statistics and their targets, for all layers at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from fdda_ext.errors import UsageError
from fdda_ext.ops._native import check_one_device, refuse_double_backward, usage_error

__all__ = ["class_stats_loss"]

_forward_op = torch.ops.fdda.class_stats_loss.default
_backward_op = torch.ops.fdda._class_stats_loss_backward.default


def class_stats_loss(
    xs: Sequence[Tensor],
    labels: Tensor,
    target_means: Sequence[Tensor],
    target_vars: Sequence[Tensor],
    weight: Tensor,
) -> Tensor:
    r"""Return the squared distance of every layer's class statistics to T sets of targets.

    Let :math:`\mu_{lkc}` and :math:`v_{lkc}` be the mean and the biased variance of layer l, class
    k and channel c (see :func:`class_batch_stats`). Then

    .. math::
        \text{loss}_{tl} = \sum_k \text{weight}_{tk} \cdot \frac{1}{C_l} \sum_c
            \left[ (\mu_{lkc} - \hat\mu_{tlkc})^2 + (v_{lkc} - \hat v_{tlkc})^2 \right]

    Classes without samples contribute 0. With the BNS centres as targets this is eq. 6 of FDDA
    (Zhong et al., ECCV 2022), with perturbed centres eq. 7. Passed as two sets, both need only one
    read of the activations. With one class and the running statistics as targets it is the BNS
    loss.

    Args:
        xs: L activations ``[N, C_l, *]`` of one dtype (float32, float64, bfloat16, float16).
        labels: Class of each sample, int64 ``[N]``, in ``[0, K)``.
        target_means: L tensors ``[T, K, C_l]``; float32, or float64 if xs are float64.
        target_vars: Target variances, like target_means.
        weight: Weight of each class, ``[T, K]``, with the dtype of the targets.

    Returns:
        Loss ``[T, L]`` with the dtype of the targets, differentiable in xs only. The backward pass
        reads each of xs once and saves only the statistics besides the arguments.

    Raises:
        UsageError: If the lists are empty or of different lengths, an argument has the wrong dtype,
            device or shape, or (CPU only) a label is out of range. CUDA ignores such samples,
            because a check would wait for the device.
        NotImplementedError: If the gradient is differentiated again.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])  # mean 2, variance 1
        >>> zero = torch.zeros(1, 1, 1)
        >>> class_stats_loss([x], torch.tensor([0, 0]), [zero], [zero], torch.ones(1, 1))
        tensor([[5.]])
    """
    arguments = (list(xs), labels, list(target_means), list(target_vars), weight)
    if torch.compiler.is_compiling():
        return _forward_op(*arguments)[0]
    if not arguments[0]:
        raise UsageError(
            "class_stats_loss: expected xs to hold at least one tensor, got an empty list"
        )
    try:
        return _forward_op(*arguments)[0]
    except (ValueError, NotImplementedError) as error:
        raise usage_error(error, "class_stats_loss", arguments[0][0]) from None


def _backward(
    ctx: Any, grad_loss: Tensor, grad_statistics: Tensor
) -> tuple[list[Tensor], None, list[None], list[None], None]:
    layers = ctx.layers
    *tensors, labels, weight, statistics = ctx.saved_tensors
    xs, target_means, target_vars = (tensors[i * layers : (i + 1) * layers] for i in range(3))
    grads = _backward_op(grad_loss, xs, labels, target_means, target_vars, weight, statistics)
    return grads, None, [None] * layers, [None] * layers, None


def _setup_context(
    ctx: Any,
    inputs: tuple[list[Tensor], Tensor, list[Tensor], list[Tensor], Tensor],
    output: tuple[Tensor, Tensor],
) -> None:
    xs, labels, target_means, target_vars, weight = inputs
    statistics = output[1]
    ctx.mark_non_differentiable(statistics)
    ctx.layers = len(xs)
    ctx.save_for_backward(*xs, *target_means, *target_vars, labels, weight, statistics)


@library.register_fake("fdda::class_stats_loss")
def _fake(
    xs: list[Tensor],
    labels: Tensor,
    target_means: list[Tensor],
    target_vars: list[Tensor],
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    check_one_device("class_stats_loss", *xs, labels, *target_means, *target_vars, weight)
    dtype = torch.float64 if xs[0].dtype == torch.float64 else torch.float32
    sets, num_classes = weight.shape
    channels = sum(x.shape[1] for x in xs)
    loss = xs[0].new_empty((sets, len(xs)), dtype=dtype)
    return loss, xs[0].new_empty((2, num_classes, channels), dtype=dtype)


@library.register_fake("fdda::_class_stats_loss_backward")
def _fake_backward(
    grad_loss: Tensor,
    xs: list[Tensor],
    labels: Tensor,
    target_means: list[Tensor],
    target_vars: list[Tensor],
    weight: Tensor,
    statistics: Tensor,
) -> list[Tensor]:
    check_one_device("class_stats_loss", *xs, grad_loss, labels, weight, statistics)
    return [torch.empty_like(x) for x in xs]


library.register_autograd("fdda::class_stats_loss", _backward, setup_context=_setup_context)
refuse_double_backward("class_stats_loss")
