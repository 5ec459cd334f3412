"""The form of a program that the CPU runs, in one call.

`_Encoder` writes the records that csrc/cpu/int4_program_cpu.cpp reads, and one tensor with all
weights in the layouts of the kernels. Values share a workspace. The memory of a value is
reused after its last use.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor

from .. import _C
from ..errors import UsageError
from ..ops import int4_pack_weight
from .instructions import (
    AveragePool,
    CodeGrid,
    Compute,
    Concat,
    Conv,
    Instruction,
    Layer,
    MaxPool,
    Pad,
    Quantize,
    Rescale,
    Reshape,
    Value,
)

__all__ = ["NativeProgram", "StepTime"]

_run = torch.ops.fdda._int4_program.default

#: Outputs per panel and bytes per cache line, to which parameters and memory are padded.
_PANEL, _LINE = 16, 64
#: Bits of codes that fit a byte after Winograd's transform.
_WINOGRAD_BITS = 5
#: Largest batch for which a plan is measured; larger batches use the plan of this size.
_MEASURED_IMAGES = 16
#: Largest workspace, in bytes, that is kept from call to call.
_KEPT_BYTES = 64 * 2**20
_ROUNDS = 3


class _Kind(IntEnum):
    QUANTIZE, LOOK_UP, CONV, ADD_POOL, MAX_POOL, RESCALE, REORDER, COPY = range(8)


@dataclass(frozen=True)
class _Step:
    """The fields of a StepRecord of int4_program_cpu.cpp."""

    kind: _Kind
    source: int
    target: int
    residual: int = -1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    weight: int = 0
    winograd_weight: int | None = None
    parameters: int = 0
    zero_point: int = 0
    bits: int = 8
    channel: int = 0
    low: float = -float("inf")
    high: float = float("inf")
    residual_grid: CodeGrid | None = None
    grid: CodeGrid | None = None

    def pack(self, winograd: bool) -> bytes:
        integers = [self.kind, self.source, self.residual, self.target]
        integers += [*self.kernel, *self.stride, *self.padding, *self.dilation, self.groups]
        weight = self.winograd_weight if winograd else self.weight
        assert weight is not None
        integers += [winograd, weight, self.parameters, self.zero_point, self.bits]
        integers += [self.channel]
        residual = self.residual_grid or CodeGrid(1.0, 0, 8)
        grid = self.grid or CodeGrid(1.0, 0, 8)
        floats = [self.low, self.high, residual.scale, residual.zero_point]
        floats += [grid.scale, grid.zero_point, grid.quant_max]
        return struct.pack(f"={len(integers)}q{len(floats)}d", *integers, *floats)


@dataclass(frozen=True)
class StepTime:
    """Cost of one record.

    Attributes:
        name: Name of the value that the record computes.
        algorithm: Name of the algorithm.
        products: Multiplications of the direct algorithm, for all images.
        seconds: Run time.
    """

    name: str
    algorithm: str
    products: int
    seconds: float


class NativeProgram:
    """The form of an `IntegerProgram` that runs on the CPU.

    Args:
        image: Input value.
        instructions: Checked instructions in execution order.
        tensors: Weights, scales and shifts of the instructions.
        normalise: Function from uint8 images to normalised float32, or None.
    """

    def __init__(
        self,
        image: Value,
        instructions: Sequence[Instruction],
        tensors: Mapping[str, Tensor],
        normalise: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._memory = _Constants()
        self._values: list[tuple[int, int, int, int, int]] = []
        self._steps: list[_Step] = []
        self._of_bytes: list[_Step] = []  # the same for uint8 images
        self._names: list[str] = []
        self._products: list[int] = []  # per image
        encoder = _Encoder(self, image, instructions, tensors, normalise)
        self._result, self._bytes_per_image = encoder.encode()
        self._is_flat = len(instructions[-1].output.shape) == 1
        self.constants = self._memory.tensor()
        self._plans: dict[tuple[int, int, str], tuple[bool, ...]] = {}
        self._records: dict[tuple[torch.dtype, tuple[bool, ...]], Tensor] = {}
        self._local = threading.local()

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of float32 or uint8 images ``[N, C, H, W]``."""
        if torch.compiler.is_compiling():
            # The program is one operator and measures times, so torch.compile skips it. A decorator
            # would import torch's compiler, which delays every command by seconds.
            return torch.compiler.disable(self._call)(images)
        return self._call(images)

    def _call(self, images: Tensor) -> Tensor:
        return self.run(images, self.plan(images))

    def run(self, images: Tensor, plan: tuple[bool, ...], times: Tensor | None = None) -> Tensor:
        """Run a plan; ``times``, int64 ``[steps]``, gets the nanoseconds of every record."""
        records = self.records(images.dtype, plan)
        workspace = self.workspace(len(images))
        result: Tensor = _run(images, self.constants, records, workspace, times)
        return result.flatten(1) if self._is_flat else result.permute(0, 3, 1, 2)

    def profile(self, images: Tensor, rounds: int = 9) -> list[StepTime]:
        """Measure the median time of every record over ``rounds`` calls."""
        plan = self.plan(images)
        times = torch.zeros(rounds, len(self._steps), dtype=torch.int64)
        for times_of_run in times:
            self.run(images, plan, times_of_run)
        return [
            StepTime(name, _algorithm(step, chosen), len(images) * products, seconds)
            for name, step, chosen, products, seconds in zip(
                self._names, self._steps, plan, self._products,
                (times.median(0).values / 1e9).tolist(), strict=True,
            )
        ]  # fmt: skip

    def eligible(self) -> tuple[bool, ...]:
        """Whether Winograd's algorithm can run each record."""
        return tuple(step.winograd_weight is not None for step in self._steps)

    def plan(self, images: Tensor) -> tuple[bool, ...]:
        """Choose Winograd's algorithm for the records where it measures faster."""
        eligible = self.eligible()
        images = images[:_MEASURED_IMAGES]
        if not any(eligible) or len(images) == 0:
            return tuple(False for _ in eligible)
        key = (len(images), torch.get_num_threads(), _C.isa())
        if key not in self._plans:
            direct = self._measure(images, tuple(False for _ in eligible))
            faster = (self._measure(images, eligible) < direct).tolist()
            self._plans[key] = tuple(a and b for a, b in zip(eligible, faster, strict=True))
        return self._plans[key]

    def _measure(self, images: Tensor, plan: tuple[bool, ...]) -> Tensor:
        """Shortest time of every record over a few calls, in nanoseconds."""
        times = torch.zeros(_ROUNDS, len(self._steps), dtype=torch.int64)
        for times_of_run in times:
            self.run(images, plan, times_of_run)
        return times.amin(0)

    def workspace(self, images: int) -> Tensor:
        """Memory for the values of a batch; each thread has its own."""
        size = images * self._bytes_per_image + _LINE
        kept: Tensor | None = getattr(self._local, "workspace", None)
        if kept is not None and kept.numel() >= size:
            return kept
        workspace = torch.empty(size, dtype=torch.uint8)
        if size <= _KEPT_BYTES:
            self._local.workspace = workspace
        return workspace

    def records(self, dtype: torch.dtype, plan: tuple[bool, ...]) -> Tensor:
        """The int64 records of int4_program_cpu.cpp for images of a dtype."""
        key = (dtype, plan)
        if key not in self._records:
            steps = self._of_bytes if dtype == torch.uint8 else self._steps
            words = [struct.pack("=3q", len(self._values), len(steps), self._result)]
            words += [struct.pack("=5q", *value) for value in self._values]
            words += [step.pack(chosen) for step, chosen in zip(steps, plan, strict=True)]
            data = torch.frombuffer(bytearray(b"".join(words)), dtype=torch.int64)
            self._records[key] = data.clone()
        return self._records[key]


