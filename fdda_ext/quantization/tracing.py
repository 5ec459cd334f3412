"""Tracing of a network to a plain torch.fx graph, with clear errors if that fails."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import os
import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from ..errors import UsageError
from .layers import FixedBatchNorm2d
from .operations import (
    describe,
    keeps_order,
    mean_dimensions,
    operation,
    place,
    shape,
    tensor_inputs,
)
from .tracer import SizedTracer, fake_images, is_authors, shapes_of, shapes_only

__all__ = ["any_memory_format", "trace"]

#: Supported layers, and their allowed forward methods.
_FORWARDS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Conv2d: (nn.Conv2d.forward,),
    nn.Linear: (nn.Linear.forward,),
    _BatchNorm: (_BatchNorm.forward, nn.SyncBatchNorm.forward, FixedBatchNorm2d.forward),
}
#: In-place functions and their out-of-place versions. In-place methods end in an underscore.
_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
}


def trace(model: nn.Module, example: Tensor) -> GraphModule:
    """Copy ``model`` into a graph of elementary layers, in evaluation mode.

    Dropout and identities are removed, in-place operations become out-of-place, and timm's joint
    normalisation and activation modules become two nodes. All sizes except the batch size are fixed
    to those of ``example``. ``node.meta["shape"]`` is the shape of the node's tensor, or of the
    first of several, for two images. ``node.meta["place"]`` is the text that `describe` returns.

    Layers keep their qualified names. A convolution, linear layer or batch normalisation that is
    called several times becomes several with the same initial weights: ``conv`` for the first call,
    ``conv_2`` for the second. Each call has its own input range, and weights trained for one range
    would be wrong for another. Layers that share a weight get one each. Weights computed by weight
    or spectral normalisation or by pruning become plain parameters.

    Args:
        model: Network that torch.fx can trace, from one image tensor to one tensor.
        example: Images ``[N, C, H, W]``.

    Raises:
        UsageError: If the network has a structure that cannot be quantized; names the module.
    """
    root = _plain_copy(model)
    like = next((p for p in root.parameters() if p.is_floating_point()), None)
    if like is None:
        raise UsageError("prepare: expected model to have a Conv2d or Linear layer, got none")
    example = torch.empty((2, *example.shape[1:]), dtype=like.dtype, device=like.device)
    graph = _graph(root, example)
    network = GraphModule(root, graph, class_name=type(model).__name__)
    _split_norm_act(network)
    _make_out_of_place(network)
    _remove_identities(network)
    _check_graph(network)
    _separate_layers(network)
    try:
        _record_shapes(network, example)
    except (AttributeError, TypeError) as error:  # a call that torch.fx records but cannot repeat
        raise UsageError(
            "prepare: expected model to be traceable by torch.fx, got a graph that does not run "
            f"({_reason(error)}); its forward may compute only with tensors and their sizes"
        ) from error
    _pad_same(network, example)
    _join_means(network)
    _join_reshapes(network)
    _drop_idle_ceil_mode(network)
    network.graph.lint()
    network.recompile()
    _check_same(network, root, example)
    return network


def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode in which every weight is a parameter.

    Raises:
        UsageError: If a module has a forward hook that does not compute a weight.
    """
    # deepcopy refuses weights that a hook computes, because they are not leaves of autograd.
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    root = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed}).eval()
    for name, module in root.named_modules():
        if parametrize.is_parametrized(module):
            _compute_weights(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
        if module._forward_hooks or module._forward_pre_hooks:
            title = f"{name} ({type(module).__name__})" if name else type(module).__name__
            raise UsageError(
                "prepare: expected model without forward hooks, which tracing would drop, "
                f"got one on {title}; remove it first"
            )
    return root


def _compute_weights(module: nn.Module) -> None:
    """Replace the parametrizations of ``module`` by their current values.

    Torch's own function would modify the class, which the original module shares.
    """
    assert isinstance(module.parametrizations, nn.ModuleDict)
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _graph(root: nn.Module, example: Tensor) -> Graph:
    """Graph of ``root`` for images like ``example``.

    Raises:
        UsageError: If tracing fails; names the module, the source line and the reason.
    """
    tracer = SizedTracer(example)
    try:
        graph: Graph = tracer.trace(root)
        graph._tracer_cls = None  # unpickling creates the tracer without arguments
        return graph
    except UsageError:
        raise
    except Exception as error:  # torch.fx raises whatever the traced code raises
        reason = _reason(error)
        lines = [
            f", {os.path.basename(frame.f_code.co_filename)}:{line}"
            for frame, line in traceback.walk_tb(error.__traceback__)
            if is_authors(str(frame.f_globals.get("__name__")), frame.f_code.co_filename)
            and frame.f_code.co_filename != __file__
        ]
        place = tracer.module_title() + (lines[-1] if lines else "")
        _check_runs(root, example)
        raise UsageError(
            f"prepare: expected model to be traceable by torch.fx, got {place}, "
            f"which is not ({reason}); its forward may compute only with tensors and their sizes"
        ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@torch.no_grad()
def _check_runs(root: nn.Module, example: Tensor) -> None:
    """Refuse a network that fails on ``example`` even without tracing."""
    images = torch.zeros_like(example)
    try:
        with _ReshapingViews():
            root(images)
        return
    except Exception as error:
        reason, cause = _reason(error), error
    try:
        root(images[:1])
    except Exception:
        raise UsageError(
            f"prepare: expected model to accept images of shape {tuple(example.shape[1:])}, "
            f"got {reason}"
        ) from cause
    raise UsageError(
        f"prepare: expected model to take several images at a time, got {reason}; "
        "let its reshapes keep the batch dimension, as x.flatten(1) does"
    ) from cause


def _check_graph(network: GraphModule) -> None:
    modules = dict(network.named_modules())
    inputs = [n for n in network.graph.nodes if n.op == "placeholder" and n.users]
    if len(inputs) != 1:
        raise UsageError(f"prepare: expected model to take one tensor, got {len(inputs)} inputs")
    for node in network.graph.nodes:
        if operation(node, modules) == "functional_weight":
            raise UsageError(
                "prepare: expected weights to be in Conv2d and Linear modules, "
                f"got {describe(node, modules)}; make it a module, or leave it in float outside "
                "of the network"
            )
        if node.op == "call_module":
            _check_layer(str(node.target), modules[str(node.target)])
    if not any(operation(n, modules) in ("conv", "linear") for n in network.graph.nodes):
        raise UsageError("prepare: expected model to have a Conv2d or Linear layer, got none")


def _check_layer(name: str, module: nn.Module) -> None:
    """Refuse a leaf module with weights that would not be quantized."""
    for inner_name, inner in module.named_modules():
        kind = type(inner).__name__
        got = f"got {name}.{inner_name} ({kind})" if inner_name else f"got {name} ({kind})"
        supported = isinstance(inner, (*_FORWARDS, nn.PReLU)) or kind.endswith("Norm")
        if any(True for _ in inner.parameters(recurse=False)) and not supported:
            raise UsageError(
                f"prepare: expected layers with weights to be Conv2d or Linear, {got}; "
                f"{_instead_of(inner)}"
            )
        for base, forwards in _FORWARDS.items():
            if isinstance(inner, base) and (
                inner is not module
                or not (type(inner).forward in forwards or _is_plain_in_timm(inner))
            ):
                raise UsageError(
                    f"prepare: expected {base.__name__.strip('_')} layers with the forward of "
                    f"torch.nn, {got}; move what its forward adds to a module around the layer"
                )
        if isinstance(inner, (nn.Conv2d, nn.Linear)) and not isinstance(inner.weight, nn.Parameter):
            raise UsageError(
                "prepare: expected the weight of every layer to be a parameter, "
                f"{got} whose weight is computed; store the result as its weight"
            )
        if isinstance(inner, _BatchNorm) and inner.running_mean is None:
            raise UsageError(
                "prepare: expected batch normalisation to have running statistics, "
                f"{got} without; train it with track_running_stats=True"
            )


def _instead_of(layer: nn.Module) -> str:
    kind = type(layer).__name__
    if isinstance(layer, _ConvTransposeNd):
        return "use nn.Upsample(scale_factor=2) and a Conv2d instead of a transposed convolution"
    if isinstance(layer, nn.Conv1d):
        return "use a Conv2d on maps of height 1"
    return f"use Conv2d and Linear layers instead of {kind}, or keep it outside the network"


def _is_plain_in_timm(module: nn.Module) -> bool:
    """Return whether timm's ``module`` computes the same as its base class in torch.nn.

    timm's Linear only adds casts for scripting. Its Conv2dSame will become padding and a Conv2d.
    """
    return type(module).__module__.startswith("timm.") and type(module).__name__ in (
        "Linear",
        "Conv2dSame",
    )


def _split_norm_act(network: GraphModule) -> None:
    """Split timm's BatchNormAct2d (a BN with `drop` and `act` inside) into three nodes."""
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
    """Ensure that no tensor changes after it was quantized or saved for the backward pass."""
    modules = dict(network.named_modules())
    position = {node: index for index, node in enumerate(network.graph.nodes)}
    for node in network.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if getattr(module, "inplace", False) is True:
            pass  # the module is changed below, because several nodes may call it
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
            if position[user] > position[node]:  # it reads the changed tensor
                user.replace_input_with(changed, node)
    for module in modules.values():
        if getattr(module, "inplace", False) is True:
            module.inplace = False


def _remove_identities(network: GraphModule) -> None:
    """Erase dropout, identities and assertions, then all unused nodes and modules."""
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


def _separate_layers(network: GraphModule) -> None:
    """Give every call its own layer, and every layer its own weights."""
    modules = dict(network.named_modules())
    called: set[str] = set()
    owned: set[int] = set()
    for node in network.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, (nn.Conv2d, nn.Linear, _BatchNorm)):
            continue
        if str(node.target) in called:
            layer = copy.deepcopy(layer)
            _call(network, node, layer)
        called.add(str(node.target))
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) in owned:
                own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(layer, name, own)
            owned.add(id(getattr(layer, name)))


