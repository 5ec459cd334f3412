"""Layers of a student: the float layer's parameters under the same names, and a quantizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .config import QuantizationConfig
from .quantizer import WeightQuantizer, build_weight_quantizer

__all__ = ["FixedBatchNorm1d", "FixedBatchNorm2d", "QuantizedConv2d", "QuantizedLinear"]


class QuantizedConv2d(nn.Conv2d):
    """A convolution with a quantized weight; its bias stays in float."""

    weight_quantizer: WeightQuantizer

    @classmethod
    def from_float(cls, layer: nn.Conv2d, bits: int, config: QuantizationConfig) -> QuantizedConv2d:
        """Take over the parameters of ``layer``."""
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
        """``[N, C_in, H, W]`` to ``[N, C_out, H', W']``."""
        return self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)


class QuantizedLinear(nn.Linear):
    """A linear layer with a quantized weight; its bias stays in float."""

    weight_quantizer: WeightQuantizer

    @classmethod
    def from_float(cls, layer: nn.Linear, bits: int, config: QuantizationConfig) -> QuantizedLinear:
        """Take over the parameters of ``layer``."""
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
        """``[*, in]`` to ``[*, out]``."""
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


class _Fixed(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation that always uses its running statistics, even after ``train()``."""

    @classmethod
    def from_float(cls, layer: nn.modules.batchnorm._BatchNorm) -> Any:
        """Take over the parameters and statistics of ``layer``."""
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
