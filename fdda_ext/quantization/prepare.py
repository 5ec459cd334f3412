"""Conversion of a float network to a fake-quantized student.

The "deploy" grid quantizes the image, and every tensor that enters a convolution, a linear layer or
an average pooling. From such an input, the search goes back through operations that keep values on
a grid (max-pooling, reshaping, slicing, zero padding) to the operation that computed the values.
Its result is quantized for all readers:

    conv - bn - relu - [Q] - maxpool - conv          the fused ReLU's output
    conv - bn - add - relu - [Q] - conv              the residual sum; the branches stay in float
    conv - bn - [Q] - conv                           a linear bottleneck
    cat - [Q] - conv                                 one grid for all concatenated tensors
    relu - [Q] - global pooling - [Q] - linear       before and after the pooling

The "paper" grid quantizes only the outputs of ReLU and ReLU6.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from .config import QuantizationConfig
from .layers import (
    FixedBatchNorm1d,
    FixedBatchNorm2d,
    QuantizedAveragePool,
    QuantizedConv2d,
    QuantizedLinear,
)
from .operations import (
    GRID_PRESERVING,
    is_global_pooling,
    never_negative,
    operation,
    shape,
    tensor_inputs,
)
from .quantizer import LearnedActivationQuantizer, build_activation_quantizer
from .tracing import trace

__all__ = ["prepare"]

Role = Literal["image", "activation", "pooled"]


@dataclass(frozen=True)
class _Placement:
    """A tensor that will be quantized.

    Attributes:
        node: Node that computes it.
        role: "image" for the input and everything computed from it before the first layer; "pooled"
            for the result of global pooling; "activation" for all others.
        signed: Whether it can be negative.
        bits: Bits of its grid.
    """

    node: Node
    role: Role
    signed: bool
    bits: int


def prepare(model: nn.Module, config: QuantizationConfig, example_input: Tensor) -> GraphModule:
    """Build the fake-quantized student of ``model``, which stays unchanged.

    The ranges of weights are set. Activations stay in float until `calibrate` sets their ranges or
    `set_activation_mode` changes their mode. All parameters are trainable. Batch normalisation
    stays separate and always uses its running statistics, even after ``train()``. Dropout is
    removed. Layers keep their names, so ``student.load_state_dict(model.state_dict(),
    strict=False)`` works. A layer that is called several times gets a copy for every further call
    (``conv_2`` beside ``conv``). A state dict of ``model`` does not fill these copies, so load the
    weights into ``model`` first. The quantizer of tensor ``t`` is
    ``student.activation_quantizers.t``.

    Args:
        model: Trained network that torch.fx can trace.
        config: Bits, grid and ranges.
        example_input: Images ``[N, 3, H, W]``; only their shape is used.

    Returns:
        The student, in evaluation mode, on the device of ``model``.

    Raises:
        UsageError: If the network has a structure that cannot be quantized; names the module.
    """
    if not isinstance(example_input, Tensor) or example_input.dim() != 4 or not len(example_input):
        got = tuple(example_input.shape) if isinstance(example_input, Tensor) else example_input
        raise UsageError(f"prepare: expected example_input of images [N, 3, H, W], got {got}")
    return quantize_traced(trace_unpadded(model, example_input), config)


def trace_unpadded(model: nn.Module, example: Tensor) -> GraphModule:
    """Copy ``model`` into a graph as `trace` does, with asymmetric padding as nodes of its own."""
    network = trace(model, example)
    _write_out_padding(network)
    _drop_added_zeros(network)
    return network


def activations(network: GraphModule, config: QuantizationConfig) -> set[Node]:
    """Return the nodes of a network from `trace_unpadded` that will get the activations' bits."""
    return {p.node for p in _plan(network, config) if p.role == "activation"}


def quantize_traced(student: GraphModule, config: QuantizationConfig) -> GraphModule:
    """Turn a network from `trace_unpadded` into a student; see `prepare`."""
    placements = _plan(student, config)
    _quantize_layers(student, config)
    _insert_quantizers(student, placements, config)
    if config.grid == "deploy":
        _replace_average_pools(student)
        _link(student)
    student.graph.lint()
    student.recompile()
    return student.eval().requires_grad_(True)