def _call(network: GraphModule, node: Node, module: nn.Module) -> None:
    """Let ``node`` call ``module``, which is added under the old target's name with a number."""
    taken = dict(network.named_modules())
    names = (f"{node.target}_{number}" for number in itertools.count(2))
    node.target = next(name for name in names if name not in taken)
    network.add_submodule(node.target, module)


def _join_means(network: GraphModule) -> None:
    """Join successive means, or a mean of flattened maps, to one over height and width."""
    modules = dict(network.named_modules())
    for node in network.graph.nodes:
        dims = mean_dimensions(node)
        (first,) = tensor_inputs(node) if dims and len(dims) == 1 else (node,)
        before = tensor_inputs(first)
        if first is node or len(first.users) != 1 or len(before) != 1:
            continue
        maps, middle, result = shape(before[0]), shape(first), shape(node)
        firsts = mean_dimensions(first)
        if len(maps) != 4 or len(result) not in (2, 4):
            continue
        if operation(first, modules) == "reshape":
            joins = dims == {2} and middle == (*maps[:2], maps[2] * maps[3])
        elif firsts in ({2}, {3}):  # without keepdim, a mean over 2 turns dimension 3 into 2
            joins = dims == ({3} if firsts == {2} and len(middle) == 4 else {2})
        else:
            continue
        if joins:
            node.op, node.target = "call_method", "mean"
            node.args, node.kwargs = (before[0], (2, 3)), {"keepdim": len(result) == 4}
            network.graph.erase_node(first)


