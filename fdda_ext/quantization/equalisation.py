"""Equalisation: similar ranges for all channels of an activation, in an equivalent network.

All channels of an activation share one scale. A channel with a small range then has few codes. Let
T be an activation's tensor, computed by a batch normalisation (BN) or a layer, perhaps through a
ReLU, and read by other layers. For scales s and shifts t of the channels,

    T'_c = s_c (T_c - t_c),    W'_mc = W_mc / s_c,    b'_m = b_m + sum_c W_mc t_c

compute the same outputs. BN or layer before T includes s and t in its affine parameters or weights,
and the layers after T have the weights W' and the biases b'. This is cross-layer equalisation
(Nagel et al., ICCV 2019, section 4.1), with three extensions:

* Residual sums: all tensors that additions connect share one s, a geometric mean, and t adds up.
* In the student, ReLU6 clips channel c at 6 / s_c. This is above the values that a quantizer keeps.
  In the float network, see `EqualisedReLU6`, it clips at 6.
* Linear bottlenecks have no activation function, so t_c can be the mean of channel c. The layers
  after them must be without padding.

s_c is ``w_c^(1 - a) / r_c^a`` times a constant. Here r_c is the 8-norm of channel c: the best
clipping threshold at four bits is nearly proportional to it, for normal as for Laplace
distributions. w_c is the norm of the weights that read channel c. The strength a weighs the errors
of activations and weights (SmoothQuant, ICML 2023, eq. 4). A depthwise layer has its own weight
scale for every channel, so its input gets strength 1.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.modules.batchnorm import _BatchNorm

from .operations import operation, shape, tensor_inputs

__all__ = ["EqualisedReLU6", "clip_exactly_", "equalise_"]

#: Operations that map each channel to itself and commute with positive factors, at least in the
#: range of the quantizer.
_CHANNELWISE = frozenset(
    {"identity", "relu", "relu6", "max_pool", "avg_pool", "zero_pad", "nearest"}
)
#: Exponent of the norm that measures ranges.
_NORM = 8
#: Smallest range of a channel over the largest; a factor above 1000 would amplify noise.
_SMALLEST = 1e-3
#: ReLU6 clips no channel below this multiple of its 8-norm. Quantizers of four bits clip at 1.4.
_CLIPPED = 1.5
_AT_ONCE = 32


class EqualisedReLU6(nn.ReLU6):
    """ReLU6 whose input has been multiplied by ``scale [C]``.

    Attributes:
        exact: False clips all channels at 6, which an integer program can do. True clips channel c
            at ``6 scale_c``, as the network did before.
    """

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.exact = False

    def forward(self, x: Tensor) -> Tensor:
        """Clip ``x [N, C, *]`` at 0 and at the upper limit."""
        if not self.exact:
            return super().forward(x)
        return torch.minimum(x.relu(), (6 * self.scale).view(-1, *[1] * (x.dim() - 2)))


@dataclass
class _Group:
    """Nodes whose channels must have the same scales.

    Attributes:
        nodes: The nodes.
        producers: Nodes of the BNs and layers whose results enter the group.
        readers: Nodes of the layers that read it, with the node that they read.
        fixed: Whether the scales must be 1.
        shifted: Whether the channels can have shifts.
    """

    nodes: list[Node] = field(default_factory=list)
    producers: list[Node] = field(default_factory=list)
    readers: list[tuple[Node, Node]] = field(default_factory=list)
    fixed: bool = False
    shifted: bool = True


@torch.no_grad()
def equalise_(
    network: GraphModule, activations: Collection[Node], images: Tensor, strength: float
) -> int:
    """Equalise the ranges of all channels, in place.

    Args:
        network: Float network from `fdda_ext.quantization.tracing.trace`.
        activations: Nodes of the tensors that will have few bits.
        images: Calibration images ``[n, C, H, W]``.
        strength: 1 gives all channels the same range; 0 gives the weights that read them the same
            norm.

    Returns:
        Number of tensors that are equalised.
    """
    modules = dict(network.named_modules())
    groups = [g for g in _groups(network, modules) if any(n in activations for n in g.nodes)]
    shifts = _shifts(network, modules, groups, images)
    measured = [n for g in groups for n in g.nodes if n in activations]
    ranges = _Norms(network, measured, shifts).over(images)
    for group in groups:
        scale = _scales(group, modules, ranges, strength)
        for node in group.nodes:
            if operation(node, modules) == "relu6":
                _call_equalised(network, node, scale)
        for node in group.producers:
            _scale_result(modules[str(node.target)], scale, shifts.get(node))
        for node, read in group.readers:
            _scale_input(node, modules, scale, shifts.get(read))
    network.recompile()
    return len(measured)


def _scales(
    group: _Group, modules: dict[str, nn.Module], ranges: dict[Node, Tensor], strength: float
) -> Tensor:
    """Return the scales ``[C]`` of a group."""
    layers = [modules[str(node.target)] for node, _ in group.readers]
    strength = 1.0 if all(_is_depthwise(layer) for layer in layers) else strength
    measured = [ranges[node] for node in group.nodes if node in ranges]
    used = torch.stack([r > 0 for r in measured]).all(0)
    if not bool(used.any()):
        return torch.ones_like(measured[0])
    r = torch.stack([_logarithm(r) for r in measured]).mean(0)
    w = torch.stack([_logarithm(_column_norms(layer)) for layer in layers]).mean(0)
    log = (1 - strength) * w - strength * r
    if not any(operation(node, modules) == "relu6" for node in group.nodes):
        return torch.where(used, log - log[used].mean(), 0.0).exp()
    most = torch.stack([6 / (_CLIPPED * r).clamp_min(_SMALLEST) for r in measured]).amin(0)
    scale = torch.where(used, log - log[used].amin(), 0.0).exp()
    return torch.minimum(scale, most.clamp_min(1.0))


def _logarithm(x: Tensor) -> Tensor:
    """Return ``log x`` for ``x [C]``, of which small values are raised."""
    return x.clamp_min(_SMALLEST * x.max()).clamp_min(torch.finfo(x.dtype).tiny).log()


def _column_norms(layer: nn.Module) -> Tensor:
    """Return the norm of the weights of each input channel, ``[C]``."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    grouped = layer.weight.unflatten(0, (groups, -1)).transpose(1, 2)  # [G, C / G, M / G, *]
    return grouped.flatten(2).norm(dim=2).flatten()