def _write_out_padding(network: GraphModule) -> None:
    """Replace the padding "same" or "valid" of convolutions by numbers."""
    modules = dict(network.named_modules())
    for node in network.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d) or not isinstance(layer.padding, str):
            continue
        if layer.padding == "valid":
            layer.padding = (0, 0)
        elif layer.padding_mode == "zeros":
            reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            before = (reach[0] // 2, reach[1] // 2)
            after = (reach[0] - before[0], reach[1] - before[1])
            if before != after:
                _pad_input(network, node, (before[1], after[1], before[0], after[0]))
            layer.padding = before if before == after else (0, 0)


def _pad_input(network: GraphModule, node: Node, sides: tuple[int, int, int, int]) -> None:
    """Pad the input of ``node`` with zeros: left, right, top, bottom."""
    source = tensor_inputs(node)[0]
    with network.graph.inserting_before(node):
        pad = network.graph.call_function(F.pad, (source, list(sides)))
    batch, channels, height, width = shape(source)
    left, right, top, bottom = sides
    pad.meta["shape"] = torch.Size((batch, channels, height + top + bottom, width + left + right))
    node.replace_input_with(source, pad)


def _drop_added_zeros(network: GraphModule) -> None:
    """Remove additions of the number 0, with which Python's ``sum`` begins."""
    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        if operation(node, modules) == "add" and any(
            isinstance(a, (int, float)) and a == 0 for a in node.args
        ):
            node.replace_all_uses_with(tensor_inputs(node)[0])
            network.graph.erase_node(node)


def _plan(network: GraphModule, config: QuantizationConfig) -> list[_Placement]:
    """The tensors to quantize, in order of execution."""
    modules = dict(network.named_modules())
    nodes = list(network.graph.nodes)
    if config.grid == "paper":
        sources = {n for n in nodes if operation(n, modules) in ("relu", "relu6")}
        if not sources:
            raise UsageError(
                "prepare: expected model to have ReLU or ReLU6 with grid paper, got none; "
                "grid deploy quantizes every activation"
            )
    else:
        sources = {
            _source(tensor_inputs(n)[0], modules)
            for n in nodes
            if operation(n, modules) in ("conv", "linear", "avg_pool")
        }
        # An integer program reads only quantized images.
        sources |= {n for n in nodes if n.op == "placeholder" and n.users}
    positive = never_negative(network.graph, modules)
    bits: dict[Role, int] = {
        "image": config.image_bits,
        "activation": config.activation_bits,
        "pooled": config.pooled_bits,
    }
    image_side = _before_layers(nodes, modules)
    placements = []
    for node in nodes:
        if node in sources:
            role = _role(node, image_side, modules)
            placements.append(_Placement(node, role, node not in positive, bits[role]))
    if config.first_last_bits is None:
        return placements
    ends = _first_and_last(network, placements, modules)
    return [replace(p, bits=config.first_last_bits) if p in ends else p for p in placements]


def _source(node: Node, modules: dict[str, nn.Module], past_quantizers: bool = True) -> Node:
    """Node that computed the values of ``node``; stop at quantizers unless past_quantizers."""
    passed = GRID_PRESERVING if past_quantizers else GRID_PRESERVING - {"quantizer"}
    while operation(node, modules) in passed:
        node = tensor_inputs(node)[0]
    return node


def _before_layers(nodes: list[Node], modules: dict[str, nn.Module]) -> set[Node]:
    """The image and everything computed from it without a convolution or linear layer."""
    found: set[Node] = set()
    for node in nodes:
        inputs = tensor_inputs(node)
        is_made_of_image = any(n in found for n in inputs) and all(
            n in found or n.op == "get_attr" for n in inputs
        )
        is_layer = operation(node, modules) in ("conv", "linear")
        if node.op == "placeholder" or (is_made_of_image and not is_layer):
            found.add(node)
    return found


def _role(node: Node, image_side: set[Node], modules: dict[str, nn.Module]) -> Role:
    if is_global_pooling(node, modules):
        return "pooled"
    return "image" if node in image_side else "activation"


def _first_and_last(
    network: GraphModule, placements: list[_Placement], modules: dict[str, nn.Module]
) -> list[_Placement]:
    """The activation of the first layer, and the last activation."""
    activations = [p for p in placements if p.role == "activation"]
    if not activations:
        return []
    first_layer = next(
        n for n in network.graph.nodes if operation(n, modules) in ("conv", "linear")
    )
    reached = {first_layer}
    for node in network.graph.nodes:
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    first = next((p for p in activations if p.node in reached), activations[0])
    return [first, activations[-1]]


def _quantize_layers(student: GraphModule, config: QuantizationConfig) -> None:
    """Replace convolutions and linear layers by quantized ones, and fix batch normalisations."""
    modules = dict(student.named_modules())
    names = [str(n.target) for n in student.graph.nodes if n.op == "call_module"]
    weighted = [n for n in names if isinstance(modules[n], (nn.Conv2d, nn.Linear))]
    layer_bits = dict.fromkeys(weighted, config.weight_bits)
    if config.first_last_bits is not None:
        layer_bits[weighted[0]] = layer_bits[weighted[-1]] = config.first_last_bits
    for name, bits in config.layer_bits.items():
        if name not in layer_bits:
            close = difflib.get_close_matches(name, weighted, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(
                f"prepare: expected layer_bits of convolutions or linear layers, got {name}{hint}"
            )
        layer_bits[name] = bits
    for name in names:
        module = modules[name]
        bits = layer_bits.get(name, config.weight_bits)
        new: nn.Module
        if isinstance(module, nn.Conv2d):
            new = QuantizedConv2d.from_float(module, bits, config)
        elif isinstance(module, nn.Linear):
            new = QuantizedLinear.from_float(module, bits, config)
        elif isinstance(module, nn.BatchNorm1d):
            new = FixedBatchNorm1d.from_float(module)
        elif isinstance(module, _BatchNorm):
            new = FixedBatchNorm2d.from_float(module)
        else:
            continue
        student.set_submodule(name, new)


def _insert_quantizers(
    student: GraphModule, placements: list[_Placement], config: QuantizationConfig
) -> None:
    device = next(student.parameters()).device
    quantizers = nn.Module()
    student.add_module("activation_quantizers", quantizers)
    for placement in placements:
        node = placement.node
        size = shape(node)
        quantizer = build_activation_quantizer(
            placement.bits, placement.signed, size[1:].numel(), config
        )
        quantizers.add_module(node.name, quantizer.to(device))
        with student.graph.inserting_after(node):
            after = student.graph.call_module(f"activation_quantizers.{node.name}", (node,))
        after.meta["shape"] = size
        for user in [user for user in node.users if user is not after]:
            user.replace_input_with(node, after)


def _replace_average_pools(student: GraphModule) -> None:
    """Replace average poolings by ones that sum integers.

    Poolings without an integer instruction stay.
    """
    modules = dict(student.named_modules())
    pools = nn.Module()
    for node in student.graph.nodes:
        if operation(node, modules) != "avg_pool":
            continue
        pool = _average_pool(node, modules)
        if pool is None:
            continue
        if not list(pools.children()):
            student.add_module("average_pools", pools)
        pools.add_module(node.name, pool)
        node.op, node.target = "call_module", f"average_pools.{node.name}"
        node.args, node.kwargs = (tensor_inputs(node)[0],), {}
    student.delete_all_unused_submodules()


def _average_pool(node: Node, modules: dict[str, nn.Module]) -> QuantizedAveragePool | None:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.AvgPool2d) or node.target is F.avg_pool2d:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        if module is not None:
            given = {name: getattr(module, name) for name in (*names, "divisor_override")}
        else:
            given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
        if given.get("ceil_mode") or given.get("divisor_override"):
            return None
        if _pair(given.get("padding") or 0) != (0, 0):
            return None
        kernel = _pair(given["kernel_size"])
        return QuantizedAveragePool(kernel, _pair(given.get("stride") or kernel))
    sizes, results = shape(tensor_inputs(node)[0])[2:], tuple(shape(node)[2:])
    parts = (results[0], results[1]) if results else (1, 1)  # adaptive, or a mean
    if any(n % m for n, m in zip(sizes, parts, strict=True)):
        return None
    return QuantizedAveragePool(None, None, parts, keep_dims=bool(results))


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)


