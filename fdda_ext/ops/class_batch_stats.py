"""Per-class batch-norm statistics of an activation."""

from typing import Any

import torch
from torch import Tensor, library

from fdda_ext.ops._native import (
    autograd_function,
    call_backward,
    check_one_device,
    refuse_double_backward,
    usage_error,
)

__all__ = ["class_batch_stats"]

_forward_op = torch.ops.fdda.class_batch_stats.default
_backward_op = torch.ops.fdda._class_batch_stats_backward.default


def class_batch_stats(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean and biased variance of every channel, over the samples and positions of each class.

    .. math::
        n_k &= P \cdot |\{i : \text{labels}_i = k\}| \\
        \mu_{kc} &= \tfrac{1}{n_k} \sum_{i : \text{labels}_i = k} \sum_p x_{icp} \\
        v_{kc} &= \tfrac{1}{n_k} \sum_{i : \text{labels}_i = k} \sum_p (x_{icp} - \mu_{kc})^2

    with :math:`P` positions per sample and channel. A class without samples gets 0, 0, 0. With
    ``num_classes=1`` these are the ordinary batch statistics of batch normalisation. FDDA (Zhong
    et al., "Fine-grained Data Distribution Alignment", ECCV 2022) calls the statistics of a
    class's calibration image its BNS centre.

    x is read from memory once. Each sample and channel gets its own mean and squared deviations,
    merged over the class by Chan's formula in the order of the batch: the variance stays accurate
    where the mean is much larger than the deviations, and the bits do not depend on the number of
    threads.

    Args:
        x: ``[N, C, *]``; float32, float64, bfloat16 or float16. NCHW, channels_last, ``[N, C]``
            and slices of them are read in place.
        labels: int64 ``[N]``, each in ``[0, num_classes)``.
        num_classes: K, at least 1.

    Returns:
        count int64 ``[K]``, mean ``[K, C]`` and var ``[K, C]``; the statistics are float32, or
        float64 for float64. Differentiable in x.

    Raises:
        UsageError: an argument has the wrong dtype, device or shape, or num_classes is below 1;
            or, on the CPU only, a label is out of range (CUDA leaves such samples out, because
            looking would wait for the device).
        NotImplementedError: the gradient is differentiated again.

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [7.0]])
        >>> class_batch_stats(x, torch.tensor([0, 0, 2]), 3)
        (tensor([2, 0, 1]), tensor([[2.], [0.], [7.]]), tensor([[1.], [0.], [0.]]))
    """
    if torch.compiler.is_compiling():
        return _forward_op(x, labels, num_classes)
    try:
        return _function.apply(x, labels, num_classes)
    except (ValueError, NotImplementedError) as error:
        raise usage_error(error, "class_batch_stats", x) from None


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _backward(
    ctx: Any, grad_count: Tensor, grad_mean: Tensor, grad_var: Tensor
) -> tuple[Tensor, None, None]:
    x, labels, count, mean = ctx.saved_tensors
    grad_x = call_backward(_backward_op, grad_mean, grad_var, x, labels, count, mean)
    return grad_x, None, None


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, labels, _ = inputs
    count, mean, _ = output
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(x, labels, count, mean)


_function = autograd_function(_forward_op, _setup_context, _backward)


@library.register_fake("fdda::class_batch_stats")
def _fake(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device("class_batch_stats", x, labels)
    sizes = (num_classes, x.shape[1])
    dtype = _statistics_dtype(x)
    count = x.new_empty((num_classes,), dtype=torch.int64)
    return count, x.new_empty(sizes, dtype=dtype), x.new_empty(sizes, dtype=dtype)


@library.register_fake("fdda::_class_batch_stats_backward")
def _fake_backward(
    grad_mean: Tensor, grad_var: Tensor, x: Tensor, labels: Tensor, count: Tensor, mean: Tensor
) -> Tensor:
    check_one_device("class_batch_stats", x, grad_mean, grad_var, labels, count, mean)
    return torch.empty_like(x)


library.register_autograd("fdda::class_batch_stats", _backward, setup_context=_setup_context)
refuse_double_backward("class_batch_stats")
