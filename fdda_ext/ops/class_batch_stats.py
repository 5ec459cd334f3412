"""BN statistics of an activation, per class."""

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
    r"""Return count, mean and biased variance of every channel for each class.

    .. math::
        n_k &= P \cdot |\{i : \text{labels}_i = k\}| \\
        \mu_{kc} &= \tfrac{1}{n_k} \sum_{i : \text{labels}_i = k} \sum_p x_{icp} \\
        v_{kc} &= \tfrac{1}{n_k} \sum_{i : \text{labels}_i = k} \sum_p (x_{icp} - \mu_{kc})^2

    :math:`P` is the number of positions per sample and channel. A class without samples gets 0
    for all three. With ``num_classes=1`` these are the usual statistics of batch normalisation.
    In FDDA (Zhong et al., "Fine-grained Data Distribution Alignment", ECCV 2022), the statistics
    of a class's calibration image are its BNS centre.

    The operator reads x from memory once. It merges the mean and squared deviations of each sample
    and channel by Chan's formula, in the order of the batch. So the variance is accurate even if
    the mean is much larger, and the results are bit-identical for any number of threads.

    Args:
        x: Activation ``[N, C, *]``; float32, float64, bfloat16 or float16. Contiguous and
            channels_last tensors, ``[N, C]`` and slices of them are read without a copy.
        labels: Class of each sample, int64 ``[N]``, in ``[0, num_classes)``.
        num_classes: Number of classes, K, at least 1.

    Returns:
        Count int64 ``[K]``, mean ``[K, C]`` and variance ``[K, C]``. Mean and variance are float32
        (float64 if x is float64) and differentiable in x.

    Raises:
        UsageError: If an argument has the wrong dtype, device or shape, num_classes is below 1, or
            (CPU only) a label is out of range. CUDA ignores such samples, because a check would
            wait for the device.
        NotImplementedError: If the gradient is differentiated again.

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
