"""The form of a program that CUDA devices run: kernels, and torch's operators for the rest.

A call neither waits for the device nor copies data to it, so a CUDA graph can capture the whole
program (`deploy/graph.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import int4_conv2d, int4_pack_weight
from .instructions import (
    AveragePool,
    Compute,
    Instruction,
    Layer,
    MaxPool,
    Quantize,
    Rescale,
    Value,
    run_instructions,
)

__all__ = ["DeviceProgram"]

Pair = tuple[int, int]

# Internal operators, whose arguments the program checked when it was built.
_image_op = torch.ops.fdda._int4_image_codes.default
_pool_op = torch.ops.fdda._int4_max_pool.default


class DeviceProgram:
    """The form of an `IntegerProgram` that runs on a CUDA device.

    Args:
        image: Input value.
        instructions: Checked instructions in execution order.
        tensors: Weights, scales and shifts of the instructions.
        normalise: CPU function from uint8 images to normalised float32, or None.
        device: Device that runs the program.
    """

    def __init__(
        self,
        image: Value,
        instructions: Sequence[Instruction],
        tensors: Mapping[str, Tensor],
        normalise: Callable[[Tensor], Tensor] | None,
        device: torch.device,
    ) -> None:
        self._image = image
        self._tensors: dict[str, Tensor] = {}
        known = {image.name: image}
        steps: list[Instruction] = []
        for step in instructions:
            name = step.output.name
            known[name] = step.output
            plain = {n: tensors[n] for n in tensors if n.rpartition(".")[0] == name}
            window = _window(step, known[step.inputs[0]], plain)
            if isinstance(step, Compute) and window is not None:
                self._tensors |= _packed(step, known[step.inputs[0]], window, plain, device)
                step = _KernelLayer(step.inputs, step.output, step, window.groups, window.geometry)
            else:
                self._tensors |= {n: tensor.to(device) for n, tensor in plain.items()}
            if isinstance(step, MaxPool):
                step = _KernelMaxPool(step.inputs, step.output, step)
            if isinstance(step, Quantize):
                assert step.output.grid is not None
                step = _ImageCodes(step.inputs, step.output, step.output.grid.inverse_scale)
                if normalise is not None:
                    self._tensors |= _table(step, normalise, device)
            steps.append(step)
        self._steps = steps

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of float32 or uint8 images ``[N, C, H, W]``."""
        return run_instructions(self._image, self._steps, self._tensors, images)


@dataclass(frozen=True)
class _Window:
    """An integer sum as a convolution."""

    weight: Tensor  # int8 [O, kh, kw, C / groups]
    groups: int
    geometry: dict[str, Pair]


def _window(step: Instruction, source: Value, tensors: Mapping[str, Tensor]) -> _Window | None:
    """Express the integer sum of ``step`` as a convolution, or return None.

    Average pooling and rescaling get weights of 1, so each needs only one kernel launch.
    """
    if isinstance(step, Layer):
        weight = tensors[f"{step.output.name}.weight"]
        planes = weight.view(*weight.shape, *(1,) * (4 - weight.dim())).movedim(1, -1)
        return _Window(planes.contiguous(), step.groups_(), step.geometry(weight))
    channels = source.shape[0]
    if isinstance(step, AveragePool):
        ones = torch.ones(channels, *step.kernel, 1, dtype=torch.int8)
        return _Window(ones, channels, {"kernel": step.kernel, "stride": step.stride})
    if isinstance(step, Rescale) and source.grid is not None:
        ones = torch.ones(channels, 1, 1, 1, dtype=torch.int8)
        return _Window(ones, channels, {"kernel": (1, 1)})
    return None


def _packed(
    step: Compute,
    source: Value,
    window: _Window,
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    name = step.output.name
    assert source.grid is not None
    weight = window.weight.to(device)
    total = source.grid.zero_point * weight.flatten(1).to(torch.int64).sum(1)
    return {
        f"{name}.packed": int4_pack_weight(weight, window.groups),
        f"{name}.correction": total.to(torch.int32),
    } | {
        f"{name}.{part}": tensors[f"{name}.{part}"].to(device).expand(len(weight)).contiguous()
        for part in ("scale", "shift")
    }


def _table(
    step: _ImageCodes, normalise: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, Tensor]:
    # The CPU computes the table, because a division on a device may give other bits.
    assert step.output.grid is not None
    channels = step.output.shape[0]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, channels, 1, 256)
    table = step.output.grid.quantize(normalise(every)).flatten()
    return {f"{step.output.name}.table": table.to(device)}


@dataclass(frozen=True)
class _ImageCodes(Instruction):
    """Quantization of images, by a table if they are uint8."""

    inverse_scale: float

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        grid, images = self.output.grid, x[0]
        assert grid is not None
        table = tensors[f"{self.output.name}.table"] if images.dtype == torch.uint8 else None
        if _has_kernels(images):
            codes = _image_op(images, table, self.inverse_scale, grid.zero_point, grid.quant_max)
            return codes.permute(0, 3, 1, 2)
        if table is None:
            return grid.quantize(images).contiguous(memory_format=torch.channels_last)
        rows = 256 * torch.arange(images.shape[1])
        places = images.permute(0, 2, 3, 1).to(torch.int64) + rows
        return table[places].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _KernelLayer(Instruction):
    """An integer sum and its epilogue, computed by `int4_conv2d`."""

    step: Compute
    groups: int
    geometry: dict[str, Pair]

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        step, name = self.step, self.output.name
        source, out = inputs[0].grid, self.output.grid
        assert source is not None
        options: dict[str, float] = {}
        if len(inputs) == 2 and inputs[1].grid is not None:
            options["residual_scale"] = inputs[1].grid.scale
            options["residual_zero_point"] = inputs[1].grid.zero_point
        if step.low is not None:
            options["low"] = step.low
        if step.high is not None:
            options["high"] = step.high
        if out is not None:
            options |= {"out_scale": out.scale, "out_zero_point": out.zero_point}
            options["out_bits"] = out.bits
        packed, scale, shift, correction = (
            tensors[f"{name}.{part}"] for part in ("packed", "scale", "shift", "correction")
        )
        y = int4_conv2d(
            _pixels(x[0]), packed, scale, shift, correction,
            **self.geometry,  # type: ignore[arg-type]
            groups=self.groups,
            zero_point=source.zero_point,
            bits=source.bits,
            residual=_pixels(x[1]) if len(x) == 2 else None,
            **options,  # type: ignore[arg-type]
        ).permute(0, 3, 1, 2)  # fmt: skip
        return y if len(self.output.shape) == 3 else y.flatten(1)


@dataclass(frozen=True)
class _KernelMaxPool(Instruction):
    step: MaxPool

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        step = self.step
        geometry = (step.kernel, step.stride, step.padding, step.dilation)
        if inputs[0].grid is None:
            return F.max_pool2d(x[0], *geometry, step.ceil_mode)
        if not _has_kernels(x[0]):
            return step.run(inputs, x, tensors)
        largest = _pool_op(_pixels(x[0]), *geometry, self.output.shape[1:])
        return largest.permute(0, 3, 1, 2)


def _has_kernels(x: Tensor) -> bool:
    # On a CPU, only tests run these instructions.
    return x.is_cuda


def _pixels(x: Tensor) -> Tensor:
    """View ``[N, C, H, W]``, preferably in channels_last, or ``[N, C]`` as ``[N, H, W, C]``."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x[:, None, None]
