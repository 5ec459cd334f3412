"""Tracing a network to a plain torch.fx graph, and saying clearly what cannot be traced."""

from __future__ import annotations

import copy
import operator
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, Tracer
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from .operations import operation

__all__ = ["trace"]

_SUPPORTED_WITH_PARAMETERS = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.PReLU,
)
_INPLACE_FUNCTIONS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
}
_INPLACE_METHODS = {
    "relu_": "relu",
    "add_": "add",
    "mul_": "mul",
    "sigmoid_": "sigmoid",
}


def trace(model: nn.Module, example: Tensor) -> GraphModule:
    """Copy ``model`` into a graph of elementary layers, in evaluation mode.

    Dropout and identities are gone, in-place operations are out of place, timm's joint
    normalisation and activation modules are two nodes, ``node.meta["shape"]`` tells the shape on
    ``example``. Layers keep their qualified names.

    Args:
        model: Any network that torch.fx can trace, of one image tensor to one tensor.
        example: Images ``[N, 3, H, W]``.

    Raises:
        UsageError: If the network has a structure that cannot be quantized; names the module.
    """
    root = copy.deepcopy(model).eval()
    _check_modules(root)
    tracer = _Tracer()
    try:
        graph = tracer.trace(root)
    except Exception as error:  # torch.fx raises whatever the traced code raises
        place = tracer.last_module or type(model).__name__
        reason = (
            str(error).strip().splitlines()[0].rstrip(".")
            if str(error)
            else "no message"
        )
        raise UsageError(
            f"prepare: expected model to be traceable by torch.fx, got {place} "
            f"that is not ({reason})"
        ) from error
    network = GraphModule(root, graph, class_name=type(model).__name__)
    _split_norm_act(network)
    _remove_identities(network)
    _make_out_of_place(network)
    _record_shapes(network, example)
    _check_graph(network)
    network.graph.lint()
    network.recompile()
    return network


class _Tracer(Tracer):
    def __init__(self) -> None:
        wrapped: list[Any] = []
        self.opaque: tuple[type[nn.Module], ...] = ()
        timm = sys.modules.get("timm.layers")
        if timm is not None:  # what timm itself declares as not to be looked into
            wrapped = list(timm.get_notrace_functions())
            self.opaque = tuple(timm.get_notrace_modules())
        super().__init__(autowrap_functions=tuple(wrapped))
        self.last_module = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.Conv2d, nn.Linear, _BatchNorm, *self.opaque)):
            return True
        if type(m).__name__ in ("StochasticDepth", "DropPath"):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outer = self.last_module
        self.last_module = self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.last_module = (
            outer  # not in a finally: after an error it tells where that was
        )
        return result


def _check_modules(root: nn.Module) -> None:
    """Refuse what would end up in float without the user's knowledge."""
    if not any(isinstance(m, _BatchNorm) for m in root.modules()):
        raise UsageError(
            "prepare: expected model to have batch normalisation, "
            f"got {type(root).__name__} without; the methods align its statistics"
        )


def _check_graph(network: GraphModule) -> None:
    modules = dict(network.named_modules())
    inputs = [n for n in network.graph.nodes if n.op == "placeholder" and n.users]
    if len(inputs) != 1:
        raise UsageError(
            f"prepare: expected model to take one tensor, got {len(inputs)} inputs"
        )
    calls: dict[int, str] = {}
    for node in network.graph.nodes:
        if operation(node, modules) == "functional_weight":
            raise UsageError(
                "prepare: expected weights to be in Conv2d and Linear modules, "
                f"got a call of {_function_name(node)} at {_place(node)}"
            )
        if node.op != "call_module":
            continue
        name, module = str(node.target), modules[str(node.target)]
        _check_layer(name, module)
        if not isinstance(module, (nn.Conv2d, nn.Linear, _BatchNorm)):
            continue
        for parameter in (module.weight, module):
            if parameter is None:
                continue
            if id(parameter) in calls:
                raise UsageError(
                    "prepare: expected every layer to be used once with a weight of its own, "
                    f"got {name} sharing with {calls[id(parameter)]}"
                )
            calls[id(parameter)] = name
    if not any(
        operation(n, modules) in ("conv", "linear") for n in network.graph.nodes
    ):
        raise UsageError(
            "prepare: expected model to have a Conv2d or Linear layer, got none"
        )