def _join_reshapes(network: GraphModule) -> None:
    """Join successive reshapes to one, and remove those that change nothing."""
    modules = dict(network.named_modules())

    def only_reshapes(node: Node) -> bool:
        target = modules.get(str(node.target)) if node.op == "call_module" else node
        moves = isinstance(target, (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle))
        return operation(node, modules) == "reshape" and keeps_order(node) and not moves

    for node in list(network.graph.nodes):
        if not only_reshapes(node):
            continue
        (before,) = tensor_inputs(node)
        size = shape(node)
        if shape(before) == size:
            node.replace_all_uses_with(before)
            network.graph.erase_node(node)
        elif only_reshapes(before) and size[0] == shape(tensor_inputs(before)[0])[0]:
            node.op, node.target = "call_method", "reshape"
            node.args, node.kwargs = (tensor_inputs(before)[0], (-1, *size[1:])), {}
            if not before.users:
                network.graph.erase_node(before)
    network.delete_all_unused_submodules()


def _drop_idle_ceil_mode(network: GraphModule) -> None:
    """Disable ceil_mode of average pooling where it makes no difference for this image size."""
    modules = dict(network.named_modules())
    for node in network.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.AvgPool2d):
            floor = copy.deepcopy(module)
            floor.ceil_mode = False
            pool: Any = floor
        elif node.target is F.avg_pool2d:
            names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
            given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
            given["ceil_mode"] = False
            pool = functools.partial(F.avg_pool2d, **given)
        else:
            continue
        (source,) = tensor_inputs(node)
        if pool(torch.empty(shape(source), device="meta")).shape != shape(node):
            continue
        if isinstance(module, nn.AvgPool2d):
            if module.ceil_mode:
                _call(network, node, pool)
        else:
            node.args, node.kwargs = (source,), given
    network.delete_all_unused_submodules()


