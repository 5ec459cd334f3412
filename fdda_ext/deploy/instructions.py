"""The instructions of an integer program.

A value is a float32 tensor, or a uint8 tensor of codes q that stand for
``(q - zero_point) * scale``. Every `Compute` instruction has the same form. It computes an exact
integer sum, for a convolution ``sum_k (q_k - z) * w_k``, and then an epilogue in float32, in this
order and with each operation rounded::

    t = sum * scale[c] + shift[c]               includes batch normalisation and bias
    t = t + r                                   optional residual (q_r - z_r) * s_r
    t = clamp(t, low, high)                     ReLU, ReLU6
    q = clamp(round(t * (1 / s)) + z, 0, 2^b - 1)        half to even, as in fake_quantize

Integer sums do not depend on their order, so all implementations give bit-identical results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quantization.layers import exact_dtype

__all__ = [
    "AveragePool",
    "CodeGrid",
    "Compute",
    "Concat",
    "Conv",
    "Instruction",
    "Linear",
    "MaxPool",
    "Pad",
    "Quantize",
    "Rescale",
    "Reshape",
    "Value",
    "run_instructions",
]

Pair = tuple[int, int]

#: Largest number of values in a window, 256 x 256.
_MOST_TAPS = 2**16
#: Bound of scales and limits, far above useful values and far below the overflow of float32.
_LARGEST = 1e30


@dataclass(frozen=True)
class CodeGrid:
    """The grid of a tensor of codes.

    Attributes:
        scale: Distance between neighbouring values, positive; a float32 number.
        zero_point: Code of the value 0, in [0, 2^bits).
        bits: Bits per code, 2 to 8; codes are in [0, 2^bits).
    """

    scale: float
    zero_point: int
    bits: int

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    @property
    def largest_integer(self) -> int:
        """Largest magnitude of ``code - zero_point``."""
        return max(self.zero_point, self.quant_max - self.zero_point)

    # Scales are numbers, because tensors would be copied to the device of x.

    @property
    def inverse_scale(self) -> float:
        """``1 / scale``, rounded to float32 as in the kernels."""
        return float(torch.ones((), device="cpu") / torch.tensor(self.scale, device="cpu"))

    def quantize(self, x: Tensor) -> Tensor:
        """Round float32 ``x`` to uint8 codes."""
        codes = (x * self.inverse_scale).round_().add_(self.zero_point)
        return codes.clamp_(0, self.quant_max).to(torch.uint8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Convert codes to float32 values."""
        return self.integers(codes) * self.scale

    def integers(self, codes: Tensor) -> Tensor:
        """Compute ``codes - zero_point`` in float32."""
        return codes.to(torch.float32) - self.zero_point


@dataclass(frozen=True)
class Value:
    """Description of a tensor between instructions.

    Attributes:
        name: Name, unique in its program.
        shape: Shape without the batch dimension: ``(C, H, W)`` or ``(C,)``.
        grid: Grid of the codes; None for float32.
    """

    name: str
    shape: tuple[int, ...]
    grid: CodeGrid | None


