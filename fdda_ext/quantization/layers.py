"""Layers of a student: the float layer's parameters under the same names, and a quantizer.

With gradients, a layer computes with the float values of the codes. Without gradients, and with its
input on a learned grid, a layer is exact: it sums products of integers, which gives the same result
in any order, then multiplies once and adds once. These two steps include batch normalisation. So in
evaluation, the student is bit-identical to the program that `fdda_ext.deploy.lower` makes from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import QuantizationConfig
from .quantizer import (
    LearnedActivationQuantizer,
    LearnedWeightQuantizer,
    WeightQuantizer,
    build_weight_quantizer,
)

__all__ = [
    "FixedBatchNorm1d",
    "FixedBatchNorm2d",
    "QuantizedAveragePool",
    "QuantizedConv2d",
    "QuantizedLinear",
    "exact_dtype",
    "fold",
    "fold_norm",
]

#: Integers up to this bound are exact in float32, and so are their sums in any order.
_EXACT_IN_FLOAT32 = 2**24


def exact_dtype(codes: Tensor, largest: int) -> torch.dtype:
    """Return a dtype in which sums of ``codes [C, *]`` times inputs up to ``largest`` are exact."""
    bound = largest * int(codes.flatten(1).to(torch.int64).abs().sum(1).max())
    return torch.float32 if bound < _EXACT_IN_FLOAT32 else torch.float64


class _Exact:
    """Base of the layers that sum integers.

    Attributes:
        input_quantizer: Quantizer of the input; None for an input in float.
        norm: Batch normalisation that is the only reader of the result and is folded into the
            layer; None for none.
    """

    # Not submodules: both belong to the student, and `prepare` links them here.
    input_quantizer: LearnedActivationQuantizer | None = None
    norm: _Fixed | None = None

    def is_exact(self) -> bool:
        """Whether the next forward pass computes in integers."""
        quantizer = self.input_quantizer
        return (
            quantizer is not None and quantizer.mode == "quantize" and not torch.is_grad_enabled()
        )


def _exact_layer(layer: QuantizedConv2d | QuantizedLinear, x: Tensor) -> Tensor:
    """Integer sums of ``layer``, scaled and shifted."""
    quantizer = layer.input_quantizer
    assert quantizer is not None
    assert isinstance(layer.weight_quantizer, LearnedWeightQuantizer)
    codes = layer.weight_quantizer.codes(layer.weight)
    dtype = exact_dtype(codes, quantizer.largest_integer())
    integers = quantizer.integers(x).to(dtype)
    if isinstance(layer, QuantizedConv2d):
        total = layer._conv_forward(integers, codes.to(dtype), None)
    else:
        total = F.linear(integers, codes.to(dtype))
    scale, shift = fold(layer)
    along = (-1,) + (1,) * (total.dim() - 2) if isinstance(layer, QuantizedConv2d) else (-1,)
    return total.to(torch.float32).mul_(scale.view(along)).add_(shift.view(along))


def fold(layer: QuantizedConv2d | QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float32 ``[C]``, that turn a layer's integer sums into its result.

    The scales of input and weight, the bias and the batch normalisation after the layer are folded
    in float64 and rounded by `three_bytes`.
    """
    quantizer, weight_quantizer = layer.input_quantizer, layer.weight_quantizer
    assert quantizer is not None
    assert isinstance(weight_quantizer, LearnedWeightQuantizer)
    scale = quantizer.scale.detach().double() * weight_quantizer.scale.detach().double()
    shift = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().double()
    if layer.norm is not None:
        norm_scale, norm_shift = layer.norm.affine_map()
        scale, shift = scale * norm_scale, shift * norm_scale + norm_shift
    return three_bytes(scale), three_bytes(shift)


def fold_norm(norm: _Fixed) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float32 ``[C]``, of a batch normalisation without a layer.

    They apply to the integers of an input on a grid, and to the values of an input in float.
    """
    scale, shift = norm.affine_map()
    if norm.reads_codes:
        assert norm.input_quantizer is not None
        scale = scale * norm.input_quantizer.scale.detach().double()
    return scale.to(torch.float32), shift.to(torch.float32)


def three_bytes(x: Tensor) -> Tensor:
    """Round to float32 with 16 bits of significand. Files omit the lowest byte, which is 0."""
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits + 0x80) & ~0xFF).view(torch.float32)


class QuantizedConv2d(_Exact, nn.Conv2d):
    """A convolution with a quantized weight; its bias stays in float."""

    weight_quantizer: WeightQuantizer

    @classmethod
    def from_float(cls, layer: nn.Conv2d, bits: int, config: QuantizationConfig) -> QuantizedConv2d:
        """Make a quantized layer with the parameters of ``layer``."""
        quantized = cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
            device="meta",
        )
        quantized.weight, quantized.bias = layer.weight, layer.bias
        quantized.weight_quantizer = build_weight_quantizer(layer.weight, bits, config)
        return quantized

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C_in, H, W]`` to ``[N, C_out, H', W']``."""
        if self.is_exact():
            return _exact_layer(self, x)
        return self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)