class _Constants:
    """Tensors in one block of memory, each aligned to a cache line."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._size = 0

    def add(self, tensor: Tensor) -> int:
        """Append a tensor and return its offset in bytes."""
        data = tensor.contiguous().flatten().view(torch.uint8)
        offset = self._size
        padded = _lines(data.numel())
        self._parts.append(data)
        if padded > data.numel():
            self._parts.append(data.new_zeros(padded - data.numel()))
        self._size += padded
        return offset

    def tensor(self) -> Tensor:
        # The kernels may read one cache line past the end of a tensor.
        result = torch.empty(self._size + _LINE, dtype=torch.uint8)
        result[self._size :] = 0
        offset = 0
        self._parts.reverse()
        while self._parts:  # frees each part after its copy
            part = self._parts.pop()
            result[offset : offset + part.numel()] = part
            offset += part.numel()
        return result


@dataclass
class _Encoder:
    program: NativeProgram
    image: Value
    instructions: Sequence[Instruction]
    tensors: Mapping[str, Tensor]
    normalise: Callable[[Tensor], Tensor] | None
    slots: dict[str, int] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    #: Offset and size per image of the values that are still to be read, by slot.
    living: dict[int, tuple[int, int]] = field(default_factory=dict)
    size: int = 0

    def encode(self) -> tuple[int, int]:
        """Encode all; return the slot of the logits and the workspace bytes per image."""
        self.values[self.image.name] = self.image
        self.slots[self.image.name] = -1
        last_read = {
            name: i for i, step in enumerate(self.instructions) for name in step.inputs
        } | {self.instructions[-1].output.name: len(self.instructions)}
        for i, step in enumerate(self.instructions):
            self._encode(step)
            self.values[step.output.name] = step.output
            reads = {
                self.slots[name]
                for name, last in last_read.items()
                if last > i and name in self.slots
            }
            self.living = {slot: place for slot, place in self.living.items() if slot in reads}
        return self.slots[self.instructions[-1].output.name], self.size

    def _allocate(self, shape: tuple[int, ...], grid: CodeGrid | None) -> int:
        """Give a value a new slot at the lowest free offset."""
        channels, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
        element = 4 if grid is None else 1
        size = _lines(channels * height * width * element)
        offset = 0
        for taken, length in sorted(self.living.values()):
            if offset + size <= taken:
                break
            offset = max(offset, taken + length)
        slot = len(self.program._values)
        self.program._values.append((offset, height, width, channels, element))
        self.living[slot] = (offset, size)
        self.size = max(self.size, offset + size)
        return slot

    def _emit(
        self, name: str, step: _Step, of_bytes: _Step | None = None, products: int = 0
    ) -> None:
        self.program._names.append(name)
        self.program._products.append(products)
        self.program._steps.append(step)
        self.program._of_bytes.append(of_bytes or step)

    def _encode(self, step: Instruction) -> None:
        sources = [self.values[name] for name in step.inputs]
        slots = [self.slots[name] for name in step.inputs]
        name = step.output.name
        if isinstance(step, Reshape) and _is_same_order(sources[0].shape, step.output.shape):
            self._rename(slots[0], step.output)
            return
        if isinstance(step, MaxPool):
            slots[0], sources[0] = self._extended(step, slots[0], sources[0])
        target = self._allocate(step.output.shape, step.output.grid)
        self.slots[name] = target
        if isinstance(step, Quantize):
            self._quantize(step, target)
        elif isinstance(step, Compute):
            self._compute(step, sources, slots, target)
        elif isinstance(step, MaxPool):
            channels = step.output.shape[0]
            self._emit(
                name,
                _Step(
                    _Kind.MAX_POOL, slots[0], target, kernel=step.kernel, stride=step.stride,
                    padding=step.padding, dilation=step.dilation, groups=channels,
                ),
            )  # fmt: skip
        elif isinstance(step, Reshape):
            self._emit(name, _Step(_Kind.REORDER, slots[0], target))
        elif isinstance(step, Pad):
            zero = sources[0].grid.zero_point if sources[0].grid else 0
            padding = (step.top, step.left)
            self._emit(name, _Step(_Kind.COPY, slots[0], target, padding=padding, zero_point=zero))
        elif isinstance(step, Concat):
            channel = 0
            for slot, source in zip(slots, sources, strict=True):
                self._emit(name, _Step(_Kind.COPY, slot, target, channel=channel))
                channel += source.shape[0]
        else:
            raise NotImplementedError(type(step).__name__)

    def _rename(self, slot: int, output: Value) -> None:
        offset, height, width, channels, element = self.program._values[slot]
        channels, height, width = (*output.shape, 1, 1)[:3]
        again = len(self.program._values)
        self.program._values.append((offset, height, width, channels, element))
        self.living[again] = self.living[slot]
        self.slots[output.name] = again

    def _quantize(self, step: Quantize, target: int) -> None:
        grid = step.output.grid
        assert grid is not None
        quantize = _Step(_Kind.QUANTIZE, -1, target, grid=grid)
        of_bytes = None
        if self.normalise is not None:
            pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256)
            every = pixels.expand(1, step.output.shape[0], 1, 256)
            table = self.program._memory.add(grid.quantize(self.normalise(every)))
            of_bytes = replace(quantize, kind=_Kind.LOOK_UP, parameters=table)
        self._emit(step.output.name, quantize, of_bytes)

    def _compute(
        self, step: Compute, sources: Sequence[Value], slots: Sequence[int], target: int
    ) -> None:
        name, channels = step.output.name, step.output.shape[0]
        grid = sources[0].grid
        zero_point = 0 if grid is None else grid.zero_point
        common = _Step(
            _Kind.RESCALE,
            slots[0],
            target,
            residual=slots[1] if len(slots) == 2 else -1,
            residual_grid=sources[1].grid if len(sources) == 2 else None,
            zero_point=zero_point,
            bits=8 if grid is None else grid.bits,
            grid=step.output.grid,
            low=-float("inf") if step.low is None else step.low,
            high=float("inf") if step.high is None else step.high,
        )
        correction = torch.full((channels,), zero_point, dtype=torch.int64)
        if isinstance(step, Layer):
            weight = self.tensors[f"{name}.weight"]
            correction = zero_point * weight.flatten(1).sum(1, dtype=torch.int64)
            common = self._layer(step, weight, sources[0], common)
        elif isinstance(step, AveragePool):
            correction *= step.kernel[0] * step.kernel[1]
            common = replace(
                common,
                kind=_Kind.ADD_POOL,
                kernel=step.kernel,
                stride=step.stride,
                groups=channels,
            )
        else:
            assert isinstance(step, Rescale)
        scale, shift = (
            self.tensors[f"{name}.{part}"].expand(channels) for part in ("scale", "shift")
        )
        parts = [
            torch.nn.functional.pad(part, (0, -channels % _PANEL)).view(torch.uint8)
            for part in (scale.contiguous(), shift.contiguous(), correction.to(torch.int32))
        ]
        products = 0
        if isinstance(step, Layer):
            products = self.tensors[f"{name}.weight"][0].numel() * math.prod(step.output.shape)
        parameters = self.program._memory.add(torch.cat(parts))
        self._emit(name, replace(common, parameters=parameters), products=products)

    def _layer(self, step: Layer, weight: Tensor, source: Value, common: _Step) -> _Step:
        """Pack the weight for one or both algorithms and complete the record."""
        planes = weight.view(*weight.shape, *(1,) * (4 - weight.dim())).movedim(1, -1).contiguous()
        groups = step.groups_()
        winograd = None
        if _suits_winograd(step, source, planes):
            try:
                winograd = self.program._memory.add(int4_pack_weight(planes, 1, winograd=True))
            except UsageError:  # transformed weights exceed a byte, such as 5-bit weights
                winograd = None
        return replace(
            common,
            kind=_Kind.CONV,
            groups=groups,
            weight=self.program._memory.add(int4_pack_weight(planes, groups)),
            winograd_weight=winograd,
            **step.geometry(weight),  # type: ignore[arg-type]
        )

    def _extended(self, step: MaxPool, slot: int, source: Value) -> tuple[int, Value]:
        """Add the rows and columns of ceil_mode, with code 0, which never exceeds a maximum."""
        below, right = (
            max(0, (size - 1) * s + d * (k - 1) + 1 - n - 2 * p)
            for size, s, d, k, n, p in zip(
                step.output.shape[1:], step.stride, step.dilation, step.kernel, source.shape[1:],
                step.padding, strict=True,
            )
        )  # fmt: skip
        if source.grid is None or not (below or right):
            return slot, source
        channels, height, width = source.shape
        larger = replace(source, shape=(channels, height + below, width + right))
        target = self._allocate(larger.shape, larger.grid)
        self._emit(step.output.name, _Step(_Kind.COPY, slot, target))
        return target, larger


def _algorithm(step: _Step, winograd: bool) -> str:
    if step.kind is not _Kind.CONV:
        return step.kind.name.lower().replace("_", " ")
    if step.groups > 1:
        return f"{step.groups} groups"
    return "winograd" if winograd else "direct"


def _suits_winograd(step: Layer, source: Value, planes: Tensor) -> bool:
    return (
        isinstance(step, Conv)
        and tuple(planes.shape[1:3]) == (3, 3)
        and step.stride == step.dilation == (1, 1)
        and step.groups == 1
        and source.grid is not None
        and source.grid.bits <= _WINOGRAD_BITS
    )


def _is_same_order(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes have the same order of values in NHWC memory."""
    return a == b or (a[0] == b[0] and all(size == 1 for size in (*a[1:], *b[1:])))


def _lines(size: int) -> int:
    return -(-size // _LINE) * _LINE
