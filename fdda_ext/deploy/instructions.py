"""The instructions of an integer program, and what each of them computes.

A value is a tensor of codes q (uint8), which stand for ``(q - zero_point) * scale``, or of float32.
Every instruction that computes has the same form. An exact integer sum, for a convolution
``sum_k (q_k - z) * w_k``, becomes, in float32 and in this order, each step rounded::

    t = sum * scale[c] + shift[c]               batch normalisation and bias are folded in
    t = t + r                                   a residual, if there is one: (q_r - z_r) * s_r
    t = clamp(t, low, high)                     ReLU, ReLU6
    q = clamp(round(t * (1 / s)) + z, 0, 2^b - 1)        half to even, as in fake_quantize

so that any two implementations agree to the bit: integer sums do not depend on their order.
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

#: Of a window: 256 x 256.
_MOST_TAPS = 2**16
#: Beyond any number that a network has a use for, and far from float32's overflow.
_LARGEST = 1e30


@dataclass(frozen=True)
class CodeGrid:
    """What the codes of a tensor mean.

    Attributes:
        scale: Of one step, positive; a float32 number.
        zero_point: The code of 0, in [0, 2^bits).
        bits: 2 to 8; codes lie in [0, 2^bits).
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
        """Bound of the magnitude of ``code - zero_point``."""
        return max(self.zero_point, self.quant_max - self.zero_point)

    # Scales are numbers, not tensors, so that nothing has to be copied to the device of x.

    @property
    def inverse_scale(self) -> float:
        """One over the scale, in float32 as the kernels have it."""
        return float(torch.ones((), device="cpu") / torch.tensor(self.scale, device="cpu"))

    def quantize(self, x: Tensor) -> Tensor:
        """Codes, uint8, of float32 ``x``."""
        codes = (x * self.inverse_scale).round_().add_(self.zero_point)
        return codes.clamp_(0, self.quant_max).to(torch.uint8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The float32 values that ``codes`` stand for."""
        return self.integers(codes) * self.scale

    def integers(self, codes: Tensor) -> Tensor:
        """``codes - zero_point`` in float32."""
        return codes.to(torch.float32) - self.zero_point


@dataclass(frozen=True)
class Value:
    """A tensor between instructions.

    Attributes:
        name: Unique in its program.
        shape: Without the batch: ``(C, H, W)`` or ``(C,)``.
        grid: Of its codes; None for float32.
    """

    name: str
    shape: tuple[int, ...]
    grid: CodeGrid | None


@dataclass(frozen=True)
class Instruction:
    """What all have: the names of the values they read, and the value they make."""

    inputs: tuple[str, ...]
    output: Value

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Shape of the result, from those of the inputs.

        Raises:
            ValueError: If the inputs do not fit.
        """
        raise NotImplementedError

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """The result, from the tensors ``x`` of the inputs."""
        raise NotImplementedError


@dataclass(frozen=True)
class Quantize(Instruction):
    """Codes of a float tensor: the image."""

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Like the input."""
        require(inputs[0].grid is None and self.output.grid is not None, "float in, codes out")
        return inputs[0].shape

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """Rounds to the grid."""
        assert self.output.grid is not None
        return self.output.grid.quantize(x[0]).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Compute(Instruction):
    """An integer sum, then the steps at the head of this module.

    ``inputs`` are the source and, if there is one, the residual. The tensors ``<output>.scale`` and
    ``<output>.shift`` are float32 ``[C]`` or ``[1]``.

    Attributes:
        low, high: Of the clamp; None for none.
    """

    low: float | None
    high: float | None

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Shape of the sum, which a residual must share."""
        shape = self.infer_sum(inputs[0], tensors)
        for part in ("scale", "shift"):
            tensor = _tensor(tensors, f"{self.output.name}.{part}", torch.float32)
            require(tuple(tensor.shape) in ((1,), (shape[0],)), f"{part} of one value per channel")
            require(bool(tensor.isfinite().all()), f"{part} to be finite")
        if len(inputs) == 2:
            require(inputs[1].shape == shape, "a residual of the result's shape")
        limits = [limit for limit in (self.low, self.high) if limit is not None]
        require(all(abs(limit) < _LARGEST for limit in limits), "limits below 1e30")
        return shape

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """The sum, scaled, shifted, added to, clamped and rounded."""
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
        """Shape of `sum`."""
        raise NotImplementedError

    def sum(self, source: Value, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Integers in float32, exact until they are rounded to it once."""
        raise NotImplementedError


@dataclass(frozen=True)
class Layer(Compute):
    """What layers with weights share.

    Attributes:
        weight_bits: 2 to 8.
    """

    weight_bits: int

    def groups_(self) -> int:
        """Groups of the convolution."""
        return 1

    def geometry(self, weight: Tensor) -> dict[str, Pair]:
        """Window, stride, padding and dilation, where they are not 1 or 0."""
        return {"kernel": (1, 1)}


@dataclass(frozen=True)
class Conv(Layer):
    """``sum over c, i, j of (q[c, y + i, x + j] - z) * w[o, c, i, j]``; outside the image lies z.

    The tensor ``<output>.weight`` is int8 ``[O, C / groups, kh, kw]``.
    """

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def groups_(self) -> int:
        """Groups of the convolution."""
        return self.groups

    def geometry(self, weight: Tensor) -> dict[str, Pair]:
        """Of the window."""
        return {
            "kernel": (weight.shape[2], weight.shape[3]),
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }

    def infer_sum(self, source: Value, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """``(O, H', W')``."""
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
        """The convolution of integers."""
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
        """``(O,)``."""
        weight = _weight(tensors, self.output.name, self.weight_bits, 2)
        require(source.grid is not None and source.shape == (weight.shape[1],), "codes [C]")
        return (weight.shape[0],)

    def sum(self, source: Value, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The product of integers."""
        grid = source.grid
        assert grid is not None
        weight = tensors[f"{self.output.name}.weight"]
        dtype = exact_dtype(weight, grid.largest_integer)
        return F.linear(grid.integers(x).to(dtype), weight.to(dtype)).to(torch.float32)


@dataclass(frozen=True)
class AveragePool(Compute):
    """``sum over the window of (q - z)``; the scale divides by its size."""

    kernel: Pair
    stride: Pair

    def infer_sum(self, source: Value, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """``(C, H', W')``."""
        require(source.grid is not None and len(source.shape) == 3, "codes [C, H, W]")
        require(min(*self.kernel, *self.stride) > 0, "positive windows")
        return (source.shape[0], *_window(source.shape, self.kernel, self.stride, (0, 0), (1, 1)))

    def sum(self, source: Value, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sums of the windows; below 2^24, as no image has 2^16 positions in one."""
        grid = source.grid
        assert grid is not None
        total = F.avg_pool2d(grid.integers(x), self.kernel, self.stride, divisor_override=1)
        return total


@dataclass(frozen=True)
class Rescale(Compute):
    """The source's own integers, or its floats: a change of grid, or a sum of two tensors."""

    def infer_sum(self, source: Value, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Like the source."""
        return source.shape

    def sum(self, source: Value, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``q - z``, or ``x``."""
        return x if source.grid is None else source.grid.integers(x)


@dataclass(frozen=True)
class MaxPool(Instruction):
    """The largest code of each window."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """``(C, H', W')``."""
        source = inputs[0]
        require(source.grid == self.output.grid and len(source.shape) == 3, "the same grid")
        require(min(*self.kernel, *self.stride, *self.dilation) > 0, "positive windows")
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
        """As the maximum of shifted images, since torch does not pool uint8."""
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
        """That of the output, if it has as many values."""
        require(inputs[0].grid == self.output.grid, "the same grid")
        require(math.prod(inputs[0].shape) == math.prod(self.output.shape), "as many values")
        return self.output.shape

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """No value moves."""
        return x[0].reshape(x[0].shape[0], *self.output.shape)


@dataclass(frozen=True)
class Pad(Instruction):
    """Zeros around the image: their code is the zero point."""

    left: int
    right: int
    top: int
    bottom: int

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """``(C, H', W')``."""
        source = inputs[0]
        require(source.grid == self.output.grid and len(source.shape) == 3, "the same grid")
        channels, height, width = source.shape
        return (channels, height + self.top + self.bottom, width + self.left + self.right)

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """Codes of 0 all around."""
        zero = 0 if inputs[0].grid is None else inputs[0].grid.zero_point
        return F.pad(x[0], (self.left, self.right, self.top, self.bottom), value=zero)


@dataclass(frozen=True)
class Concat(Instruction):
    """Channels side by side."""

    def infer(self, inputs: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """``(sum of C, *)``."""
        require(
            all(v.grid == self.output.grid and v.shape[1:] == inputs[0].shape[1:] for v in inputs),
            "the same grid and image size",
        )
        return (sum(v.shape[0] for v in inputs), *inputs[0].shape[1:])

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """Along the channels."""
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
    """Whether ``step`` can follow the instructions that made the ``known`` values.

    Args:
        step: The next instruction.
        known: The image and all values made so far, by name.
        image: The input of the program.
        tensors: Of the program.

    Raises:
        ValueError: If it cannot; says what it would need.
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
    require(reads_image == isinstance(step, Quantize), "the image in Quantize and nowhere else")
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
    """What the last instruction makes; values go as soon as nothing reads them any more."""
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
    """Height and width after sliding a window."""
    require(math.prod(kernel) <= _MOST_TAPS, "a window of reasonable size")
    sizes = []
    for n, k, s, p, d in zip(shape[1:], kernel, stride, padding, dilation, strict=True):
        require(0 <= p < 2**15 and k < 2**15 and d < 2**15, "a window of reasonable size")
        room = n + 2 * p - d * (k - 1) - 1
        require(room >= 0, "a window that fits the image")
        size = (room + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (size - 1) * s >= n + p:
            size -= 1  # a window must begin inside the image
        sizes.append(size)
    return sizes[0], sizes[1]
