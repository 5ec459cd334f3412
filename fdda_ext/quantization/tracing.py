"""Tracing a network to a plain torch.fx graph, and saying clearly what cannot be traced."""

from __future__ import annotations

import copy
import operator
import os
import sys
import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, Tracer
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from .layers import FixedBatchNorm2d
from .operations import operation, place

__all__ = ["trace"]

#: Layers that are understood, and the forwards they may have.
_FORWARDS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Conv2d: (nn.Conv2d.forward,),
    nn.Linear: (nn.Linear.forward,),
    _BatchNorm: (_BatchNorm.forward, nn.SyncBatchNorm.forward, FixedBatchNorm2d.forward),
}
#: In-place functions by what they do; methods end in an underscore.
_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
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
    if not any(isinstance(m, _BatchNorm) for m in root.modules()):
        raise UsageError(
            "prepare: expected model to have batch normalisation, "
            f"got {type(root).__name__} without; the methods align its statistics"
        )
    for name, module in root.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UsageError(
                "prepare: expected model without forward hooks, which tracing would drop, "
                f"got one on {name or type(root).__name__}; remove it first"
            )
    tracer = _Tracer()
    try:
        graph = tracer.trace(root)
    except Exception as error:  # torch.fx raises whatever the traced code raises
        place = tracer.module_name or type(model).__name__
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error) else "no message"
        raise UsageError(
            f"prepare: expected model to be traceable by torch.fx, got {place} "
            f"that is not ({reason})"
        ) from error
    network = GraphModule(root, graph, class_name=type(model).__name__)
    _split_norm_act(network)
    _make_out_of_place(network)
    _remove_identities(network)
    _check_graph(network)
    _record_shapes(network, example)
    _pad_same(network, example)
    network.graph.lint()
    network.recompile()
    _check_same(network, root, example)
    return network


class _Tracer(Tracer):
    """Stops at layers with weights, and names every result after the module that made it."""

    def __init__(self) -> None:
        wrapped: tuple[Any, ...] = ()
        self.opaque: tuple[type[nn.Module], ...] = ()
        timm = sys.modules.get("timm.layers")
        if timm is not None:  # what timm itself declares as not to be looked into
            wrapped = tuple(timm.get_notrace_functions())
            self.opaque = tuple(timm.get_notrace_modules())
        super().__init__(autowrap_functions=wrapped)
        self.module_name = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.Conv2d, nn.Linear, _BatchNorm, *self.opaque)):
            return True
        if type(m).__name__ in ("StochasticDepth", "DropPath"):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outer = self.module_name
        self.module_name = self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.module_name = outer  # not in a finally: after an error it tells where that was
        return result

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> Node:
        if kind in ("call_function", "call_method") and name is None:
            function = target if kind == "call_method" else getattr(target, "__name__", "call")
            name = f"{self.module_name}.{function}".strip("._").replace(".", "_")
        # Without the annotation: where annotations are strings, the graph could not be pickled.
        node = super().create_node(kind, target, args, kwargs, name, None)
        within = type(self.root).__name__
        if self.module_name:
            inner = self.root.get_submodule(self.module_name)
            within = f"{self.module_name} ({type(inner).__name__})"
        modules = {str(target): self.root.get_submodule(target)} if kind == "call_module" else {}
        node.meta["place"] = place(node, modules, within, _calling_line())
        return node


def _calling_line() -> str:
    """File and line of the innermost running function that is neither torch's nor of this file."""
    for frame, line in traceback.walk_stack(sys._getframe()):
        file = frame.f_code.co_filename
        inside = frame.f_globals.get("__name__", "").split(".")[0] == "torch"
        if not inside and file != __file__ and not file.startswith("<"):
            return f"{os.path.basename(file)}:{line}"
    return ""


def _check_graph(network: GraphModule) -> None:
    modules = dict(network.named_modules())
    inputs = [n for n in network.graph.nodes if n.op == "placeholder" and n.users]
    if len(inputs) != 1:
        raise UsageError(f"prepare: expected model to take one tensor, got {len(inputs)} inputs")
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
    if not any(operation(n, modules) in ("conv", "linear") for n in network.graph.nodes):
        raise UsageError("prepare: expected model to have a Conv2d or Linear layer, got none")


