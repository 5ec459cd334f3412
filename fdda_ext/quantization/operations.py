"""Operation names and properties of the nodes of a traced network."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from .layers import QuantizedAveragePool
from .quantizer import ActivationQuantizer

__all__ = [
    "GRID_PRESERVING",
    "describe",
    "is_global_pooling",
    "keeps_order",
    "mean_dimensions",
    "never_negative",
    "operation",
    "place",
    "shape",
    "tensor_inputs",
]

#: Operations that only select, repeat or reorder values, or pad with zeros. Their result is on the
#: grid of their input.
GRID_PRESERVING = frozenset({"reshape", "max_pool", "select", "zero_pad", "nearest", "quantizer"})

_NEVER_NEGATIVE = frozenset({"relu", "relu6", "sigmoid", "softmax"})
#: Operations whose result is never negative if no input is negative.
_KEEPS_SIGN = GRID_PRESERVING | {"avg_pool", "add", "mul", "cat"}

_MODULES: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.Linear: "linear",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "sigmoid",
    nn.Softmax: "softmax",
    nn.MaxPool2d: "max_pool",
    nn.AdaptiveMaxPool2d: "max_pool",
    nn.AvgPool2d: "avg_pool",
    nn.AdaptiveAvgPool2d: "avg_pool",
    QuantizedAveragePool: "avg_pool",
    nn.Flatten: "reshape",
    nn.Unflatten: "reshape",
    nn.PixelShuffle: "reshape",
    nn.PixelUnshuffle: "reshape",
    nn.ChannelShuffle: "reshape",
    nn.ZeroPad2d: "zero_pad",
    nn.UpsamplingNearest2d: "nearest",
    nn.Identity: "identity",
    nn.Dropout: "identity",
    nn.Dropout1d: "identity",
    nn.Dropout2d: "identity",
    nn.Dropout3d: "identity",
    nn.AlphaDropout: "identity",
    nn.FeatureAlphaDropout: "identity",
}
# By name, because torchvision and timm may not be installed.
_MODULE_NAMES = {"StochasticDepth": "identity", "DropPath": "identity"}

_FUNCTIONS: dict[Callable[..., Any], str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.hardsigmoid: "sigmoid",
    F.softmax: "softmax",
    torch.softmax: "softmax",
    F.max_pool2d: "max_pool",
    torch.max_pool2d: "max_pool",
    F.adaptive_max_pool2d: "max_pool",
    F.avg_pool2d: "avg_pool",
    F.adaptive_avg_pool2d: "avg_pool",
    torch.mean: "mean",
    torch.flatten: "reshape",
    torch.reshape: "reshape",
    torch.permute: "reshape",
    torch.transpose: "reshape",
    torch.squeeze: "reshape",
    torch.unsqueeze: "reshape",
    torch.unflatten: "reshape",
    F.pixel_shuffle: "reshape",
    F.pixel_unshuffle: "reshape",
    F.channel_shuffle: "reshape",
    torch.channel_shuffle: "reshape",
    torch.chunk: "select",
    torch.split: "select",
    torch.narrow: "select",
    torch.unbind: "select",
    torch.tensor_split: "select",
    operator.getitem: "select",
    F.pad: "pad",
    F.interpolate: "interpolate",
    operator.add: "add",
    torch.add: "add",
    operator.mul: "mul",
    torch.mul: "mul",
    torch.cat: "cat",
    torch.concat: "cat",
    torch.clone: "identity",
    F.dropout: "identity",
    F.dropout1d: "identity",
    F.alpha_dropout: "identity",
    F.feature_alpha_dropout: "identity",
    F.dropout2d: "identity",
    F.dropout3d: "identity",
    F.conv1d: "functional_weight",
    F.conv2d: "functional_weight",
    F.conv3d: "functional_weight",
    F.conv_transpose2d: "functional_weight",
    F.linear: "functional_weight",
    torch.matmul: "functional_weight",
    torch.bmm: "functional_weight",
    torch.einsum: "functional_weight",
    operator.matmul: "functional_weight",
    F.scaled_dot_product_attention: "functional_weight",
}
_FUNCTION_NAMES = {
    "stochastic_depth": "identity",
    "drop_path": "identity",
    "_assert": "assert",
}

_METHODS = {
    "relu": "relu",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "mean": "mean",
    "view": "reshape",
    "reshape": "reshape",
    "flatten": "reshape",
    "permute": "reshape",
    "transpose": "reshape",
    "squeeze": "reshape",
    "unsqueeze": "reshape",
    "unflatten": "reshape",
    "contiguous": "reshape",
    "chunk": "select",
    "split": "select",
    "narrow": "select",
    "unbind": "select",
    "tensor_split": "select",
    "detach": "identity",
    "clone": "identity",
    "add": "add",
    "mul": "mul",
    "matmul": "functional_weight",
    "bmm": "functional_weight",
}


def operation(node: Node, modules: dict[str, nn.Module]) -> str:
    """Return the name of the operation of ``node``, "other" if the tables above do not have it.

    Args:
        node: Node of a traced network.
        modules: Modules of the network by qualified name.
    """
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    if node.op == "call_module":
        return _module_operation(modules[str(node.target)])
    if node.op == "call_method":
        name = _METHODS.get(str(node.target), "other")
    else:
        assert callable(node.target)
        name = _FUNCTIONS.get(node.target) or _FUNCTION_NAMES.get(
            getattr(node.target, "__name__", ""), "other"
        )
    if name == "mean":
        return "avg_pool" if _is_spatial_mean(node) else "other"
    if name == "pad":
        mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
        value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
        return "zero_pad" if mode == "constant" and not value else "other"
    if name == "interpolate":
        mode = node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
        return "nearest" if mode in ("nearest", "nearest-exact") else "other"
    if name in ("add", "mul") and (node.kwargs or len(node.args) != 2):
        return "other"  # torch.add(x, y, alpha=...)
    if name == "select" and not tensor_inputs(node):
        return "other"  # an element of a shape
    return name


def _module_operation(module: nn.Module) -> str:
    if isinstance(module, ActivationQuantizer):
        return "quantizer"
    if isinstance(module, nn.Upsample):
        return "nearest" if module.mode.startswith("nearest") else "other"
    for kind in type(module).__mro__:
        if kind in _MODULES:
            # timm's MaxPool2dSame has padding that its attributes do not tell.
            own = isinstance(module, nn.MaxPool2d) and type(module).forward is not kind.forward
            return "other" if own else _MODULES[kind]
    return _MODULE_NAMES.get(type(module).__name__, "other")


def _is_spatial_mean(node: Node) -> bool:
    return mean_dimensions(node) == {2, 3} and len(shape(tensor_inputs(node)[0])) == 4


def mean_dimensions(node: Node) -> set[int] | None:
    """Return the dimensions that ``node`` averages over, all at least 0; None for no mean."""
    if node.target not in ("mean", torch.mean) or not tensor_inputs(node):
        return None
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    rank = len(shape(tensor_inputs(node)[0]))
    if isinstance(dims, int):
        return {dims % rank}
    if isinstance(dims, (list, tuple)):
        return {d % rank for d in dims if isinstance(d, int)}
    return set(range(rank))


def describe(node: Node, modules: dict[str, nn.Module]) -> str:
    """Describe where ``node`` comes from in the network's source code.

    Examples are ``layer1.0.act (SiLU)`` for a module, ``F.log_softmax in head (Head), net.py:31``
    for a function, ``Tensor.clamp in Net, net.py:12`` for a method of tensors and ``the input x``.
    For a quantizer, describe the node whose result it quantizes.

    Args:
        node: Node of a traced network or of a student.
        modules: Modules of the network by qualified name.
    """
    if node.op == "call_module" and isinstance(modules[str(node.target)], ActivationQuantizer):
        return describe(node.all_input_nodes[0], modules)
    known = node.meta.get("place")  # pickling a graph drops it
    return str(known) if known else place(node, modules)


def place(node: Node, modules: dict[str, nn.Module], within: str = "", line: str = "") -> str:
    """Return the description of ``node`` that tracing stores in ``node.meta["place"]``.

    Args:
        node: Node of any graph.
        modules: Modules of the graph's owner by qualified name.
        within: Name and type of the module whose forward makes the call, such as ``head (Head)``.
        line: Source line of the call, such as ``net.py:31``.
    """
    if node.op == "placeholder":
        return f"the input {node.target}"
    if node.op == "output":
        return "the output"
    if node.op == "get_attr":
        return str(node.target)
    if node.op == "call_module":
        return f"{node.target} ({type(modules[str(node.target)]).__name__})"
    name = f"Tensor.{node.target}" if node.op == "call_method" else _function_name(node.target)
    return name + (f" in {within}" if within else "") + (f", {line}" if line else "")


#: Symbols of the functions of `operator` in source code.
_SYMBOLS: dict[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.pow: "**",
    operator.matmul: "@",
    operator.getitem: "[]",
    operator.neg: "-",
}


def _function_name(function: Any) -> str:
    """``function`` as source code writes it: F.relu, torch.cat, +."""
    if function in _SYMBOLS:
        return _SYMBOLS[function]
    name = str(getattr(function, "__name__", None) or type(function).__name__)
    for prefix, module in (("F", F), ("torch", torch), ("operator", operator)):
        if getattr(module, name, None) is function:
            return f"{prefix}.{name}"
    return name


def tensor_inputs(node: Node) -> list[Node]:
    """Return the nodes whose tensors (or tuples of them) ``node`` reads, in order, each once."""
    return [n for n in node.all_input_nodes if "shape" in n.meta]


def shape(node: Node) -> torch.Size:
    """Shape of the node's tensor on the example input."""
    size: torch.Size = node.meta["shape"]
    return size


