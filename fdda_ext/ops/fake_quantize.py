"""Fake quantization with learnable scale and zero point (LSQ, LSQ+)."""

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

__all__ = ["fake_quantize"]

_forward_op = torch.ops.fdda.fake_quantize.default
_backward_op = torch.ops.fdda._fake_quantize_backward.default


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    r"""Round x to a grid, per tensor or per channel.

    With the scale :math:`s`, :math:`t = x \cdot (1 / s)` in float32 and
    :math:`z = \mathrm{round}(\text{zero\_point})`:

    .. math::
        q &= \mathrm{clamp}(\mathrm{round}(t) + z,\ \text{quant\_min},\ \text{quant\_max}) \\
        y &= (q - z) \cdot s

    Halves are rounded to even. The gradients treat rounding as the identity (LSQ: Esser et al.,
    "Learned Step Size Quantization", ICLR 2020, eq. 1-3 and 5; LSQ+: Bhalgat et al., CVPRW 2020).
    Let *inside* mean :math:`\text{quant\_min} \le t + z \le \text{quant\_max}` for the unrounded
    :math:`t`, and let :math:`b` be the nearer bound if x is outside:

    .. math::
        \partial x &= g \cdot [\text{inside}] \\
        \partial s &= \sum g \cdot (\text{inside}\ ?\ \mathrm{round}(t) - t : b - z) \\
        \partial z &= \sum g \cdot (\text{inside}\ ?\ 0 : -s)

    The caller applies LSQ's gradient scale. One pass over memory computes all three gradients, and
    the sums are bit-identical for any number of threads. A NaN in x stays NaN in y and gets
    gradient 0. Infinities are clamped.

    Args:
        x: Tensor of any shape; float32, bfloat16 or float16 (computed in float32). Dense tensors
            in any memory format are read in place; others are copied.
        scale: Scale, float32, positive and finite, ``[]`` or ``[1]``, or ``[C]`` with an axis.
        zero_point: Zero point, float32, finite, with the shape of scale. It is rounded here, so it
            can be learned.
        quant_min: Smallest code, such as -8 or 0.
        quant_max: Largest code, such as 7 or 15. Both codes are within ±4194304.
        axis: Dimension of x along which scale and zero_point vary; None for a single value.

    Returns:
        A tensor with the shape, dtype and memory format of x.

    Raises:
        UsageError: If an argument has the wrong dtype, device or shape, quant_min is not below
            quant_max, axis is not a dimension of x, or (CPU only, because a check on CUDA would
            wait for the device) a scale is not positive and finite.
        NotImplementedError: If the gradient is differentiated again.

    Example:
        >>> x = torch.tensor([-0.3, 0.26, 0.5, 9.0])
        >>> fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), 0, 15)
        tensor([0.0000, 0.5000, 0.5000, 7.5000])
    """
    arguments = (x, scale, zero_point, quant_min, quant_max, axis)
    if torch.compiler.is_compiling():
        return _forward_op(*arguments)
    try:
        return _function.apply(*arguments)
    except (ValueError, NotImplementedError) as error:
        raise usage_error(error, "fake_quantize", x) from None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = call_backward(_backward_op, grad, *ctx.saved_tensors, *ctx.constants)
    return *gradients, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.constants = inputs[3:]


_function = autograd_function(_forward_op, _setup_context, _backward)


@library.register_fake("fdda::fake_quantize")
def _fake(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    check_one_device("fake_quantize", x, scale, zero_point)
    return torch.empty_like(x)


@library.register_fake("fdda::_fake_quantize_backward")
def _fake_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device("fake_quantize", grad, x, scale, zero_point)
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x),
        torch.empty_like(scale, memory_format=contiguous),
        torch.empty_like(zero_point, memory_format=contiguous),
    )


library.register_autograd("fdda::fake_quantize", _backward, setup_context=_setup_context)
refuse_double_backward("fake_quantize")