def clip_exactly_(network: nn.Module) -> None:
    """Let every `EqualisedReLU6` of a float network clip where the original network does."""
    for module in network.modules():
        if isinstance(module, EqualisedReLU6):
            module.exact = True


def _call_equalised(network: GraphModule, node: Node, scale: Tensor) -> None:
    """Replace a ReLU6 by one whose input has been multiplied by ``scale``."""
    name = f"equalised_relu6.{node.name}"
    network.add_submodule(name, EqualisedReLU6(scale))
    node.op, node.target = "call_module", name
    node.args, node.kwargs = (tensor_inputs(node)[0],), {}


def _groups(network: GraphModule, modules: dict[str, nn.Module]) -> list[_Group]:
    """Divide the nodes into groups; return those that can be scaled."""
    of: dict[Node, _Group] = {}

    def join(first: _Group, second: _Group) -> _Group:
        if first is second:
            return first
        first.nodes += second.nodes
        first.producers += second.producers
        first.readers += second.readers
        first.fixed |= second.fixed
        first.shifted &= second.shifted
        of.update(dict.fromkeys(second.nodes, first))
        return first

    for node in network.graph.nodes:
        kind = operation(node, modules)
        inputs = tensor_inputs(node)
        group = of[node] = _Group([node])
        if kind in ("conv", "linear"):
            read = of[inputs[0]]
            read.readers.append((node, inputs[0]))
            read.shifted &= _takes_shift(node, modules)
            read.fixed |= len(shape(inputs[0])) not in (2, 4)
            group.producers, group.shifted = [node], False
            group.fixed = len(shape(node)) not in (2, 4)
        elif kind == "batch_norm":
            of[inputs[0]].fixed = True  # includes a convolution's raw result
            norm = modules[str(node.target)]
            assert isinstance(norm, _BatchNorm)
            group.producers, group.fixed = [node], not norm.affine
        elif kind in _CHANNELWISE or _drops_positions(kind, node):
            group = join(of[inputs[0]], group)
            group.shifted &= kind == "identity"
        elif kind == "add" and len(inputs) == 2 and shape(inputs[0]) == shape(inputs[1]):
            join(join(of[inputs[0]], of[inputs[1]]), group)
        else:
            group.fixed = True
            for read_node in node.all_input_nodes:
                of[read_node].fixed = True
    distinct = {id(group): group for group in of.values()}.values()
    return [g for g in distinct if not g.fixed and g.producers and g.readers]


def _drops_positions(kind: str, node: Node) -> bool:
    """Return whether ``node`` reshapes ``[N, C, 1, 1]`` to ``[N, C]``."""
    if kind != "reshape":
        return False
    before = shape(tensor_inputs(node)[0])
    return len(before) == 4 and before[2] == before[3] == 1 and shape(node) == before[:2]


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def _norm_after(node: Node, modules: dict[str, nn.Module]) -> _BatchNorm | None:
    """Return the BN that alone reads the result of ``node``."""
    users = list(node.users)
    if len(users) != 1 or operation(users[0], modules) != "batch_norm":
        return None
    norm = modules[str(users[0].target)]
    assert isinstance(norm, _BatchNorm)
    return norm


