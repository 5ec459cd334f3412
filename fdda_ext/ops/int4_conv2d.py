"""Convolution of codes with its epilogue, for inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library

from fdda_ext.errors import UsageError
from fdda_ext.ops._native import usage_error

__all__ = ["int4_conv2d", "int4_linear", "int4_pack_weight"]

_conv_op = torch.ops.fdda.int4_conv2d.default
_pack_op = torch.ops.fdda.int4_pack_weight.default

#: CPU: outputs in one vector, and products that one of its lanes sums at once.
_PANEL, _GROUP = 16, 4
#: CUDA: outputs of a panel, bytes of a unit and of a chunk, channels of a depthwise block, and the
#: fewest channels and outputs of a group that is computed as a matrix product.
_CUDA_PANEL, _CUDA_UNIT, _CUDA_CHUNK, _CUDA_BLOCK, _CUDA_GROUP_SIZE = 32, 16, 64, 8, 8
_INFINITY = float("inf")


def int4_pack_weight(weight: Tensor, groups: int = 1, winograd: bool = False) -> Tensor:
    """Pack a weight into the layout that `int4_conv2d` reads; needed once per weight.

    Args:
        weight: Weight, int8 ``[O, kh, kw, C / groups]``.
        groups: Number of groups of the convolution.
        winograd: Whether to pack for Winograd's algorithm F(2x2, 3x3) in integers, which needs
            2.25 times fewer products. The transformed weight must fit in int8; 4-bit weights
            always do. CPU only.

    Returns:
        A one-dimensional int8 tensor. Its layout and size depend on the weight's device: see
        csrc/cpu/isa/kernels.h and csrc/cuda/int4_layout.cuh. A weight packed on the CPU cannot be
        used on CUDA, nor the reverse.

    Raises:
        UsageError: If dtype, shape or groups are wrong, or Winograd's algorithm cannot be used.
    """
    try:
        result: Tensor = _pack_op(weight, groups, winograd)
    except (ValueError, NotImplementedError) as error:
        raise usage_error(error, "int4_pack_weight", weight) from None
    return result


def int4_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    correction: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    zero_point: int = 0,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    low: float = -_INFINITY,
    high: float = _INFINITY,
    out_scale: float = 1.0,
    out_zero_point: int = 0,
    out_bits: int = 0,
    bits: int = 8,
    winograd: bool = False,
) -> Tensor:
    r"""Convolve codes and round the result to codes, in one pass.

    Let :math:`r` be the residual and :math:`S = \sum_k (q_k - z) w_k`, which is computed exactly in
    int32. The result is:

    .. math::
        t &= \mathrm{clamp}(S \cdot \text{scale} + \text{shift} + r,
            \text{low}, \text{high}) \\
        y &= \mathrm{clamp}(\mathrm{round}(t \cdot (1 / \text{out\_scale}))
            + \text{out\_zero\_point}, 0, 2^{\text{out\_bits}} - 1)

    Every step is computed in float32, without fused multiply-add. The result is bit-identical on
    every instruction set, for any number of threads, and on CUDA.

    Args:
        x: Codes, uint8 ``[N, H, W, C]``, on CPU or CUDA.
        weight: Result of `int4_pack_weight` on the device of ``x``.
        scale: Factor of each output, float32 ``[O]``.
        shift: Summand of each output, float32 ``[O]``.
        correction: ``zero_point`` times the sum of each output's weights, int32 ``[O]``.
        kernel: Height and width of the window.
        stride: Vertical and horizontal stride of the window.
        padding: Rows and columns of zeros (codes ``zero_point``) on every side.
        dilation: Distance between the window's taps.
        groups: Number of groups of channels and outputs.
        zero_point: Zero point of ``x``, in [0, 255].
        residual: Summand before the clamp, float32 or uint8 codes, with the result's shape.
        residual_scale: Scale of a residual in codes.
        residual_zero_point: Zero point of a residual in codes.
        low: Lower bound of the clamp.
        high: Upper bound of the clamp.
        out_scale: Scale of the result, positive.
        out_zero_point: Zero point of the result.
        out_bits: Bits of the result, 2 to 8; 0 for a float32 result.
        bits: Number of bits of the codes in ``x``. Fewer bits allow faster kernels.
        winograd: Whether ``weight`` was packed for Winograd's algorithm. It needs a 3x3 window,
            stride and dilation 1, one group and at most 5 bits. CPU only. The result is the same.

    Returns:
        ``[N, H', W', O]``, uint8 or float32.

    Raises:
        UsageError: If an argument has the wrong dtype or shape, or a number is out of range.
    """
    try:
        result: Tensor = _conv_op(
            x, weight, scale, shift, correction, residual, kernel, stride, padding, dilation,
            groups, zero_point, low, high, residual_scale, residual_zero_point, out_scale,
            out_zero_point, out_bits, bits, winograd,
        )  # fmt: skip
    except (ValueError, NotImplementedError) as error:
        raise usage_error(error, "int4_conv2d", x) from None
    return result


def int4_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    correction: Tensor,
    *,
    residual: Tensor | None = None,
    **options: float,
) -> Tensor:
    """Multiply codes by a matrix: `int4_conv2d` with a window of one pixel.

    Args:
        x: Codes, uint8 ``[..., C]``.
        weight: Result of `int4_pack_weight` for int8 ``[O, 1, 1, C]``.
        scale: See `int4_conv2d`; likewise shift and correction.
        shift: float32 ``[O]``.
        correction: int32 ``[O]``.
        residual: Summand before the clamp, with the result's shape.
        options: Further numeric arguments of `int4_conv2d`.

    Returns:
        ``[..., O]``, uint8 or float32.

    Raises:
        UsageError: If an argument has the wrong dtype or shape, or a number is out of range.
    """
    if x.dim() == 0:
        raise UsageError(f"int4_linear: expected x of shape [..., C], got {list(x.shape)}")

    def as_pixels(rows: Tensor) -> Tensor:
        return rows.reshape(1, 1, -1, rows.shape[-1])

    added = None if residual is None else as_pixels(residual)
    y = int4_conv2d(
        as_pixels(x), weight, scale, shift, correction, kernel=(1, 1), residual=added,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return y.view(*x.shape[:-1], y.shape[-1])


@library.register_fake("fdda::int4_pack_weight")
def _fake_pack(weight: Tensor, groups: int, winograd: bool = False) -> Tensor:
    if weight.device.type == "cuda":
        return weight.new_empty(_cuda_packed_size(weight.shape, groups))
    outputs, height, width, own = weight.shape
    panels = groups * -(-(outputs // groups) // _PANEL)
    if winograd:
        return weight.new_empty(panels * 16 * _PANEL * (4 + -(-own // _GROUP) * _GROUP))
    if own == 1 and outputs == groups:
        slots = 12 if (height, width) == (3, 3) else -(-height * width // _GROUP) * _GROUP
        return weight.new_empty(-(-outputs // 64) * 64 * slots)
    segments, taps = (height, width) if groups == 1 else (height * width, 1)
    return weight.new_empty(panels * segments * -(-taps * own // _GROUP) * _GROUP * _PANEL)


def _cuda_packed_size(shape: Sequence[int], groups: int) -> int:
    """Bytes of a packed weight on CUDA; must agree with csrc/cuda/int4_layout.cuh."""
    outputs, height, width, own = shape
    group_outputs = outputs // groups
    if own == 1 and group_outputs == 1:
        blocks = -(-groups // _CUDA_BLOCK)
        return blocks * _CUDA_BLOCK * width * -(-height // _GROUP) * _GROUP
    if groups > 1 and min(own, group_outputs) < _CUDA_GROUP_SIZE:
        return outputs * height * width * -(-own // _GROUP) * _GROUP
    segments, taps = (height, width) if groups == 1 else (height * width, 1)
    padded = segments * -(-taps * own // _CUDA_UNIT) * _CUDA_UNIT
    chunks = -(-padded // _CUDA_CHUNK)
    panels = groups * -(-group_outputs // _CUDA_PANEL)
    return panels * chunks * _CUDA_PANEL * _CUDA_CHUNK


@library.register_fake("fdda::int4_conv2d")
def _fake_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    correction: Tensor,
    residual: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero_point: int,
    low: float,
    high: float,
    residual_scale: float,
    residual_zero_point: int,
    out_scale: float,
    out_zero_point: int,
    out_bits: int,
    bits: int = 8,
    winograd: bool = False,
) -> Tensor:
    if x.dim() != 4:
        raise UsageError(f"int4_conv2d: expected x of shape [N, H, W, C], got {list(x.shape)}")
    sizes = [
        (x.shape[1 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    dtype = torch.uint8 if out_bits else torch.float32
    return x.new_empty((x.shape[0], *sizes, scale.shape[0]), dtype=dtype)
