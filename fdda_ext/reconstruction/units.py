r"""Division of a student into the units that are reconstructed one after another.

A student's graph is cut at the tensors through which every path from the image to the logits runs.
Between two of them is one layer, or a block of parallel paths, such as a residual block or an
inception block. So the names of classes do not matter:

    relu - [Q] | conv - bn - relu - [Q] - conv - bn - add - relu - [Q] | ...        one unit
               \__________ or conv - bn __________/

Operations after a unit's last layer, up to the next quantizer, belong to the unit. Pooling,
reshaping and quantizers before a layer belong to the unit of that layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from ..quantization.layers import QuantizedConv2d
from ..quantization.operations import operation, shape, tensor_inputs

__all__ = ["Granularity", "Unit", "arguments_of", "partition", "region"]

Granularity = Literal["layer", "block", "network"]


@dataclass(frozen=True)
class Unit:
    """A part of a student with one output; nodes and modules are given by name.

    Attributes:
        layers: Its convolutions and linear layers.
        quantizers: Its activation quantizers that no earlier unit has.
        inputs: Tensors that it reads: results of earlier units, or the image.
        output: Tensor that it computes.
        known: Tensors that it and all earlier units compute.
    """

    layers: tuple[str, ...]
    quantizers: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    known: frozenset[str]

    def of(self, network: GraphModule) -> GraphModule:
        """Return the unit as a function of its `inputs`, for a network with the student's graph."""
        return region(network, [self.output], self.inputs)[0]


def region(
    network: GraphModule, outputs: Sequence[str], known: Collection[str]
) -> tuple[GraphModule, tuple[str, ...]]:
    """Extract the part of ``network`` that computes ``outputs`` from ``known`` values.

    Args:
        network: Network; the result shares its modules.
        outputs: Names of nodes.
        known: Names of nodes with given values. The input of the network is always known.

    Returns:
        A function that returns a tensor, or a tuple for several outputs; and its arguments' names.
    """
    needed, arguments = _needed(network, outputs, known)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in arguments:
        copies[node] = graph.placeholder(node.name)
    for node in network.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    named = {node.name: copy for node, copy in copies.items()}
    results = [named[name] for name in outputs]
    graph.output(results[0] if len(results) == 1 else tuple(results))
    return GraphModule(network, graph), tuple(node.name for node in arguments)


def arguments_of(
    network: GraphModule, outputs: Sequence[str], known: Collection[str]
) -> tuple[str, ...]:
    """Return the names of the arguments of this `region`."""
    return tuple(node.name for node in _needed(network, outputs, known)[1])


def _needed(
    network: GraphModule, outputs: Sequence[str], known: Collection[str]
) -> tuple[set[Node], list[Node]]:
    """Nodes needed for ``outputs``, and those of them that are given, in order."""
    nodes = {node.name: node for node in network.graph.nodes}
    given = {name for name in known if name in nodes}
    given.update(n.name for n in network.graph.nodes if n.op == "placeholder")
    pending = [nodes[name] for name in outputs]
    needed = set(pending)
    while pending:
        node = pending.pop()
        if node.name not in given:
            pending += [n for n in node.all_input_nodes if n not in needed]
            needed.update(node.all_input_nodes)
    return needed, [n for n in network.graph.nodes if n in needed and n.name in given]


def partition(
    student: GraphModule,
    granularity: Granularity,
    image: Tensor,
    *,
    quantize: Literal["output", "input"] = "output",
    activation: bool = True,
) -> list[Unit]:
    """Divide ``student`` into units in order of execution; each layer is in exactly one.

    Args:
        student: Network from `prepare`.
        granularity: "layer" for one layer per unit; "block" for the part between two tensors that
            all paths run through, where a depthwise convolution is joined with the pointwise ones
            around it (an inverted residual without shortcut); "network" for a single unit.
        image: Image ``[1, C, H, W]``, to find out which nodes are tensors.
        quantize: Whether a unit ends after the quantizer of its output, or begins before those of
            its inputs. With "input", a quantizer that several units read belongs to the first.
        activation: Whether the activation function that follows belongs to the unit.
    """
    modules = dict(student.named_modules())
    tensors = _tensors(student, image)
    nodes = [n for n in student.graph.nodes if n in tensors]
    through = {"batch_norm"}
    if activation:
        through |= {"relu", "relu6", "sigmoid", "other"}
    if quantize == "output":
        through.add("quantizer")
    units: list[Unit] = []
    before: set[str] = set()
    for end in _ends(nodes, granularity, modules):
        output = _extend(end, through, modules)
        readable = {
            n.name
            for n in nodes
            if n.name in before and (quantize == "output" or operation(n, modules) != "quantizer")
        }
        function, inputs = region(student, [output.name], readable)
        own = [n for n in function.graph.nodes if n.op == "call_module" and n.name not in before]
        before = before | {n.name for n in function.graph.nodes if n.op != "output"}
        units.append(
            Unit(
                tuple(str(n.target) for n in own if _is_layer(n, modules)),
                tuple(str(n.target) for n in own if operation(n, modules) == "quantizer"),
                inputs,
                output.name,
                frozenset(n.name for n in nodes if n.name in before),
            )
        )
    return units