def _pad_same(network: GraphModule, example: Tensor) -> None:
    """Replace timm's Conv2dSame with explicit padding and a Conv2d.

    The padding of Conv2dSame depends on the image size. Here it is the padding that images of the
    size of ``example`` need.
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


@torch.no_grad()
def _check_same(network: GraphModule, root: nn.Module, example: Tensor) -> None:
    """Refuse a graph with other results, such as after a write through a view."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(example.shape, generator=random).to(example)
    # Batches of two and of one image reveal a graph that depends on the batch size.
    with _ReshapingViews():
        expected = root(images)
    if not _close(network(images[:1]), expected[:1]):
        raise UsageError(
            "prepare: expected model to compute the same when traced by torch.fx, "
            f"got other outputs from {type(root).__name__}; it may change tensors in place, or "
            "depend on the batch size"
        )


class _ReshapingViews(TorchFunctionMode):
    """Mode in which views are reshapes, which every memory format allows."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.view and not any(isinstance(a, torch.dtype) for a in args):
            func = Tensor.reshape
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def any_memory_format(network: nn.Module, images: Tensor) -> nn.Module:
    """Return ``network``, or a copy that accepts channels_last images if ``network`` does not.

    Code such as ``x.view(x.size(0), -1)`` needs a contiguous tensor. The copy is the network's
    graph with reshapes instead of views.

    Args:
        network: Network from one image tensor to one tensor, in evaluation mode.
        images: Images ``[N, C, H, W]`` that the network accepts.

    Raises:
        UsageError: If the network cannot be traced, see `trace`.
    """
    try:
        network(images.contiguous(memory_format=torch.channels_last))
    except Exception as error:  # other errors are reported elsewhere
        if "view size is not compatible" in str(error):
            return trace(network, images)
    return network


def _close(result: Tensor, expected: Tensor) -> bool:
    if result.shape != expected.shape:
        return False
    return bool((result - expected).norm() <= 1e-3 * expected.norm())


class _ShapeRecorder(Interpreter):
    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return shapes_of(self.fetch_attr(str(target)), *args, **kwargs)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(first, Tensor):
            n.meta["shape"] = first.shape
        return result


def _record_shapes(network: GraphModule, example: Tensor) -> None:
    mode = shapes_only()
    with mode, torch.no_grad():
        result = _ShapeRecorder(network).run(fake_images(mode, len(example), example))
    if not isinstance(result, Tensor):
        raise UsageError(
            f"prepare: expected model to return one tensor, got {type(result).__name__}; "
            "wrap it in a module that returns only the logits"
        )
    if result.dim() == 0 or len(result) != len(example):
        raise UsageError(
            "prepare: expected model to return one row for each image, "
            f"got shape {tuple(result.shape)} for {len(example)} images"
        )