class QuantizedLinear(_Exact, nn.Linear):
    """A linear layer with a quantized weight; its bias stays in float."""

    weight_quantizer: WeightQuantizer

    @classmethod
    def from_float(cls, layer: nn.Linear, bits: int, config: QuantizationConfig) -> QuantizedLinear:
        """Make a quantized layer with the parameters of ``layer``."""
        quantized = cls(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            device="meta",
        )
        quantized.weight, quantized.bias = layer.weight, layer.bias
        quantized.weight_quantizer = build_weight_quantizer(layer.weight, bits, config)
        return quantized

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*, in]`` to ``[*, out]``."""
        if self.is_exact():
            return _exact_layer(self, x)
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


class QuantizedAveragePool(_Exact, nn.Module):
    """Average pooling over windows, or over equal parts of the image.

    Args:
        kernel: Size of the window; None to divide the image into ``parts``.
        stride: Stride of the window; None for ``kernel``.
        parts: Number of parts, vertically and horizontally. They must divide the image's size.
        keep_dims: Whether the result keeps its height and width.
    """

    def __init__(
        self,
        kernel: tuple[int, int] | None,
        stride: tuple[int, int] | None,
        parts: tuple[int, int] = (1, 1),
        keep_dims: bool = True,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride
        self.parts = parts
        self.keep_dims = keep_dims

    def window(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Kernel and stride for images of this size."""
        if self.kernel is None:
            kernel = (height // self.parts[0], width // self.parts[1])
            return kernel, kernel
        return self.kernel, self.stride or self.kernel

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, C, H', W']``, or to ``[N, C]``."""
        kernel, stride = self.window(x.shape[-2], x.shape[-1])
        if self.is_exact():
            assert self.input_quantizer is not None
            integers = self.input_quantizer.integers(x)
            total = F.avg_pool2d(integers, kernel, stride, divisor_override=1)
            scale = self.input_quantizer.scale.double() / (kernel[0] * kernel[1])
            result = total * scale.to(torch.float32)
        else:
            result = F.avg_pool2d(x, kernel, stride)
        return result if self.keep_dims else result.flatten(1)

    def extra_repr(self) -> str:
        """Describe the window."""
        return f"kernel={self.kernel}, stride={self.stride}, parts={self.parts}"


class _Fixed(_Exact, nn.modules.batchnorm._BatchNorm):
    """Batch normalisation that always uses its running statistics, even after ``train()``.

    Attributes:
        layer: Layer that it is folded into; None for none.
        input_quantizer: If `layer` is None, the quantizer of the input. If the input is in float,
            any quantizer of the student, of which only the mode is read.
        reads_codes: Whether the input is on the grid of `input_quantizer`.
    """

    layer: QuantizedConv2d | QuantizedLinear | None = None
    reads_codes: bool = False

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Return the normalisation as ``y = scale * x + shift``, float64 ``[C]``."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = (self.running_var.double() + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.detach().double()
        shift = -self.running_mean.double() * scale
        if self.bias is not None:
            shift = shift + self.bias.detach().double()
        return scale, shift

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``, unless the layer before has done so."""
        if self.layer is not None and self.layer.is_exact():
            return x
        if self.is_exact():
            along = (-1,) + (1,) * (x.dim() - 2)
            scale, shift = (part.view(along) for part in fold_norm(self))
            if self.reads_codes:
                assert self.input_quantizer is not None
                x = self.input_quantizer.integers(x)
            return x * scale + shift
        return super().forward(x)

    @classmethod
    def from_float(cls, layer: nn.modules.batchnorm._BatchNorm) -> Any:
        """Make a fixed normalisation with the parameters and statistics of ``layer``."""
        fixed = cls(
            layer.num_features,
            eps=layer.eps,
            momentum=layer.momentum,
            affine=layer.affine,
            device="meta",
        )
        fixed.weight, fixed.bias = layer.weight, layer.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(fixed, name, getattr(layer, name))
        for name, child in layer.named_children():  # the activation inside timm's BatchNormAct2d
            fixed.add_module(name, child)
        return fixed.eval()

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode."""
        return super().train(False)


class FixedBatchNorm1d(_Fixed, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with fixed statistics."""


class FixedBatchNorm2d(_Fixed, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with fixed statistics."""