def _check_layer(name: str, module: nn.Module) -> None:
    """Refuse a leaf module with weights that no quantizer would see."""
    for inner_name, inner in module.named_modules():
        full_name = f"{name}.{inner_name}" if inner_name else name
        has_parameters = any(True for _ in inner.parameters(recurse=False))
        normalises = type(inner).__name__.endswith("Norm")
        if has_parameters and not (
            isinstance(inner, _SUPPORTED_WITH_PARAMETERS) or normalises
        ):
            raise UsageError(
                "prepare: expected layers with weights to be Conv2d or Linear, "
                f"got {type(inner).__name__} at {full_name}"
            )
        for kind in (nn.Conv2d, nn.Linear):
            if isinstance(inner, kind) and (
                inner is not module or type(inner).forward is not kind.forward
            ):
                raise UsageError(
                    f"prepare: expected {kind.__name__} layers with the forward of torch.nn, "
                    f"got {type(module).__name__} at {full_name}"
                )


def _function_name(node: Node) -> str:
    return (
        str(node.target)
        if node.op == "call_method"
        else getattr(node.target, "__name__", "")
    )


def _place(node: Node) -> str:
    """Qualified name of the module whose forward made ``node``."""
    stack = node.meta.get("nn_module_stack") or {}
    last = list(stack.values())[-1][0] if stack else ""
    return str(last) or "the top level"


def _split_norm_act(network: GraphModule) -> None:
    """Turn timm's BatchNormAct2d (a BN with `drop` and `act` inside) into three nodes."""
    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if (
            not isinstance(module, nn.BatchNorm2d)
            or type(module).__name__ != "BatchNormAct2d"
        ):
            continue
        last = node
        for part in ("drop", "act"):
            with network.graph.inserting_after(last):
                after = network.graph.call_module(f"{node.target}.{part}", (last,))
            last.replace_all_uses_with(
                after, delete_user_cb=lambda user, new=after: user is not new
            )
            last = after


def _remove_identities(network: GraphModule) -> None:
    """Erase dropout, identities and assertions, then what nobody uses."""
    modules = dict(network.named_modules())
    for node in reversed(network.graph.nodes):
        kind = operation(node, modules)
        if kind == "identity":
            node.replace_all_uses_with(node.all_input_nodes[0])
        if kind in ("identity", "assert"):
            network.graph.erase_node(node)
    network.graph.eliminate_dead_code()
    network.recompile()
    network.delete_all_unused_submodules()


def _make_out_of_place(network: GraphModule) -> None:
    """So that no tensor changes after it has been quantized or kept for a backward."""
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    for node in network.graph.nodes:
        if node.kwargs.get("inplace"):
            node.update_kwarg("inplace", False)
        if node.op == "call_method" and node.target in _INPLACE_METHODS:
            node.target = _INPLACE_METHODS[node.target]
        if node.op == "call_function":
            node.target = _INPLACE_FUNCTIONS.get(node.target, node.target)


class _ShapeRecorder(Interpreter):
    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(first, Tensor):
            n.meta["shape"] = first.shape
        return result


def _record_shapes(network: GraphModule, example: Tensor) -> None:
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            result = _ShapeRecorder(network).run(example.detach().to(device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"prepare: expected model to accept example of shape {tuple(example.shape)}, "
            f"got {reason}"
        ) from error
    if not isinstance(result, Tensor):
        raise UsageError(
            f"prepare: expected model to return one tensor, got {type(result).__name__}"
        )
