"""Cost of fewer bits in one layer of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from ..quantization import QuantizationConfig, float_copy
from ..quantization.layers import QuantizedConv2d, QuantizedLinear
from ..quantization.quantizer import build_weight_quantizer
from .cache import BATCH

__all__ = ["prediction_costs"]


@torch.no_grad()
def prediction_costs(
    student: GraphModule,
    config: QuantizationConfig,
    images: Tensor,
    choices: Mapping[str, Sequence[int]],
) -> dict[str, dict[int, float]]:
    """Measure how far predictions move if the weight of only one layer is quantized.

    Args:
        student: Network from `prepare`.
        config: Grid and ranges of its weights.
        images: Images ``[n, C, H, W]``.
        choices: Numbers of bits to try, by layer.

    Returns:
        Mean Kullback-Leibler divergence between the predictions of the float network and of the
        network with only this weight quantized, by layer and bits.
    """
    network = float_copy(student)
    batches = images.split(BATCH)
    expected = [F.log_softmax(network(batch), dim=1) for batch in batches]
    costs: dict[str, dict[int, float]] = {}
    for name, numbers in choices.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, (QuantizedConv2d, QuantizedLinear))
        weight, costs[name] = layer.weight.data, {}
        for bits in numbers:
            layer.weight.data = build_weight_quantizer(weight, bits, config)(weight)
            divergence = torch.stack(
                [
                    F.kl_div(
                        F.log_softmax(network(batch), dim=1),
                        target,
                        reduction="sum",
                        log_target=True,
                    )
                    for batch, target in zip(batches, expected, strict=True)
                ]
            )
            costs[name][bits] = float(divergence.sum()) / len(images)
        layer.weight.data = weight
    return costs
