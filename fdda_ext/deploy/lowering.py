"""Lowering: translation of a prepared student into an integer program.

Every quantizer becomes an instruction, into which the operations before it are folded. The last
convolution, linear layer or average pooling gives the integer sum. Batch normalisation, bias and
the scales of input and weights give one scale and one shift per channel. An addition gives the
residual, and ReLU gives the clamp. A result with several readers is computed once, in float32.
"""

from __future__ import annotations

import itertools
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
    fold_norm,
)
from ..quantization.operations import (
    GRID_PRESERVING,
    describe,
    operation,
    shape,
    tensor_inputs,
)
from ..quantization.quantizer import (
    ActivationQuantizer,
    LearnedActivationQuantizer,
    LearnedWeightQuantizer,
    WeightQuantizer,
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
    check_step,
)
from .program import IntegerProgram

__all__ = ["export_obstacles", "lower", "refusal"]

_LAYERS = ("conv", "linear", "avg_pool")
_CLAMPS = ("relu", "relu6")
#: Number of obstacles that an error lists; `export_obstacles` returns all.
_SHOWN = 5

_ACTIVATION = "has no integer instruction, replace it by ReLU or ReLU6 before training"
_SOFTMAX = "has no integer instruction, leave it out: the order of the logits is the same without"
_SIGMOID = (
    "has no integer instruction, replace it by ReLU or ReLU6, or use a network without gates "
    "(squeeze-and-excitation)"
)
_GATE = (
    "multiplies tensors, which has no integer instruction, use a network without such gates "
    "(squeeze-and-excitation)"
)
_CONSTANT = (
    "computes with a constant, which has no integer instruction, take it into the weight or bias "
    "of the layer before"
)
_SHAPES = "adds tensors of different shapes, which has no integer instruction"
_MOVES = "moves values to other places, which has no integer instruction"
_SELECTS = "takes a part of a tensor, which has no integer instruction"
#: Unpickled graphs lack the shapes of their tensors.
_NO_STUDENT = "is no network as prepare returns it, call prepare and load_state_dict instead"
_OTHER = (
    "has no integer instruction, use convolutions, linear layers, batch normalisation, ReLU, "
    "ReLU6, addition, concatenation, max or average pooling"
)
_POOLING = (
    "averages over padding, by ceil_mode or over windows of several sizes, which has no integer "
    "instruction, use windows of one size that lie inside the image"
)

#: Why an operation has no instruction and what to do, by the name of its type or function in lower
#: case without underscores.
_REASONS = dict.fromkeys(
    (
        "celu", "clamp", "clip", "elu", "gelu", "hardswish", "hardtanh", "leakyrelu",
        "logsigmoid", "mish", "prelu", "quickgelu", "rrelu", "selu", "silu", "softplus",
        "softsign", "swish", "tanh", "threshold",
    ),
    _ACTIVATION,
) | {
    "sigmoid": _SIGMOID, "hardsigmoid": _SIGMOID, "softmax": _SOFTMAX, "logsoftmax": _SOFTMAX,
    "mul": _GATE,
}  # fmt: skip