def _takes_shift(node: Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a layer can undo a shift of its input: it has no padding, and a bias or BN."""
    layer = modules[str(node.target)]
    padded = isinstance(layer, nn.Conv2d) and layer.padding not in ((0, 0), "valid")
    return not padded and (
        getattr(layer, "bias", None) is not None or _norm_after(node, modules) is not None
    )


def _shifts(
    network: GraphModule, modules: dict[str, nn.Module], groups: list[_Group], images: Tensor
) -> dict[Node, Tensor]:
    """Return the shift ``[C]`` of every node that has one: the mean of each channel."""
    shifted = {node for group in groups if group.shifted for node in group.nodes}
    norms = [n for g in groups if g.shifted for n in g.producers]
    shifts = _Means(network, norms).over(images)
    for node in network.graph.nodes:
        if node in shifted and node not in shifts:
            parts = [shifts[n] for n in tensor_inputs(node)]
            shifts[node] = torch.stack(parts).sum(0)
    return shifts


class _Means(Interpreter):
    """Means of the channels of some nodes, ``[C]`` each."""

    def __init__(self, network: GraphModule, nodes: Collection[Node]) -> None:
        super().__init__(network)
        self.wanted = set(nodes)
        self.sums: dict[Node, Any] = dict.fromkeys(nodes, 0.0)
        self.counts: dict[Node, Any] = dict.fromkeys(nodes, 0.0)

    def run_node(self, n: Node) -> Any:
        """Compute a node and add up its values."""
        result = super().run_node(n)
        if n in self.wanted:
            self.add(n, result.float().transpose(0, 1).flatten(1))
        return result

    def add(self, n: Node, rows: Tensor) -> None:
        """Add ``rows [C, *]`` of node ``n``."""
        self.sums[n] = self.sums[n] + rows.sum(1).double()
        self.counts[n] += rows.shape[1]

    def over(self, images: Tensor) -> dict[Node, Tensor]:
        """Run all images; return the results."""
        if not self.wanted:
            return {}
        for batch in images.split(_AT_ONCE):
            self.run(batch)
        return {n: self.result(n).float() for n in self.wanted}

    def result(self, n: Node) -> Tensor:
        """Return the mean ``[C]`` of node ``n``."""
        return self.sums[n] / self.counts[n]


class _Norms(_Means):
    """8-norms of the channels over all values that are not 0: ``(mean |x - shift|^8)^(1/8)``."""

    def __init__(
        self, network: GraphModule, nodes: Collection[Node], shifts: dict[Node, Tensor]
    ) -> None:
        super().__init__(network, nodes)
        self.shifts = shifts

    def add(self, n: Node, rows: Tensor) -> None:
        """Add the powers of ``rows [C, *]`` of node ``n``."""
        if n in self.shifts:
            rows = rows - self.shifts[n][:, None]
        self.sums[n] = self.sums[n] + rows.square().square().square().sum(1).double()
        self.counts[n] = self.counts[n] + rows.count_nonzero(1)

    def result(self, n: Node) -> Tensor:
        """Return the norm ``[C]`` of node ``n``."""
        return (self.sums[n] / self.counts[n].clamp_min(1)).pow(1 / _NORM)


def _scale_result(module: nn.Module, scale: Tensor, shift: Tensor | None) -> None:
    """Let a BN or layer compute ``scale (y - shift)`` instead of y."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))
    if isinstance(bias, Tensor):
        bias.sub_(0.0 if shift is None else shift).mul_(scale)


def _scale_input(
    node: Node, modules: dict[str, nn.Module], scale: Tensor, shift: Tensor | None
) -> None:
    """Let a layer compute the same result from ``scale (x - shift)`` instead of x."""
    layer = modules[str(node.target)]
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    weight = layer.weight
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    along = (groups, 1, -1) + (1,) * (weight.dim() - 2)
    grouped = weight.unflatten(0, (groups, -1))  # [G, M / G, C / G, *]
    if shift is not None:
        constant = (grouped * shift.view(along)).flatten(0, 1).flatten(1).sum(1)
        if layer.bias is not None:
            layer.bias.add_(constant)
        else:
            norm = _norm_after(node, modules)
            assert norm is not None
            assert norm.running_mean is not None
            norm.running_mean.sub_(constant)
    weight.copy_((grouped / scale.view(along)).flatten(0, 1))
