"""A convolution as a matrix product: the vectors that its weights multiply."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["patches", "rows"]


def patches(layer: nn.Conv2d | nn.Linear, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the vectors that the weights of an output multiply, for each of G groups.

    Args:
        layer: Layer with G groups; a linear layer has one.
        x: Input of the layer, ``[n, C, H, W]`` or ``[n, C]``.
        positions: Output positions to use, counted row by row, int64 ``[n, p]``; None for all. A
            linear layer has one position.

    Returns:
        Vectors ``[G, n * p, N]``, ``N = C / G * kH * kW`` in the order of the weight.
    """
    if isinstance(layer, nn.Linear):
        return x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    count, channels, height, width = padded.shape
    down, right = (
        step * torch.arange(size, device=x.device)
        for step, size in zip(layer.dilation, layer.kernel_size, strict=True)
    )
    offsets = (down[:, None] * width + right).flatten()  # of a patch, relative to its corner
    across = (width - 1 - int(right[-1])) // layer.stride[1] + 1
    if positions is None:
        high = (height - 1 - int(down[-1])) // layer.stride[0] + 1
        positions = torch.arange(high * across, device=x.device).expand(count, -1)
    corners = positions // across * layer.stride[0] * width + positions % across * layer.stride[1]
    pixels = (corners[..., None] + offsets).flatten(1)  # [n, p * kH * kW]
    taken = padded.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1))
    grouped = taken.view(count, layer.groups, channels // layer.groups, -1, len(offsets))
    return grouped.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)


def rows(layer: nn.Conv2d | nn.Linear, weight: Tensor) -> Tensor:
    """Return ``weight [M, *]`` of ``layer`` as ``[G, M / G, N]``, to multiply with `patches`."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return weight.flatten(1).unflatten(0, (groups, -1))
