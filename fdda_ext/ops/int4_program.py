"""Fake kernels of the private operators of an integer program on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library


@library.register_fake("fdda::_int4_image_codes")
def _(
    images: Tensor, table: Tensor | None, inverse_scale: float, zero_point: int, quant_max: int
) -> Tensor:
    count, channels, height, width = images.shape
    return images.new_empty((count, height, width, channels), dtype=torch.uint8)


@library.register_fake("fdda::_int4_max_pool")
def _(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    return x.new_empty((x.shape[0], *size, x.shape[3]))
