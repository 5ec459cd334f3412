"""A scale for every channel of an activation, folded into the layers around it (Bit-Split's ECAQ).

Where a BN, a ReLU and one layer follow each other, the quantizer before the layer can give channel
c its own scale r_c s. The BN is divided by r_c, and the layer's weights for channel c are
multiplied by r_c. So all codes share the scale s, and the float network computes the same
function.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from ..quantization.operations import operation, tensor_inputs

__all__ = ["channel_steps", "fold_channel_scales_", "input_of"]


class _Reached(Exception):  # noqa: N818  (not an error)
    pass


@torch.no_grad()
def input_of(network: nn.Module, name: str, images: Tensor) -> Tensor:
    """Return the input of layer ``name`` for ``images [n, C, H, W]``; run nothing after it."""
    found: list[Tensor] = []

    def keep(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0])
        raise _Reached

    handle = network.get_submodule(name).register_forward_pre_hook(keep)
    try:
        network(images)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError(f"{name} does not run")


def channel_steps(x: Tensor, bits: int) -> Tensor:
    """Minimise the squared error of every channel over its scale, by Lloyd's iterations.

    Args:
        x: Values ``[n, C, *]``, not negative.
        bits: Bits of the codes, b.

    Returns:
        s ``[C]``, from ``q = clip(round(x / s))``, ``s = <x, q> / <q, q>``, started at the full
        range, ``max / (2^b - 1)``; 0 for a channel that is always 0.
    """
    rows = x.transpose(0, 1).flatten(1).double()
    largest = 2**bits - 1
    steps = rows.amax(1) / largest
    for _ in range(50):
        safe = torch.where(steps > 0, steps, 1.0)[:, None]
        codes = (rows / safe).round().clamp(0, largest)
        best = (rows * codes).sum(1) / (codes * codes).sum(1)
        new = torch.where(best.isfinite(), best, steps)
        if torch.equal(new, steps):
            break
        steps = new
    return steps.to(x.dtype)


def _chains(network: GraphModule) -> Iterator[tuple[_BatchNorm, str]]:
    """Yield every BN that only one layer reads, through a ReLU, and that layer's name."""
    modules = dict(network.named_modules())
    for node in network.graph.nodes:
        if node.op != "call_module" or not isinstance(
            modules[str(node.target)], (nn.Conv2d, nn.Linear)
        ):
            continue
        (relu,) = tensor_inputs(node)
        if operation(relu, modules) != "relu" or len(relu.users) != 1:
            continue
        (norm,) = tensor_inputs(relu)
        found = modules.get(str(norm.target)) if norm.op == "call_module" else None
        if isinstance(found, _BatchNorm) and found.affine and len(norm.users) == 1:
            yield found, str(node.target)


@torch.no_grad()
def fold_channel_scales_(network: GraphModule, images: Tensor, bits: int) -> dict[str, Tensor]:
    """Fold scales r of channels into every layer after a BN and a ReLU, in place.

    Args:
        network: Float network from `fdda_ext.quantization.tracing.trace`.
        images: Calibration images ``[n, C, H, W]``.
        bits: Bits of activations.

    Returns:
        r ``[C]`` by layer: `channel_steps` over their mean, at least 0.01; 1 for a channel that is
        always 0.
    """
    found: dict[str, Tensor] = {}
    for norm, name in _chains(network):
        steps = channel_steps(input_of(network, name, images), bits)
        if not bool((steps > 0).any()):
            continue
        scales = (steps / steps[steps > 0].mean()).clamp_min(0.01)
        scales = torch.where(steps > 0, scales, 1.0)
        layer = network.get_submodule(name)
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        norm.weight.div_(scales)
        norm.bias.div_(scales)
        weight = layer.weight.data
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        grouped = weight.unflatten(0, (groups, -1))  # [G, M / G, C / G, *]
        along = scales.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        layer.weight.data = (grouped * along).flatten(0, 1)
        found[name] = scales
    return found