def _link(student: GraphModule) -> None:
    """Link every layer to the quantizer of its input and to the normalisation that follows."""
    modules = dict(student.named_modules())
    quantizers = [m for m in modules.values() if isinstance(m, LearnedActivationQuantizer)]
    for node in student.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, (QuantizedConv2d, QuantizedLinear, QuantizedAveragePool)):
            source = _source(tensor_inputs(node)[0], modules, past_quantizers=False)
            quantizer = modules[str(source.target)]
            assert isinstance(quantizer, LearnedActivationQuantizer)
            layer.__dict__["input_quantizer"] = quantizer
            after = list(node.users)
            norm = modules.get(str(after[0].target)) if len(after) == 1 else None
            if isinstance(norm, (FixedBatchNorm1d, FixedBatchNorm2d)) and not isinstance(
                layer, QuantizedAveragePool
            ):
                layer.__dict__["norm"], norm.__dict__["layer"] = norm, layer
        elif isinstance(layer, (FixedBatchNorm1d, FixedBatchNorm2d)) and layer.layer is None:
            source = _source(tensor_inputs(node)[0], modules, past_quantizers=False)
            quantizer = modules.get(str(source.target))
            layer.__dict__["reads_codes"] = isinstance(quantizer, LearnedActivationQuantizer)
            layer.__dict__["input_quantizer"] = quantizer if layer.reads_codes else quantizers[0]