@torch.no_grad()
def lower(
    student: GraphModule,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> IntegerProgram:
    """Translate ``student`` into an integer program with bit-identical logits.

    Args:
        student: Calibrated student from `prepare` with grid "deploy".
        mean: Mean per channel, to normalise uint8 images; None to take only float32 images.
        std: Standard deviation per channel, together with ``mean``.

    Returns:
        The program, on the CPU, for images of the size that ``student`` was prepared with.

    Raises:
        UsageError: If the student is not calibrated or has obstacles, see `export_obstacles`.
    """
    if not isinstance(student, GraphModule) or not _has_shapes(student):
        raise UsageError(f"lower: expected a student, got one that {_NO_STUDENT}")
    for module in student.modules():
        if isinstance(module, ActivationQuantizer) and module.mode != "quantize":
            raise UsageError(
                f"lower: expected student to be calibrated, got a quantizer in mode {module.mode}; "
                "call calibrate first"
            )
    lowering = _Lowering(student)
    lowering.run()
    if lowering.obstacles:
        raise UsageError(f"lower: {refusal(list(lowering.obstacles))}")
    return IntegerProgram(lowering.image, lowering.instructions, lowering.tensors, mean, std)


def refusal(obstacles: list[str]) -> str:
    """Write an error text with the number of obstacles and the first of them."""
    rest = [f"and {len(obstacles) - _SHOWN} more"] if len(obstacles) > _SHOWN else []
    return (
        "expected every operation to have an integer instruction, "
        f"got {len(obstacles)} that have none: {'; '.join(obstacles[:_SHOWN] + rest)}"
    )


@torch.no_grad()
def export_obstacles(student: nn.Module) -> list[str]:
    """List the operations that keep ``student`` from becoming an integer program.

    The student need not be calibrated or trained. If the list is empty, `lower` accepts the student
    after calibration.

    Args:
        student: Student from `prepare`.

    Returns:
        One sentence per obstacle, in execution order: the operation's place and type, and what to
        do about it.
    """
    if not isinstance(student, GraphModule) or not _has_shapes(student):
        return [f"{type(student).__name__} {_NO_STUDENT}"]
    lowering = _Lowering(student)
    lowering.run()
    return list(lowering.obstacles)


class _Lowering:
    """One pass over a student.

    Attributes:
        instructions: Instructions in execution order, incomplete if there are obstacles.
        tensors: Tensors of the instructions by name.
        obstacles: One sentence per obstacle, in execution order, without duplicates.
        image: Input value.
    """

    def __init__(self, student: GraphModule) -> None:
        self.graph = student.graph
        self.modules: dict[str, nn.Module] = dict(student.named_modules())
        self.instructions: list[Instruction] = []
        self.tensors: dict[str, Tensor] = {}
        self.obstacles: dict[str, None] = {}
        self.values: dict[Node, Value] = {}
        self.floats: dict[Node, Value] = {}
        self.known: dict[str, Value] = {}
        self.stand_ins: set[str] = set()  # names of values without an instruction
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        image = next(n for n in self.graph.nodes if n.op == "placeholder" and n.users)
        self.image = Value(image.name, _shape(image), None)
        self.values[image] = self.known[image.name] = self.image
        self.batch = shape(image)[0]

    def run(self) -> None:
        if any(
            isinstance(module, (ActivationQuantizer, WeightQuantizer))
            and not isinstance(module, (LearnedActivationQuantizer, LearnedWeightQuantizer))
            for module in self.modules.values()
        ):
            self.obstacles["grid paper leaves tensors in float, prepare with grid deploy"] = None
            return
        for node in self.graph.nodes:  # execution order keeps the recursion shallow
            if self.kind(node) == "quantizer":
                self.value(node)
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        (result,) = tensor_inputs(output)
        self.as_float(result)

    def kind(self, node: Node) -> str:
        return operation(node, self.modules)

    def module(self, node: Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def refuse(self, node: Node, reason: str) -> None:
        self.obstacles[f"{describe(node, self.modules)}: {reason}"] = None

    def value(self, node: Node) -> Value:
        """Append the instructions that ``node`` still needs, and return its value."""
        if node not in self.values:
            self.values[node] = self._make(node)
        return self.values[node]

    def as_float(self, node: Node) -> Value:
        value = self.value(node)
        if value.grid is None:
            return value
        if node not in self.floats:
            self.floats[node] = self._rescale(node, value, None)
        return self.floats[node]

    def _make(self, node: Node) -> Value:
        kind = self.kind(node)
        if node.op == "get_attr":
            return self._unsupported(
                node, "is a tensor that the network reads directly, use layers only"
            )
        if kind == "quantizer":
            return self._quantized(node)
        if not self._is_of_batch(node):
            return self._unsupported(node, "mixes the images of a batch, which no program can do")
        if kind == "reshape":
            return self._reshaped(node)
        if kind == "max_pool":
            return self._max_pooled(node)
        if kind == "zero_pad":
            return self._padded(node)
        if kind == "cat":
            return self._concatenated(node)
        if kind in (*_LAYERS, *_CLAMPS, "batch_norm", "add"):
            return self._computed(node, None)
        if kind == "select":
            return self._unsupported(node, _SELECTS)
        if kind == "mul" and len(tensor_inputs(node)) == 1:
            return self._unsupported(node, _CONSTANT)
        return self._unsupported(node, _REASONS.get(_type_name(node, self.modules), _OTHER))

    def _is_of_batch(self, node: Node) -> bool:
        """Whether the first dimension of the result is the batch."""
        return shape(node)[:1] == (self.batch,)

    def _unsupported(self, node: Node, reason: str) -> Value:
        """Record an obstacle and those before it; return a stand-in for the result."""
        sources = tensor_inputs(node)
        before = [self.value(self._unshaped(n)) for n in sources if n.op != "get_attr"]
        is_element = _type_name(node, self.modules) == "getitem" and any(
            self.kind(source) == "select" for source in sources
        )
        was_named = is_element or not all(
            self._is_of_batch(source) for source in sources if source.op != "get_attr"
        )
        if not was_named:  # otherwise an earlier obstacle covers it
            self.refuse(node, reason)
        grid = before[0].grid if before and self.kind(node) in GRID_PRESERVING else None
        value = Value(self._unused(node.name), _shape(node), grid)
        self.known[value.name] = value
        self.stand_ins.add(value.name)
        return value

    def _emit(self, node: Node, step: Instruction) -> Value:
        """Append an instruction that ``node`` needs."""
        output = step.output
        if any(name in self.stand_ins for name in step.inputs):
            # The stand-in's own obstacle is enough. Checks resume after a result of a usual shape.
            if len(output.shape) not in (1, 3) or not self._is_of_batch(node):
                self.stand_ins.add(output.name)
        else:
            try:
                check_step(step, self.known, self.image, self.tensors)
            except ValueError as error:
                self.refuse(node, f"would need {error}")
                self.stand_ins.add(output.name)
        self.instructions.append(step)
        self.known[output.name] = output
        return output

    def _quantized(self, node: Node) -> Value:
        quantizer = self.modules[str(node.target)]
        assert isinstance(quantizer, LearnedActivationQuantizer)
        grid = CodeGrid(
            float(quantizer.scale), int(quantizer.zero_point.round()), quantizer.grid.bits
        )
        (source,) = tensor_inputs(node)
        if source.op == "placeholder":
            output = Value(self._unused(node.name), self.image.shape, grid)
            return self._emit(node, Quantize((self.image.name,), output))
        if self.kind(source) == "cat" and (parts := self._parts(source)) is not None:
            names = tuple(self._rounded(part, grid).name for part in parts)
            output = Value(self._unused(node.name), _shape(node), grid)
            return self._emit(source, Concat(names, output))
        return self._computed(source, grid)

    def _rounded(self, node: Node, grid: CodeGrid) -> Value:
        if self._is_folded(node):
            return self._computed(node, grid)
        return self._rescale(node, self.value(node), grid)

    def _is_folded(self, node: Node) -> bool:
        """Whether a single operation reads ``node``, so that it needs no value of its own."""
        return len(node.users) == 1 and node not in self.values

    # ---- operations that move values ------------------------------------------------------------

    def _reshaped(self, node: Node) -> Value:
        if not self._keeps_order(node):
            return self._unsupported(node, _MOVES)
        source = self.value(self._unshaped(node))
        output = Value(self._unused(node.name), _shape(node), source.grid)
        if len(output.shape) not in (1, 3):
            return self._unsupported(
                node,
                f"makes a tensor of {len(output.shape) + 1} dimensions, programs only have [N, C] "
                "and [N, C, H, W]",
            )
        return self._emit(node, Reshape((source.name,), output))

    def _unshaped(self, node: Node) -> Node:
        """Return the node before a chain of reshapes, whose shapes may be unsupported."""
        while self.kind(node) == "reshape" and self._keeps_order(node) and self._is_of_batch(node):
            node = tensor_inputs(node)[0]
        return node

    def _keeps_order(self, node: Node) -> bool:
        module = self.module(node)
        if module is not None:
            return isinstance(module, (nn.Flatten, nn.Unflatten))
        name = _type_name(node, self.modules)
        return not any(word in name for word in ("permute", "transpose", "shuffle"))

    def _max_pooled(self, node: Node) -> Value:
        window = self._max_window(node)
        if window is None:
            return self._unsupported(
                node, "is adaptive or returns indices, use MaxPool2d with a fixed window"
            )
        source = self.value(tensor_inputs(node)[0])
        output = Value(self._unused(node.name), _shape(node), source.grid)
        return self._emit(node, MaxPool((source.name,), output, *window))

    def _max_window(self, node: Node) -> tuple[Pair, Pair, Pair, Pair, bool] | None:
        """Window, stride, padding, dilation and ceil_mode; None if not supported."""
        module = self.module(node)
        if isinstance(module, nn.MaxPool2d):
            given = {name: getattr(module, name) for name in (*_MAX_ARGUMENTS, "return_indices")}
        elif node.target in (F.max_pool2d, torch.max_pool2d):
            given = _arguments(node, (*_MAX_ARGUMENTS, "return_indices"))
        else:
            return None
        if given.get("return_indices"):
            return None
        kernel = _pair(given["kernel_size"])
        return (
            kernel,
            _pair(given.get("stride") or kernel),
            _pair(given.get("padding") or 0),
            _pair(given.get("dilation") or 1),
            bool(given.get("ceil_mode")),
        )

    def _padded(self, node: Node) -> Value:
        module = self.module(node)
        pad: Any = (
            module.padding
            if isinstance(module, nn.ZeroPad2d)
            else _arguments(node, ("pad",)).get("pad")
        )
        sides = [int(side) for side in pad] + [0] * (4 - len(pad))
        if min(sides) < 0 or any(sides[4:]) or len(_shape(node)) != 3:
            return self._unsupported(
                node, f"pads by {tuple(pad)}, a program only pads height and width"
            )
        source = self.value(tensor_inputs(node)[0])
        output = Value(self._unused(node.name), _shape(node), source.grid)
        return self._emit(node, Pad((source.name,), output, *sides[:4]))

    def _parts(self, node: Node) -> list[Node] | None:
        """Inputs of a concatenation of channels; None for other concatenations."""
        given = dict(zip(("tensors", "dim"), node.args, strict=False)) | dict(node.kwargs)
        parts, axis = given.get("tensors"), given.get("dim", 0)
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, Node) for p in parts):
            return None
        is_of_channels = isinstance(axis, int) and axis % len(shape(node)) == 1
        return [p for p in parts if isinstance(p, Node)] if is_of_channels else None

    def _concatenated(self, node: Node) -> Value:
        """Concatenate channels in float32, where no quantizer follows."""
        parts = self._parts(node)
        if parts is None:
            return self._unsupported(node, "concatenates another dimension than channels")
        names = tuple(self.as_float(part).name for part in parts)
        output = Value(self._unused(node.name), _shape(node), None)
        return self._emit(node, Concat(names, output))

    # ---- operations that compute ----------------------------------------------------------------

    def _computed(
        self,
        node: Node,
        grid: CodeGrid | None,
        low: float | None = None,
        high: float | None = None,
    ) -> Value:
        """Make one instruction of layer, batch normalisation, addition, ReLU and rounding.

        Args:
            node: Last operation before the rounding. Nothing else reads its result.
            grid: Grid of the result; None for float32.
            low: Lower limit of a clamp after ``node``.
            high: Upper limit of this clamp.
        """
        result, source = node, node
        while self._may_fold(source, result) and self.kind(source) in _CLAMPS:
            low = 0.0
            high = 6.0 if self.kind(source) == "relu6" else high
            source = tensor_inputs(source)[0]
        if grid is not None and self._may_fold(source, result) and self.kind(source) == "max_pool":
            window = self._max_window(source)
            if window is not None:
                return self._pooled_codes(source, window, grid, low, high, result)
        residual: tuple[str, ...] = ()
        if self._may_fold(source, result) and self.kind(source) == "add":
            operands = [n for n in source.args if isinstance(n, Node)]
            shapes = [shape(n) for n in operands if n.op != "get_attr"]
            if shapes != [shape(source)] * 2:
                reason = _CONSTANT if len(operands) == 1 else _SHAPES
                value = self._unsupported(source, reason)
                return self._rescale(result, value, grid, low, high)
            source, other = self._operands(operands)
            residual = (self.value(other).name,)
        norm = self.module(source)
        if isinstance(norm, (FixedBatchNorm1d, FixedBatchNorm2d)) and self._may_fold(
            source, result
        ):
            source = tensor_inputs(source)[0]
            if norm.layer is None:
                value = self.value(source) if norm.reads_codes else self.as_float(source)
                affine = fold_norm(norm)
                return self._rescale(result, value, grid, low, high, residual, affine)
        if self.kind(source) in _LAYERS and self._may_fold(source, result):
            return self._layer(source, grid, low, high, residual, result)
        return self._rescale(result, self.value(source), grid, low, high, residual)

    def _may_fold(self, node: Node, result: Node) -> bool:
        """Whether ``node`` is ``result`` or is read only on the way to it."""
        return node is result or self._is_folded(node)

    def _operands(self, operands: list[Node]) -> tuple[Node, Node]:
        """Return the addend to fold (preferably a layer, then the later one) and the other."""
        operands = sorted(operands, key=lambda n: (self._ends_layer(n), self.order[n]))
        return operands[1], operands[0]

    def _ends_layer(self, node: Node) -> bool:
        if not self._is_folded(node):
            return False
        norm = self.module(node)
        if isinstance(norm, (FixedBatchNorm1d, FixedBatchNorm2d)):
            return norm.layer is not None
        return self.kind(node) in _LAYERS

    def _pooled_codes(
        self,
        node: Node,
        window: tuple[Pair, Pair, Pair, Pair, bool],
        grid: CodeGrid,
        low: float | None,
        high: float | None,
        result: Node,
    ) -> Value:
        """Make codes of max pooling and a clamp. Pooling comes last, which gives the same codes."""
        (source,) = tensor_inputs(node)
        if self._is_folded(source):
            codes = self._computed(source, grid, low, high)
        else:
            codes = self._rescale(source, self.value(source), grid, low, high)
        output = Value(self._unused(result.name), _shape(node), grid)
        return self._emit(node, MaxPool((codes.name,), output, *window))

    def _rescale(
        self,
        result: Node,
        source: Value,
        grid: CodeGrid | None,
        low: float | None = None,
        high: float | None = None,
        residual: tuple[str, ...] = (),
        affine: tuple[Tensor, Tensor] | None = None,
    ) -> Value:
        """Append an epilogue without a sum before it."""
        if affine is None:
            step = 1.0 if source.grid is None else source.grid.scale
            affine = torch.tensor([step]), torch.zeros(1)
        output = Value(self._unused(result.name), source.shape, grid)
        self._set_affine(output, *affine)
        return self._emit(result, Rescale((source.name, *residual), output, low, high))

    def _layer(
        self,
        node: Node,
        grid: CodeGrid | None,
        low: float | None,
        high: float | None,
        residual: tuple[str, ...],
        result: Node,
    ) -> Value:
        module = self.module(node)
        if isinstance(module, QuantizedConv2d) and module.padding_mode != "zeros":
            value = self._unsupported(
                node, f'pads by {module.padding_mode}, use padding_mode="zeros" before training'
            )
            return self._rescale(result, value, grid, low, high, residual)
        if isinstance(module, QuantizedAveragePool):
            return self._average_pool(node, module, grid, low, high, residual, result)
        if not isinstance(module, (QuantizedConv2d, QuantizedLinear)):
            value = self._unsupported(node, _POOLING)
            return self._rescale(result, value, grid, low, high, residual)
        source = self.value(tensor_inputs(node)[0])
        if isinstance(module, QuantizedLinear) and len(source.shape) != 1:
            value = self._unsupported(
                node, f"takes a tensor of {len(source.shape) + 1} dimensions, flatten it to [N, C]"
            )
            return self._rescale(result, value, grid, low, high, residual)
        output = Value(self._unused(str(node.target)), _shape(result), grid)
        quantizer = module.weight_quantizer
        assert isinstance(quantizer, LearnedWeightQuantizer)
        codes = quantizer.codes(module.weight).to(torch.int8).contiguous()
        self.tensors[f"{output.name}.weight"] = codes.cpu()
        self._set_affine(output, *fold(module))
        inputs = (source.name, *residual)
        bits = quantizer.grid.bits
        if isinstance(module, QuantizedLinear):
            return self._emit(node, Linear(inputs, output, low, high, bits))
        return self._emit(
            node,
            Conv(
                inputs, output, low, high, bits, _pair(module.stride), _pair(module.padding),
                _pair(module.dilation), module.groups,
            ),
        )  # fmt: skip

    def _average_pool(
        self,
        node: Node,
        module: QuantizedAveragePool,
        grid: CodeGrid | None,
        low: float | None,
        high: float | None,
        residual: tuple[str, ...],
        result: Node,
    ) -> Value:
        source = self.value(tensor_inputs(node)[0])
        if not module.keep_dims and residual:
            return self._rescale(result, self.value(node), grid, low, high, residual)
        kernel, stride = module.window(source.shape[1], source.shape[2])
        assert source.grid is not None
        step = torch.tensor([source.grid.scale], dtype=torch.float64)
        scale = (step / (kernel[0] * kernel[1])).to(torch.float32)
        output_shape = _shape(result) if module.keep_dims else (*_shape(result), 1, 1)
        output = Value(self._unused(result.name), output_shape, grid)
        self._set_affine(output, scale, torch.zeros(1))
        inputs = (source.name, *residual)
        pooled = self._emit(node, AveragePool(inputs, output, low, high, kernel, stride))
        if module.keep_dims:
            return pooled
        flat = Value(self._unused(f"{result.name}_flat"), _shape(result), grid)
        return self._emit(node, Reshape((pooled.name,), flat))

    def _unused(self, name: str) -> str:
        """Return ``name``, with a number if the name is taken."""
        names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
        return next(n for n in names if n not in self.known)

    def _set_affine(self, output: Value, scale: Tensor, shift: Tensor) -> None:
        self.tensors[f"{output.name}.scale"] = scale.cpu()
        self.tensors[f"{output.name}.shift"] = shift.cpu()


_MAX_ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def _has_shapes(student: GraphModule) -> bool:
    return any("shape" in node.meta for node in student.graph.nodes)


def _arguments(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of a call after the tensor, by name."""
    return dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(shape(node)[1:])


def _pair(value: Any) -> Pair:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)


def _type_name(node: Node, modules: dict[str, nn.Module]) -> str:
    """Name of a module's type, function or method, in lower case without underscores."""
    if node.op == "call_module":
        name = type(modules[str(node.target)]).__name__
    else:
        name = str(getattr(node.target, "__name__", node.target))
    return name.lower().replace("_", "")