class _Tensors(Interpreter):
    """Interpreter that finds the nodes with a tensor that depends on the input."""

    def __init__(self, network: GraphModule) -> None:
        super().__init__(network)
        self.dependent: set[Node] = set()
        self.found: set[Node] = set()

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if n.op == "placeholder" or any(i in self.dependent for i in n.all_input_nodes):
            self.dependent.add(n)
            if n.op != "output" and isinstance(result, Tensor):
                self.found.add(n)
        return result


@torch.no_grad()
def _tensors(network: GraphModule, image: Tensor) -> set[Node]:
    interpreter = _Tensors(network)
    interpreter.run(image)
    return interpreter.found


def _is_layer(node: Node, modules: dict[str, nn.Module]) -> bool:
    return operation(node, modules) in ("conv", "linear")


def _extend(node: Node, through: set[str], modules: dict[str, nn.Module]) -> Node:
    """Last node of the chain of single users after ``node`` with operations in ``through``."""
    while len(node.users) == 1:
        (user,) = node.users
        kind = operation(user, modules)
        if kind not in through or len(tensor_inputs(user)) != 1 or shape(user) != shape(node):
            break
        node = user
        if kind == "quantizer":
            break
    return node


# ---- blocks ---------------------------------------------------------------------------------


def _ends(
    nodes: list[Node], granularity: Granularity, modules: dict[str, nn.Module]
) -> Iterable[Node]:
    """Last node of every unit, without the operations that follow."""
    layers = [node for node in nodes if _is_layer(node, modules)]
    if granularity == "layer":
        return layers
    segments = _segments(nodes, modules)
    if granularity == "network":
        return [segments[-1][-1]]
    joined = _joined(segments, modules)
    return [segment[-1] for i, segment in enumerate(segments) if i + 1 not in joined]


def _segments(nodes: list[Node], modules: dict[str, nn.Module]) -> list[list[Node]]:
    """Segments with layers between tensors that all paths run through.

    Each segment lists its layers, then the tensor at its end.
    """
    position = {node: index for index, node in enumerate(nodes)}
    reach = 0  # last position at which a tensor computed so far is read
    found: list[list[Node]] = []
    layers: list[Node] = []
    for index, node in enumerate(nodes):
        if _is_layer(node, modules):
            layers.append(node)
        if reach <= index and layers:
            found.append([*(n for n in layers if n is not node), node])
            layers = []
        reach = max([reach, *(position[user] for user in _users(node, position))])
    return found


def _users(node: Node, tensors: Collection[Node]) -> set[Node]:
    """Tensors computed from ``node``, directly or through a tuple or a size."""
    direct = set(node.users)
    return {n for n in direct if n in tensors}.union(
        *(_users(n, tensors) for n in direct if n not in tensors)
    )


def _joined(segments: list[list[Node]], modules: dict[str, nn.Module]) -> set[int]:
    """Indices of segments to join with the one before: neighbours of depthwise convolutions."""
    joined: set[int] = set()
    for index, segment in enumerate(segments):
        if not _is_depthwise(segment, modules):
            continue
        after = index + 1
        while after < len(segments) and operation(segments[after][-1], modules) == "mul":
            after += 1  # squeeze and excitation
        if after < len(segments) and _is_pointwise(segments[after], modules):
            joined.update(range(index + 1, after + 1))
        if index and index - 1 not in joined and _is_pointwise(segments[index - 1], modules):
            joined.add(index)
    return joined


def _lone_convolution(segment: list[Node], modules: dict[str, nn.Module]) -> QuantizedConv2d | None:
    layer = modules.get(str(segment[0].target)) if len(segment) == 1 else None
    return layer if isinstance(layer, QuantizedConv2d) else None


def _is_depthwise(segment: list[Node], modules: dict[str, nn.Module]) -> bool:
    layer = _lone_convolution(segment, modules)
    return layer is not None and 1 < layer.groups == layer.in_channels


def _is_pointwise(segment: list[Node], modules: dict[str, nn.Module]) -> bool:
    layer = _lone_convolution(segment, modules)
    return layer is not None and layer.groups == 1 and layer.kernel_size == (1, 1)