@dataclass(frozen=True)
class Instruction:
    """Base class: the names of the input values, and the output value."""

    inputs: tuple[str, ...]
    output: Value

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer the output's shape.

        Raises:
            ValueError: If the inputs do not fit.
        """
        raise NotImplementedError

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """Compute the output from the input tensors ``x``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Quantize(Instruction):
    """Quantization of the float32 image."""

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer the shape of the input."""
        require(
            inputs[0].grid is None and self.output.grid is not None,
            "float32 input and an output grid",
        )
        return inputs[0].shape

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """Compute the codes, in channels_last."""
        assert self.output.grid is not None
        return self.output.grid.quantize(x[0]).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Compute(Instruction):
    """An integer sum and its epilogue, see the module's docstring.

    ``inputs`` are the source and optionally a residual. The tensors ``<output>.scale`` and
    ``<output>.shift`` are float32 ``[C]`` or ``[1]``.

    Attributes:
        low, high: Limits of the clamp; None for no limit.
    """

    low: float | None
    high: float | None

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer the shape of sum and residual."""
        shape = self.infer_sum(inputs[0], tensors)
        for part in ("scale", "shift"):
            tensor = _tensor(tensors, f"{self.output.name}.{part}", torch.float32)
            require(tuple(tensor.shape) in ((1,), (shape[0],)), f"one {part} per channel")
            require(bool(tensor.isfinite().all()), f"a finite {part}")
        if len(inputs) == 2:
            require(inputs[1].shape == shape, "a residual of the result's shape")
        limits = [limit for limit in (self.low, self.high) if limit is not None]
        require(all(abs(limit) < _LARGEST for limit in limits), "limits below 1e30")
        return shape

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """Compute the sum and the epilogue."""
        name = self.output.name
        total = self.sum(inputs[0], x[0], tensors)
        along = (-1,) + (1,) * (total.dim() - 2)
        t = total * tensors[f"{name}.scale"].view(along) + tensors[f"{name}.shift"].view(along)
        if len(inputs) == 2:
            grid = inputs[1].grid
            t = t + (x[1] if grid is None else grid.dequantize(x[1]))
        if self.low is not None or self.high is not None:
            t = t.clamp(self.low, self.high)
        return t if self.output.grid is None else self.output.grid.quantize(t)

    def infer_sum(self, source: Value, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer the sum's shape."""
        raise NotImplementedError

    def sum(self, source: Value, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute the exact integer sum and round it once, to float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class Layer(Compute):
    """Base class of layers with weights.

    Attributes:
        weight_bits: Bits per weight, 2 to 8.
    """

    weight_bits: int

    def groups_(self) -> int:
        """Number of groups."""
        return 1

    def geometry(self, weight: Tensor) -> dict[str, Pair]:
        """Kernel, stride, padding and dilation, where not default."""
        return {"kernel": (1, 1)}


@dataclass(frozen=True)
class Conv(Layer):
    """``sum over c, i, j of (q[c, y + i, x + j] - z) * w[o, c, i, j]``, padded with z.

    The tensor ``<output>.weight`` is int8 ``[O, C / groups, kh, kw]``.
    """

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def groups_(self) -> int:
        """Number of groups."""
        return self.groups

    def geometry(self, weight: Tensor) -> dict[str, Pair]:
        """Kernel, stride, padding and dilation."""
        return {
            "kernel": (weight.shape[2], weight.shape[3]),
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }

    def infer_sum(self, source: Value, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer ``(O, H', W')``."""
        weight = _weight(tensors, self.output.name, self.weight_bits, 4)
        require(source.grid is not None and len(source.shape) == 3, "codes [C, H, W]")
        require(min(*self.stride, *self.dilation, self.groups) > 0, "positive strides and groups")
        require(
            weight.shape[1] * self.groups == source.shape[0] and weight.shape[0] % self.groups == 0,
            "a weight that fits the channels",
        )
        kernel = (weight.shape[2], weight.shape[3])
        size = _window(source.shape, kernel, self.stride, self.padding, self.dilation)
        return (weight.shape[0], *size)

    def sum(self, source: Value, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute the convolution of integers."""
        grid = source.grid
        assert grid is not None
        weight = tensors[f"{self.output.name}.weight"]
        dtype = exact_dtype(weight, grid.largest_integer)
        return F.conv2d(
            grid.integers(x).to(dtype),
            weight.to(dtype),
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        ).to(torch.float32)


@dataclass(frozen=True)
class Linear(Layer):
    """``sum over c of (q[c] - z) * w[o, c]``; ``<output>.weight`` is int8 ``[O, C]``."""

    def infer_sum(self, source: Value, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer ``(O,)``."""
        weight = _weight(tensors, self.output.name, self.weight_bits, 2)
        require(source.grid is not None and source.shape == (weight.shape[1],), "codes [C]")
        return (weight.shape[0],)

    def sum(self, source: Value, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute the matrix product of integers."""
        grid = source.grid
        assert grid is not None
        weight = tensors[f"{self.output.name}.weight"]
        dtype = exact_dtype(weight, grid.largest_integer)
        return F.linear(grid.integers(x).to(dtype), weight.to(dtype)).to(torch.float32)


@dataclass(frozen=True)
class AveragePool(Compute):
    """``sum over the window of (q - z)``; the scale includes the division by the window size."""

    kernel: Pair
    stride: Pair

    def infer_sum(self, source: Value, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer ``(C, H', W')``."""
        require(source.grid is not None and len(source.shape) == 3, "codes [C, H, W]")
        require(min(*self.kernel, *self.stride) > 0, "positive window sizes and strides")
        return (source.shape[0], *_window(source.shape, self.kernel, self.stride, (0, 0), (1, 1)))

    def sum(self, source: Value, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute the window sums, which are exact: at most 2^16 values, below 2^24."""
        grid = source.grid
        assert grid is not None
        total = F.avg_pool2d(grid.integers(x), self.kernel, self.stride, divisor_override=1)
        return total


@dataclass(frozen=True)
class Rescale(Compute):
    """The source itself as the sum: changes the grid, or adds two tensors."""

    def infer_sum(self, source: Value, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer the source's shape."""
        return source.shape

    def sum(self, source: Value, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return ``q - z`` for codes, ``x`` for float32."""
        return x if source.grid is None else source.grid.integers(x)


@dataclass(frozen=True)
class MaxPool(Instruction):
    """Max pooling, which keeps the grid."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer ``(C, H', W')``."""
        source = inputs[0]
        require(source.grid == self.output.grid and len(source.shape) == 3, "the same grid")
        require(
            min(*self.kernel, *self.stride, *self.dilation) > 0, "positive window sizes and strides"
        )
        require(
            all(2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True)),
            "padding of at most half the window",
        )
        size = _window(
            source.shape, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        return (source.shape[0], *size)

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """Compute the maximum of shifted images, since torch cannot pool uint8."""
        (top, left), (height, width) = self.padding, self.output.shape[1:]
        reach = [
            (size - 1) * step + d * (k - 1) + 1 - n - p
            for size, step, d, k, n, p in zip(
                (height, width),
                self.stride,
                self.dilation,
                self.kernel,
                x[0].shape[2:],
                self.padding,
                strict=True,
            )
        ]
        lowest = 0 if x[0].dtype == torch.uint8 else -math.inf
        around = (left, max(reach[1], 0), top, max(reach[0], 0))
        padded = F.pad(x[0], around, value=lowest) if any(around) else x[0]
        result: Tensor | None = None
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                y, z = i * self.dilation[0], j * self.dilation[1]
                shifted = padded[
                    :,
                    :,
                    y : y + (height - 1) * self.stride[0] + 1 : self.stride[0],
                    z : z + (width - 1) * self.stride[1] + 1 : self.stride[1],
                ]
                result = shifted if result is None else torch.maximum(result, shifted)
        assert result is not None
        return result


@dataclass(frozen=True)
class Reshape(Instruction):
    """The same values in another shape."""

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer the output's shape."""
        require(inputs[0].grid == self.output.grid, "the same grid")
        require(
            math.prod(inputs[0].shape) == math.prod(self.output.shape),
            "as many output as input values",
        )
        return self.output.shape

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """Reshape the input."""
        return x[0].reshape(x[0].shape[0], *self.output.shape)


@dataclass(frozen=True)
class Pad(Instruction):
    """Zero padding; the code of 0 is the zero point."""

    left: int
    right: int
    top: int
    bottom: int

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer ``(C, H', W')``."""
        source = inputs[0]
        require(source.grid == self.output.grid and len(source.shape) == 3, "the same grid")
        sides = (self.left, self.right, self.top, self.bottom)
        require(min(sides) >= 0, "sides of 0 or more")
        channels, height, width = source.shape
        return (channels, height + self.top + self.bottom, width + self.left + self.right)

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """Pad the input."""
        zero = 0 if inputs[0].grid is None else inputs[0].grid.zero_point
        return F.pad(x[0], (self.left, self.right, self.top, self.bottom), value=zero)


@dataclass(frozen=True)
class Concat(Instruction):
    """Concatenation of channels."""

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Infer ``(sum of C, *)``."""
        require(
            all(v.grid == self.output.grid and v.shape[1:] == inputs[0].shape[1:] for v in inputs),
            "the same grid and image size",
        )
        return (sum(v.shape[0] for v in inputs), *inputs[0].shape[1:])

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """Concatenate the inputs."""
        return torch.cat(list(x), 1)


def require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(rule)


def check_value(value: Value) -> None:
    require(len(value.shape) in (1, 3) and min(value.shape) > 0, "a shape [C] or [C, H, W]")
    require(math.prod(value.shape) < 2**28, "fewer than 2^28 values per image")
    grid = value.grid
    if grid is not None:
        require(2 <= grid.bits <= 8, "codes of 2 to 8 bits")
        require(0 <= grid.zero_point <= grid.quant_max, "a zero point among the codes")
        require(1 / _LARGEST < grid.scale < _LARGEST, "a scale between 1e-30 and 1e30")


def check_step(
    step: Instruction, known: Mapping[str, Value], image: Value, tensors: Mapping[str, Tensor]
) -> None:
    """Check that ``step`` can follow the instructions that made the ``known`` values.

    Args:
        step: Next instruction.
        known: Image and all values made so far, by name.
        image: Input of the program.
        tensors: Tensors of the program.

    Raises:
        ValueError: If it cannot. The message says what it needs.
    """
    check_value(step.output)
    require(step.output.name not in known, "a new name for its output")
    require(all(name in known for name in step.inputs), "inputs that exist")
    wanted = (1, 2) if isinstance(step, Compute) else (1,)
    require(
        len(step.inputs) in wanted or (isinstance(step, Concat) and bool(step.inputs)),
        f"{wanted} inputs",
    )
    reads_image = image.name in step.inputs
    require(
        reads_image == isinstance(step, Quantize),
        "the image as input of Quantize instructions only",
    )
    shape = step.infer([known[name] for name in step.inputs], tensors)
    require(shape == step.output.shape, f"an output of shape {shape}")


def _tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    require(name in tensors, f"the tensor {name}")
    require(tensors[name].dtype == dtype, f"{name} in {dtype}")
    return tensors[name]


def _weight(tensors: Mapping[str, Tensor], name: str, bits: int, dims: int) -> Tensor:
    weight = _tensor(tensors, f"{name}.weight", torch.int8)
    require(2 <= bits <= 8, "weights of 2 to 8 bits")
    require(weight.dim() == dims and weight.numel() > 0, f"a weight of {dims} dimensions")
    half = 2 ** (bits - 1)
    low, high = (int(v) for v in weight.aminmax())
    require(-half <= low and high < half, f"weights within {bits} bits")
    return weight


def run_instructions(
    image: Value,
    instructions: Sequence[Instruction],
    tensors: Mapping[str, Tensor],
    images: Tensor,
) -> Tensor:
    """Compute the last instruction's output; free each value after its last use."""
    known, values = {image.name: image}, {image.name: images}
    last_use = {name: i for i, step in enumerate(instructions) for name in step.inputs}
    for index, step in enumerate(instructions):
        inputs = [known[name] for name in step.inputs]
        values[step.output.name] = step.run(inputs, [values[n] for n in step.inputs], tensors)
        known[step.output.name] = step.output
        for name in set(step.inputs):
            if last_use[name] == index:
                del values[name]
    return values[instructions[-1].output.name]


def _window(
    shape: tuple[int, ...],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool = False,
) -> Pair:
    """Height and width of the result of a sliding window."""
    require(math.prod(kernel) <= _MOST_TAPS, "a window of reasonable size")
    sizes = []
    for n, k, s, p, d in zip(shape[1:], kernel, stride, padding, dilation, strict=True):
        require(0 <= p < 2**15 and max(k, s, d) < 2**15, "a window of reasonable size")
        room = n + 2 * p - d * (k - 1) - 1
        require(room >= 0, "a window that fits the image")
        size = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (size - 1) * s >= n + p:
            size -= 1  # a window must begin inside the image
        sizes.append(size)
    return sizes[0], sizes[1]
