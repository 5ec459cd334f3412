"""From the graph of a prepared student to an integer program.

Every quantizer of the student becomes an instruction that makes codes. What stands between codes
is folded into it: the last convolution, linear layer or average pooling before the quantizer gives
the integer sum; batch normalisation, bias and the scales of input and weights give one scale and
one shift per channel; an addition gives the residual; ReLU gives the clamp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from ..errors import UsageError
from ..quantization.layers import (
    FixedBatchNorm1d,
    FixedBatchNorm2d,
    QuantizedAveragePool,
    QuantizedConv2d,
    QuantizedLinear,
    fold,
)
from ..quantization.operations import GRID_PRESERVING, operation, shape, tensor_inputs
from ..quantization.quantizer import (
    ActivationQuantizer,
    LearnedActivationQuantizer,
    LearnedWeightQuantizer,
)
from .instructions import (
    AveragePool,
    CodeGrid,
    Concat,
    Conv,
    Instruction,
    Linear,
    MaxPool,
    Pad,
    Pair,
    Quantize,
    Rescale,
    Reshape,
    Value,
)
from .program import IntegerProgram

__all__ = ["lower"]

_LAYERS = ("conv", "linear", "avg_pool")


@torch.no_grad()
def lower(
    student: GraphModule,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> IntegerProgram:
    """The integer program that computes what ``student`` computes.

    Args:
        student: From `prepare` with grid "deploy", calibrated.
        mean: Of the images' normalisation, for a program that is to take uint8.
        std: Likewise.

    Returns:
        The program, on the CPU, for images of the size that ``student`` was prepared with.

    Raises:
        UsageError: If a tensor that enters a layer is not on a grid, or an operation has no integer
            counterpart; names all of them.
    """
    return _Lowering(student).lower(mean, std)


class _Lowering:
    def __init__(self, student: GraphModule) -> None:
        self.graph = student.graph
        self.modules: dict[str, nn.Module] = dict(student.named_modules())
        self.instructions: list[Instruction] = []
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[Node, Value] = {}
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}

    def lower(
        self, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
    ) -> IntegerProgram:
        self._check()
        (result,) = (node for node in self.graph.nodes if node.op == "output")
        self.value(tensor_inputs(result)[0])
        (image,) = (node for node in self.graph.nodes if node.op == "placeholder")
        return IntegerProgram(self.values[image], self.instructions, self.tensors, mean, std)

    def _check(self) -> None:
        """Refuse, at once, everything that stays in float."""
        for module in self.modules.values():
            if isinstance(module, ActivationQuantizer) and module.mode != "quantize":
                raise UsageError(
                    "lower: expected student to be calibrated, got a quantizer in mode "
                    f"{module.mode}; call calibrate first"
                )
        off_grid = []
        for node in self.graph.nodes:
            if self.kind(node) in _LAYERS:
                source = tensor_inputs(node)[0]
                while self.kind(source) in GRID_PRESERVING - {"quantizer"}:
                    source = tensor_inputs(source)[0]
                if not self._is_learned(source):
                    off_grid.append(f"{source.name} (into {node.name})")
        if off_grid:
            raise UsageError(
                "lower: expected every tensor that enters a layer on an integer grid, as grid "
                f"deploy has it, got {len(off_grid)} that are not: {', '.join(off_grid)}"
            )

    def _is_learned(self, node: Node) -> bool:
        return isinstance(self.modules.get(str(node.target)), LearnedActivationQuantizer)

    def kind(self, node: Node) -> str:
        return operation(node, self.modules)

    def value(self, node: Node) -> Value:
        """The value of ``node``, made by instructions that are appended if need be."""
        if node not in self.values:
            self.values[node] = self._make(node)
        return self.values[node]

    def _make(self, node: Node) -> Value:
        kind = self.kind(node)
        if kind == "placeholder":
            return Value(node.name, _shape(node), None)
        if kind == "quantizer":
            return self._quantized(node)
        if kind in ("reshape", "max_pool", "zero_pad", "cat"):
            return self._moved(node, kind)
        if kind in GRID_PRESERVING:
            raise _unsupported(node, kind)
        return self._computed(node, None)

    def _emit(self, step: Instruction) -> Value:
        self.instructions.append(step)
        return step.output

    def _quantized(self, node: Node) -> Value:
        quantizer = self.modules[str(node.target)]
        assert isinstance(quantizer, LearnedActivationQuantizer)
        grid = CodeGrid(
            float(quantizer.scale), int(quantizer.zero_point.round()), quantizer.grid.bits
        )
        source = tensor_inputs(node)[0]
        if self.kind(source) == "placeholder":
            image = self.value(source)
            return self._emit(Quantize((image.name,), Value(node.name, image.shape, grid)))
        if self.kind(source) == "cat":
            names = tuple(self._computed(part, grid).name for part in tensor_inputs(source))
            return self._emit(Concat(names, Value(node.name, _shape(node), grid)))
        return self._computed(source, grid)

    def _moved(self, node: Node, kind: str) -> Value:
        """Operations that keep values on their grid."""
        sources = [self.value(n) for n in tensor_inputs(node)]
        names = tuple(source.name for source in sources)
        output = Value(node.name, _shape(node), sources[0].grid)
        if kind == "reshape":
            if not _keeps_order(node):
                raise _unsupported(node, "reshape that moves values")
            return self._emit(Reshape(names, output))
        if kind == "cat":
            if any(source.grid != output.grid for source in sources):
                raise _unsupported(node, "concatenation of different grids")
            return self._emit(Concat(names, output))
        if kind == "zero_pad":
            left, right, top, bottom = self._padding(node)
            return self._emit(Pad(names, output, left, right, top, bottom))
        return self._emit(MaxPool(names, output, *self._max_pool(node)))

    def _computed(self, node: Node, grid: CodeGrid | None) -> Value:
        """One instruction for: layer, batch normalisation, addition, ReLU, rounding to ``grid``."""
        result = node
        low: float | None = None
        high: float | None = None
        while self.kind(node) in ("relu", "relu6"):
            low = 0.0
            high = 6.0 if self.kind(node) == "relu6" else high
            node = tensor_inputs(node)[0]
        residual: tuple[str, ...] = ()
        if self.kind(node) == "add":
            node, other = self._operands(node)
            residual = (self.value(other).name,)
        scale, shift = torch.ones(1), torch.zeros(1)
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (FixedBatchNorm1d, FixedBatchNorm2d)):
            node = tensor_inputs(node)[0]
            if module.layer is None:
                scale, shift = (part.to(torch.float32) for part in module.affine_map())
            else:
                module = module.layer
        kind = self.kind(node)
        if kind not in (*_LAYERS, *GRID_PRESERVING, "add", "relu", "relu6", "batch_norm", "cat"):
            raise _unsupported(node, kind if kind != "other" else str(node.target))
        is_layer = isinstance(module, (QuantizedConv2d, QuantizedLinear, QuantizedAveragePool))
        if kind in _LAYERS and not is_layer:
            raise _unsupported(node, "pooling with padding, ceil_mode or windows of several sizes")
        source = self.value(tensor_inputs(node)[0] if is_layer else node)
        inputs = (source.name, *residual)
        has_name = isinstance(module, (QuantizedConv2d, QuantizedLinear))
        name = self._unused(str(node.target) if has_name else result.name)
        output = Value(name, _shape(result), grid)
        step: Instruction
        if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
            quantizer = module.weight_quantizer
            assert isinstance(quantizer, LearnedWeightQuantizer)
            codes = quantizer.codes(module.weight).to(torch.int8).contiguous()
            self.tensors[f"{name}.weight"] = codes.cpu()
            scale, shift = fold(module)
            bits = quantizer.grid.bits
            if isinstance(module, QuantizedLinear):
                step = Linear(inputs, output, low, high, bits)
            else:
                step = Conv(inputs, output, low, high, bits, *_geometry(node, module))
        elif isinstance(module, QuantizedAveragePool):
            assert source.grid is not None
            kernel, stride = module.window(source.shape[1], source.shape[2])
            share = torch.tensor([source.grid.scale], dtype=torch.float64)
            scale = (share / (kernel[0] * kernel[1])).to(torch.float32)
            if not module.keep_dims:
                pooled = Value(self._unused(f"{name}_pooled"), (*output.shape, 1, 1), grid)
                self._set_affine(pooled, scale, shift)
                self._emit(AveragePool(inputs, pooled, low, high, kernel, stride))
                return self._emit(Reshape((pooled.name,), output))
            step = AveragePool(inputs, output, low, high, kernel, stride)
        else:
            if source.grid is not None:
                scale = scale * torch.tensor(source.grid.scale)
            step = Rescale(inputs, output, low, high)
        self._set_affine(output, scale, shift)
        return self._emit(step)

    def _unused(self, name: str) -> str:
        """``name``, or one like it: a layer whose result is rounded to two grids runs twice."""
        taken = {step.output.name for step in self.instructions}
        return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 99))) if n not in taken)

    def _set_affine(self, output: Value, scale: Tensor, shift: Tensor) -> None:
        self.tensors[f"{output.name}.scale"] = scale.cpu()
        self.tensors[f"{output.name}.shift"] = shift.cpu()

    def _operands(self, node: Node) -> tuple[Node, Node]:
        """Of an addition: the one to fold (a layer, the later one of two), and the other."""
        inputs = [n for n in node.args if isinstance(n, Node)]
        if len(inputs) != 2:
            raise _unsupported(node, "addition of a constant")
        inputs.sort(key=lambda n: (self._ends_layer(n), self.order[n]))
        return inputs[1], inputs[0]

    def _ends_layer(self, node: Node) -> bool:
        if self.kind(node) == "batch_norm":
            node = tensor_inputs(node)[0]
        return self.kind(node) in _LAYERS

    def _max_pool(self, node: Node) -> tuple[Pair, Pair, Pair, Pair, bool]:
        """Window, stride, padding, dilation and ceil_mode."""
        module = self.modules.get(str(node.target))
        if isinstance(module, nn.MaxPool2d):
            given = {name: getattr(module, name) for name in _MAX_ARGUMENTS}
        elif node.target in (F.max_pool2d, torch.max_pool2d):
            given = _arguments(node, _MAX_ARGUMENTS)
        else:
            raise _unsupported(node, "adaptive max pooling")
        kernel = _pair(given["kernel_size"])
        return (
            kernel,
            _pair(given.get("stride") or kernel),
            _pair(given.get("padding") or 0),
            _pair(given.get("dilation") or 1),
            bool(given.get("ceil_mode")),
        )

    def _padding(self, node: Node) -> tuple[int, int, int, int]:
        """Left, right, top, bottom."""
        module = self.modules.get(str(node.target))
        pad: Any = module.padding if isinstance(module, nn.ZeroPad2d) else node.args[1]
        if not isinstance(pad, (tuple, list)) or len(pad) != 4 or min(pad) < 0:
            raise _unsupported(node, f"padding {pad}")
        left, right, top, bottom = (int(side) for side in pad)
        return left, right, top, bottom


_MAX_ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def _arguments(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments after the tensor, by name."""
    return dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(shape(node)[1:])


def _pair(value: Any) -> Pair:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)


def _geometry(node: Node, layer: QuantizedConv2d) -> tuple[Pair, Pair, Pair, int]:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise _unsupported(node, f"padding {layer.padding_mode} {layer.padding}")
    return _pair(layer.stride), _pair(layer.padding), _pair(layer.dilation), layer.groups


def _keeps_order(node: Node) -> bool:
    """Whether a reshaping node leaves the values in their order."""
    name = str(getattr(node.target, "__name__", node.target))
    return not any(word in name for word in ("permute", "transpose", "shuffle"))


def _unsupported(node: Node, what: str) -> UsageError:
    return UsageError(
        f"lower: expected operations with an integer counterpart, got {what} ({node.name})"
    )