def is_global_pooling(node: Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether ``node`` averages over all positions."""
    return operation(node, modules) == "avg_pool" and shape(node).numel() == (
        shape(node)[0] * shape(node)[1]
    )


def keeps_order(node: Node) -> bool:
    """Return whether a reshaping node keeps the order of the values."""
    name = str(getattr(node.target, "__name__", node.target))
    return not any(word in name.lower() for word in ("permute", "transpose", "shuffle"))


def never_negative(graph: Graph, modules: dict[str, nn.Module]) -> set[Node]:
    """Return the nodes whose values cannot be negative for any input."""
    found: set[Node] = set()
    for node in graph.nodes:
        kind = operation(node, modules)
        inputs = tensor_inputs(node)
        constants = [a for a in node.args if isinstance(a, (int, float))]
        if (
            kind in _NEVER_NEGATIVE
            or _is_hardtanh_from_zero(node, modules)
            or (
                kind in _KEEPS_SIGN
                and inputs
                and all(n in found for n in inputs)
                and not (kind in ("add", "mul") and any(c < 0 for c in constants))
            )
        ):
            found.add(node)
    return found


def _is_hardtanh_from_zero(node: Node, modules: dict[str, nn.Module]) -> bool:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, nn.Hardtanh) and module.min_val >= 0