def _check_layer(name: str, module: nn.Module) -> None:
    """Refuse a leaf module with weights that no quantizer would see."""
    for inner_name, inner in module.named_modules():
        full_name = f"{name}.{inner_name}" if inner_name else name
        kind = type(inner).__name__
        supported = isinstance(inner, (*_FORWARDS, nn.PReLU)) or kind.endswith("Norm")
        if any(True for _ in inner.parameters(recurse=False)) and not supported:
            raise UsageError(
                "prepare: expected layers with weights to be Conv2d or Linear, "
                f"got {kind} at {full_name}"
            )
        for base, forwards in _FORWARDS.items():
            if isinstance(inner, base) and (
                inner is not module
                or not (type(inner).forward in forwards or _is_plain_in_timm(inner))
            ):
                raise UsageError(
                    f"prepare: expected {base.__name__.strip('_')} layers with the forward of "
                    f"torch.nn, got {type(module).__name__} at {full_name}"
                )
        if isinstance(inner, (nn.Conv2d, nn.Linear)) and not isinstance(inner.weight, nn.Parameter):
            raise UsageError(
                "prepare: expected the weight of every layer to be a parameter, "
                f"got a computed one at {full_name}; remove the parametrization"
            )
        if isinstance(inner, _BatchNorm) and inner.running_mean is None:
            raise UsageError(
                "prepare: expected batch normalisation to have running statistics, "
                f"got none at {full_name}"
            )


def _is_plain_in_timm(module: nn.Module) -> bool:
    """Whether ``module`` is timm's and, for all its own forward, no more than its base in torch.nn.

    Its Linear only adds casts for scripting, its Conv2dSame will become padding and a Conv2d.
    """
    return type(module).__module__.startswith("timm.") and type(module).__name__ in (
        "Linear",
        "Conv2dSame",
    )


def _function_name(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


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
        if not isinstance(module, nn.BatchNorm2d) or type(module).__name__ != "BatchNormAct2d":
            continue
        name = str(node.target)
        network.set_submodule(name, FixedBatchNorm2d.from_float(module))
        last = node
        for part in ("drop", "act"):
            users = list(last.users)
            with network.graph.inserting_after(last):
                after = network.graph.call_module(f"{name}.{part}", (last,))
            after.meta["place"] = place(after, modules)
            for user in users:
                user.replace_input_with(last, after)
            last = after


def _make_out_of_place(network: GraphModule) -> None:
    """Let no tensor change after it was quantized or kept for a backward."""
    modules = dict(network.named_modules())
    position = {node: index for index, node in enumerate(network.graph.nodes)}
    for node in network.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if getattr(module, "inplace", False) is True:
            pass  # the module is changed below, since several nodes may call it
        elif node.kwargs.get("inplace"):
            node.update_kwarg("inplace", False)
        elif node.op == "call_method" and str(node.target).endswith("_"):
            node.target = str(node.target)[:-1]
        elif node.op == "call_function" and node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
        else:
            continue
        changed = node.all_input_nodes[0]
        for user in list(changed.users):
            if position[user] > position[node]:  # it saw the changed tensor
                user.replace_input_with(changed, node)
    for module in modules.values():
        if getattr(module, "inplace", False) is True:
            module.inplace = False


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


def _pad_same(network: GraphModule, example: Tensor) -> None:
    """Turn timm's Conv2dSame, whose padding depends on the image's size, into padding and Conv2d.

    The padding is from then on the one for the size of ``example``.
    """
    modules = dict(network.named_modules())
    found = [
        (node, modules[str(node.target)])
        for node in network.graph.nodes
        if node.op == "call_module" and type(modules[str(node.target)]).__name__ == "Conv2dSame"
    ]
    for node, layer in found:
        assert isinstance(layer, nn.Conv2d)
        (before,) = node.all_input_nodes
        padding: list[int] = []
        for axis in (1, 0):  # F.pad begins with the last axis
            size = int(before.meta["shape"][2 + axis])
            stride, dilation = layer.stride[axis], layer.dilation[axis]
            reach = (-(-size // stride) - 1) * stride + (layer.kernel_size[axis] - 1) * dilation + 1
            total = max(reach - size, 0)
            padding += [total // 2, total - total // 2]
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            0,
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias=layer.bias is not None,
            device="meta",
        )
        plain.weight, plain.bias = layer.weight, layer.bias
        network.set_submodule(str(node.target), plain)
        with network.graph.inserting_before(node):
            pad = network.graph.call_function(F.pad, (before, padding))
        pad.meta["place"] = f"the padding of {node.meta['place']}"
        node.replace_input_with(before, pad)
    if found:
        network.recompile()
        _record_shapes(network, example)


def _check_same(network: GraphModule, root: nn.Module, example: Tensor) -> None:
    """Refuse a graph that computes something else, such as for a tensor written through a view."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(example.shape, generator=random)
    images = images.to(next(network.parameters()))
    with torch.no_grad():
        expected, result = root(images), network(images)
    if not (result - expected).norm() <= 1e-3 * expected.norm():
        raise UsageError(
            "prepare: expected model to compute the same when traced by torch.fx, "
            f"got other outputs from {type(root).__name__}; it may change tensors in place"
        )


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
