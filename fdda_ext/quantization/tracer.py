"""A torch.fx tracer that knows the shape of every tensor of a network.

Every operation also runs on fake tensors (shapes without values), for two batch sizes. A result
that is equal for both, such as ``x.shape[2]`` or ``x.dim()``, is an ordinary number in the traced
code, so windows, reshapes and branches may depend on it. A result that differs depends on the batch
and stays a node of the graph, unless the operation can be written without it:
``x.view(x.size(0), -1)`` becomes a reshape to ``(-1, features)``, and ``x.squeeze()`` gets explicit
dimensions.
"""

from __future__ import annotations

import functools
import inspect
import logging
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import Node, Proxy, Tracer
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from ..errors import UsageError
from .operations import place

__all__ = ["SizedTracer", "fake_images", "is_authors", "shapes_of", "shapes_only"]

#: Two batch sizes, large enough that quotients and comparisons of them differ, too.
_BATCHES = (64, 96)
#: Functions that make a tensor from sizes.
_FACTORIES = ("zeros", "ones", "empty", "rand", "randn")
_RESHAPES: tuple[Any, ...] = ("reshape", "reshape_as", torch.reshape)
#: Views become reshapes, because a view may not suit the memory format of its input.
_VIEWS = {"view": "reshape", "view_as": "reshape_as"}
_SQUEEZES: tuple[Any, ...] = ("squeeze", torch.squeeze)
#: Methods that return their tensor if it already has the requested dtype and device.
_CONVERSIONS = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda")


# An error reports shapes that do not match. PyTorch would also print them to stderr.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


def shapes_only() -> FakeTensorMode:
    """Return the mode in which operations compute shapes instead of values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_images(mode: FakeTensorMode, count: int, like: Tensor) -> Tensor:
    """Return ``count`` fake images with the size, dtype and device of ``like [N, C, H, W]``."""
    with mode:
        return torch.empty((count, *like.shape[1:]), dtype=like.dtype, device=like.device)


def shapes_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run ``module`` on fake tensors. The result only needs the right shape."""
    if isinstance(module, _BatchNorm) and args and args[0].shape[1:2] == (module.num_features,):
        return torch.empty_like(args[0])  # a fake normalisation runs twenty operations
    return module(*args, **kwargs)


