"""Capture of the inputs of a network's BN layers, in order of execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from .losses import LayerStatistics

__all__ = ["BatchNormCapture", "capture", "running_statistics"]


class BatchNormCapture(NamedTuple):
    """Captured results of one forward pass.

    Attributes:
        logits: Output of the network, ``[N, K]``.
        layers: The L batch-normalisation layers in order of execution.
        inputs: Input ``x_l [N, C_l, *]`` of each layer, with its autograd graph; empty if a
            function measured the inputs instead.
    """

    logits: Tensor
    layers: list[_BatchNorm]
    inputs: list[Tensor]


def capture(
    network: nn.Module, images: Tensor, measure: Callable[[int, Tensor], None] | None = None
) -> BatchNormCapture:
    """Run ``network`` on ``images [N, C, H, W]`` and keep the input of each BN layer.

    The hooks exist only during this pass.

    Args:
        network: Network with batch-normalisation layers.
        images: Input of the network.
        measure: Function that gets each layer's number and input when the pass reaches the layer.
            The backward pass then computes its gradient layer by layer. None to keep all inputs.

    Raises:
        UsageError: If the network has no batch-normalisation layer.
    """
    layers: list[_BatchNorm] = []
    inputs: list[Tensor] = []

    def keep(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        layers.append(layer)
        if measure is None:
            inputs.append(arguments[0])
        else:
            measure(len(layers) - 1, arguments[0])

    handles = [
        module.register_forward_pre_hook(keep)
        for module in network.modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        logits = network(images)
    finally:
        for handle in handles:
            handle.remove()
    if not layers:
        raise UsageError(
            "capture: expected network to execute at least one batch-normalisation layer, "
            f"got {type(network).__name__} with none"
        )
    return BatchNormCapture(logits, layers, inputs)


def running_statistics(layers: list[_BatchNorm]) -> LayerStatistics:
    """Return the running statistics ``[1, C_l]`` of the layers of one capture, in float32.

    Raises:
        UsageError: If a layer has no running statistics.
    """
    means, variances = [], []
    for index, layer in enumerate(layers):
        if layer.running_mean is None or layer.running_var is None:
            raise UsageError(
                f"running_statistics: expected batch-normalisation layer {index} to track running "
                "statistics, got track_running_stats=False"
            )
        means.append(layer.running_mean.detach().clone().unsqueeze(0).to(torch.float32))
        variances.append(layer.running_var.detach().clone().unsqueeze(0).to(torch.float32))
    return LayerStatistics(means, variances)