class SizedTracer(Tracer):
    """Tracer that stops at layers with weights and names every result after its module.

    Args:
        example: Images ``[N, C, H, W]`` with dtype and device of the network's input.
    """

    # A buffer that is indexed by the batch size must be part of the graph.
    proxy_buffer_attributes = True

    def __init__(self, example: Tensor) -> None:
        wrapped: tuple[Any, ...] = ()
        self.opaque: tuple[type[nn.Module], ...] = ()
        timm = sys.modules.get("timm.layers")
        if timm is not None:  # what timm itself excludes from tracing
            wrapped = tuple(timm.get_notrace_functions())
            # AvgPool2dSame is traced: it becomes padding with zeros and an average pooling.
            opaque = timm.get_notrace_modules()
            self.opaque = tuple(m for m in opaque if not issubclass(m, nn.AvgPool2d))
        super().__init__(autowrap_functions=wrapped)
        self.module_name = ""
        self.mode = shapes_only()
        self.images = [fake_images(self.mode, count, example) for count in _BATCHES]
        #: Value of every node for each of the two batch sizes.
        self.values: dict[Node, list[Any]] = {}
        self.computing = False

    @override
    def trace(self, root: Any, concrete_args: Any = None) -> Any:
        """Return the graph of the module ``root``.

        Raises:
            UsageError: If a branch or a size depends on the values of a tensor.
        """
        with _sized_functions(root):
            return super().trace(root, concrete_args)

    def location(self) -> str:
        """Return the module and source line being traced, such as ``head (Head), net.py:31``."""
        line = _calling_line()
        return self.module_title() + (f", {line}" if line else "")

    def module_title(self) -> str:
        """Return the qualified name and the class of the module being traced."""
        if not self.module_name:
            return type(self.root).__name__
        return f"{self.module_name} ({type(self.root.get_submodule(self.module_name)).__name__})"

    # ---- methods that torch.fx calls --------------------------------------------------------

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.Conv2d, nn.Linear, _BatchNorm, *self.opaque)):
            return True
        if type(m).__name__ in ("StochasticDepth", "DropPath"):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    @override
    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Create a proxy of the image; all other arguments keep their defaults."""
        parameters = list(inspect.signature(inspect.unwrap(root_fn)).parameters.values())[1:]
        needed = [p for p in parameters if p.default is p.empty and p.kind < p.KEYWORD_ONLY]
        names = [p.name for p in needed if p.kind is not p.VAR_POSITIONAL] or [
            p.name for p in parameters[:1]
        ]
        if len(names) != 1:
            listed = f": {', '.join(names)}" if names else ""
            raise UsageError(
                f"prepare: expected model to take one tensor, got {len(names)} inputs{listed}; "
                "wrap it in a module whose forward takes only the images"
            )
        return root_fn, [self.root, self.create_proxy("placeholder", names[0], (), {})]

    @override
    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.computing:
            return forward(*args, **kwargs)
        outer = self.module_name
        self.module_name = self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        # Not in a finally block: after an error, the name tells where it occurred.
        self.module_name = outer
        return result

    @override
    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.computing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    @override
    def proxy(self, node: Node) -> Proxy:
        return _SizedProxy(node, self)

    @override
    def to_bool(self, obj: Proxy) -> bool:
        values = self.values.get(obj.node, [None])
        what = "the values of a tensor" if isinstance(values[0], Tensor) else "the batch size"
        raise UsageError(
            f"prepare: expected model to be traceable by torch.fx, got {self.location()}, which "
            f"branches on {what}; choose with torch.where, or move the branch out of forward"
        )

    @override
    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):  # first, because isinstance takes it for a tensor
            return a.node
        if type(a).__module__ == "numpy" and hasattr(a, "item"):
            return a.item()
        return super().create_arg(a)

    @override
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
        # No type annotation: a graph with annotations as strings cannot be pickled.
        node = super().create_node(kind, target, args, kwargs, name, None)
        modules = {str(target): self.root.get_submodule(target)} if kind == "call_module" else {}
        node.meta["place"] = place(node, modules, self.module_title(), _calling_line())
        return node

    @override
    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Callable[[Node], Proxy] | None = None,
    ) -> Any:
        """Return a proxy, a constant, or a tuple or list of these."""
        values: list[Any]
        if kind == "placeholder":
            values = list(self.images)
        elif kind == "get_attr":
            with self._computing():
                found: Any = self.root
                for part in str(target).split("."):
                    found = getattr(found, part)
            values = [found] * len(_BATCHES)
        else:
            if kind == "call_method" and not any(isinstance(a, torch.dtype) for a in args):
                target = _VIEWS.get(target, target)
            for keyword in ("input", "tensors"):  # other code expects the tensor first
                if not args and kind != "call_method" and keyword in kwargs:
                    args = (kwargs[keyword],)
                    kwargs = {name: value for name, value in kwargs.items() if name != keyword}
            values = [self._compute(kind, target, args, kwargs, i) for i in range(len(_BATCHES))]
            if _is_constant(values):
                return values[0]
            if target is operator.add and isinstance(args[0], (int, float)) and args[0] == 0:
                return args[1]  # sum() begins with a 0
            if kind != "call_module":  # whose target is a name
                target, args, kwargs = self._without_batch(target, args, kwargs, values)
                if target in _SQUEEZES and len(args) == 1:  # no dimension is removed
                    return args[0]
                if target in _CONVERSIONS and self._converts_nothing(args[0], values):
                    return args[0]
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        self.values[proxy.node] = values
        if type(values[0]) in (tuple, list, torch.Size):
            parts = list(proxy)
            return parts if isinstance(values[0], list) else tuple(parts)
        if type(values[0]) is dict:
            return {key: operator.getitem(proxy, key) for key in values[0]}
        return proxy

    # ---- shapes -----------------------------------------------------------------------------

    def _compute(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int
    ) -> Any:
        """Result of an operation for one of the two batch sizes."""

        def known(argument: Any) -> Any:
            return self.values[argument.node][batch] if isinstance(argument, Proxy) else argument

        given: Any = map_aggregate(args, known)
        named: Any = map_aggregate(kwargs, known)
        try:
            with self._computing(), self.mode, torch.no_grad():
                if kind == "call_module":
                    return shapes_of(self.root.get_submodule(target), *given, **named)
                if kind == "call_method":
                    return getattr(given[0], target)(*given[1:], **named)
                return target(*given, **named)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise UsageError(
                f"prepare: expected model to be traceable by torch.fx, got {self.location()}, "
                "where a number or a size depends on the values of a tensor; compute with tensors "
                "of fixed shape"
            ) from None

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Use modules and their attributes without tracing them."""
        self.computing = True
        try:
            yield
        finally:
            self.computing = False

    def _without_batch(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], values: list[Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return target and arguments of a reshaping operation that suit every batch size."""
        unchanged = target, args, kwargs
        source = self.values.get(args[0].node) if args and isinstance(args[0], Proxy) else None
        if source is None or not all(isinstance(v, Tensor) for v in (*values, *source)):
            return unchanged
        before, after = ([tuple(v.shape) for v in pair] for pair in (source, values))
        takes_all = (
            target is operator.getitem
            and after != before
            and all(old.numel() == new.numel() for old, new in zip(source, values, strict=True))
        )  # such as x[:, :, 0, 0] of 1x1 maps
        if takes_all and all(
            index is None or index is ... or isinstance(index, (int, slice))
            for index in (args[1] if isinstance(args[1], tuple) else args[1:])
        ):
            target = torch.reshape
        if target in _RESHAPES and values[0].dtype == source[0].dtype:
            target = "reshape" if isinstance(target, str) else target
            if after[0][:1] != after[1][:1] and after[0][1:] == after[1][1:]:
                return target, (args[0], (-1, *after[0][1:])), {}
            return target, args, kwargs
        if target in _SQUEEZES:
            given = kwargs.get("dim", args[1] if len(args) > 1 else range(len(before[0])))
            dims = [given] if isinstance(given, int) else given
            ones = sorted({d % len(before[0]) for d in dims})
            ones = [d for d in ones if all(shape[d] == 1 for shape in before)]
            dim = ones[0] if len(ones) == 1 else tuple(ones)
            return target, (args[0], dim) if ones else args[:1], {}
        if target == "expand" and len(before[0]) == len(after[0]):
            sizes = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
            kept = [  # for each dimension, whether its size stays the same in both batches
                befores == afters
                for befores, afters in zip(
                    zip(*before, strict=True), zip(*after, strict=True), strict=True
                )
            ]
            sizes = [-1 if keep else size for keep, size in zip(kept, sizes, strict=True)]
            return target, (args[0], *sizes), {}
        return unchanged

    def _converts_nothing(self, tensor: Any, values: list[Any]) -> bool:
        before = self.values[tensor.node][0]
        return before.dtype == values[0].dtype and before.device == values[0].device


class _SizedProxy(Proxy):
    """Proxy of a tensor, of a size that depends on the batch, or of a structure of these."""

    tracer: SizedTracer

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__") or k in ("node", "tracer"):
            raise AttributeError(k)
        if callable(getattr(self.tracer.values[self.node][0], k)):
            return Attribute(self, k)
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        raise UsageError(
            f"prepare: expected model to be traceable by torch.fx, got {self.tracer.location()}, "
            "which writes into a part of a tensor; put the parts together with torch.cat"
        )

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self))])

    def __len__(self) -> int:
        lengths = [len(value) for value in self.tracer.values[self.node]]
        if lengths[0] != lengths[1]:
            raise UsageError(
                "prepare: expected model to treat the images of a batch alike, "
                f"got {self.tracer.location()}, which takes the batch apart; "
                "compute on the whole batch at once"
            )
        return lengths[0]


def _is_constant(values: list[Any]) -> bool:
    """Return whether ``values`` of the two batches are equal and contain no tensor."""
    first, second = values
    if isinstance(first, Tensor) or type(first) is not type(second):
        return False
    if isinstance(first, dict):
        first, second = list(first.items()), list(second.items())
    if isinstance(first, (tuple, list)):
        pairs = zip(first, second, strict=True)
        return len(first) == len(second) and all(_is_constant(list(pair)) for pair in pairs)
    return bool(first == second)


def is_authors(module: str, file: str) -> bool:
    """Return whether code belongs to the network's author, not to torch or a tracer."""
    return module.split(".")[0] != "torch" and file != __file__ and not file.startswith("<")


def _calling_line() -> str:
    """Return file and line of the innermost running function of the network's author."""
    for frame, line in traceback.walk_stack(sys._getframe()):
        file = frame.f_code.co_filename
        if is_authors(str(frame.f_globals.get("__name__", "")), file):
            return f"{os.path.basename(file)}:{line}"
    return ""


@contextmanager
def _sized_functions(root: nn.Module) -> Iterator[None]:
    """Let `len`, `isinstance` and torch's factory functions accept proxies in ``root``'s code."""
    authors = {type(module).__module__.partition(".")[0] for module in root.modules()} - {"torch"}
    names = [name for name in sys.modules if name.partition(".")[0] in authors]
    spaces = [vars(sys.modules[name]) for name in names]
    # Code of a notebook, or of a file that was run, has other globals than its module's.
    spaces += [getattr(inspect.unwrap(type(m).forward), "__globals__", {}) for m in root.modules()]
    own = {"len": _length, "isinstance": _is_instance}
    changed = {
        (id(space), name): space
        for space in spaces
        if not str(space.get("__name__", "torch")).startswith(("torch.", __name__))
        for name in own
        if name not in space
    }
    factories = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for (_, name), space in changed.items():
            space[name] = own[name]
        for name, factory in factories.items():
            setattr(torch, name, _taking_proxies(factory))
        yield
    finally:
        for (_, name), space in changed.items():
            del space[name]
        for name, factory in factories.items():
            setattr(torch, name, factory)


def _length(x: Any) -> Any:
    if isinstance(x, _SizedProxy):
        return x.tracer.create_proxy("call_function", len, (x,), {})
    return len(x)


def _is_instance(x: Any, classes: Any) -> bool:
    """``isinstance`` for which the proxy of a tensor is a tensor.

    A proxy whose ``__class__`` is Tensor would crash functions in C, which then read its memory.
    """
    if type(x) is _SizedProxy:
        value = x.tracer.values.get(x.node, [None])[0]
        if isinstance(value, Tensor) and isinstance(value, classes):
            return True
    return isinstance(x, classes)


def _taking_proxies(factory: Callable[..., Tensor]) -> Callable[..., Any]:
    """Let ``factory`` accept proxies among its sizes, by passing the sizes as one tuple."""

    @functools.wraps(factory)
    def make(*sizes: Any, **options: Any) -> Any:
        if any(isinstance(size, Proxy) for size in sizes):
            return factory(sizes, **options)
        return factory(*sizes, **options)

    return make
