"""A program as a CUDA device runs it: layers by `int4_conv2d`, the rest by torch's operators.

Nothing waits for the device and nothing is copied to it, so that a CUDA graph can capture a whole
program (`deploy/graph.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import int4_conv2d, int4_pack_weight
from .instructions import Instruction, Layer, Quantize, Value, run_instructions

__all__ = ["DeviceProgram"]


class DeviceProgram:
    """What `IntegerProgram` runs on a CUDA device; on a CPU it computes the same.

    Args:
        image: The input.
        instructions: Checked, in order.
        tensors: Their weights, scales and shifts.
        normalise: From uint8 images to normalised float32, on the CPU; or None.
        device: Where it will run.
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
        of_bytes: list[Instruction] = []  # the same for uint8 images
        for step in instructions:
            name = step.output.name
            known[name] = step.output
            plain = {n: tensors[n] for n in tensors if n.rpartition(".")[0] == name}
            if isinstance(step, Layer):
                self._tensors |= _packed(step, known[step.inputs[0]], plain, device)
                step = _KernelLayer(step.inputs, step.output, step, _geometry(step, plain))
            else:
                self._tensors |= {n: tensor.to(device) for n, tensor in plain.items()}
            steps.append(step)
            if isinstance(step, Quantize) and normalise is not None:
                self._tensors |= _table(step, normalise, device)
                step = _LookUp(step.inputs, step.output)
            of_bytes.append(step)
        self._steps = {torch.float32: steps, torch.uint8: of_bytes}

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of float32 or uint8 images ``[N, C, H, W]``."""
        return run_instructions(self._image, self._steps[images.dtype], self._tensors, images)


def _geometry(layer: Layer, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    return layer.geometry(tensors[f"{layer.output.name}.weight"])


def _packed(
    layer: Layer, source: Value, tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """What the kernel reads, on its device."""
    name, grid = layer.output.name, source.grid
    assert grid is not None
    weight = tensors[f"{name}.weight"].to(device)
    planes = weight.view(*weight.shape, *(1,) * (4 - weight.dim())).movedim(1, -1).contiguous()
    total = grid.zero_point * weight.flatten(1).to(torch.int64).sum(1)
    parts = {
        part: tensors[f"{name}.{part}"].to(device).expand(len(weight)).contiguous()
        for part in ("scale", "shift")
    }
    return {
        f"{name}.packed": int4_pack_weight(planes, layer.groups_()),
        f"{name}.correction": total.to(torch.int32),
        f"{name}.scale": parts["scale"],
        f"{name}.shift": parts["shift"],
    }


def _table(
    step: Quantize, normalise: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, Tensor]:
    """The code of every channel's every byte, made on the CPU: devices divide in other ways."""
    assert step.output.grid is not None
    channels = step.output.shape[0]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, channels, 1, 256)
    rows = 256 * torch.arange(channels, dtype=torch.int32)
    return {
        f"{step.output.name}.table": step.output.grid.quantize(normalise(every))
        .flatten()
        .to(device),
        f"{step.output.name}.rows": rows.to(device),
    }


@dataclass(frozen=True)
class _LookUp(Instruction):
    """Codes of bytes."""

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        table, rows = (tensors[f"{self.output.name}.{part}"] for part in ("table", "rows"))
        pixels = x[0].permute(0, 2, 3, 1)
        places = (pixels.to(torch.int32) + rows).flatten()
        return table.index_select(0, places).view(pixels.shape).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _KernelLayer(Instruction):
    """A layer by its kernel."""

    layer: Layer
    geometry: dict[str, tuple[int, int]]

    def run(
        self, inputs: Sequence[Value], x: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> Tensor:
        layer, name = self.layer, self.output.name
        source, out = inputs[0].grid, self.output.grid
        assert source is not None
        options: dict[str, float] = {}
        if len(inputs) == 2 and inputs[1].grid is not None:
            options["residual_scale"] = inputs[1].grid.scale
            options["residual_zero_point"] = inputs[1].grid.zero_point
        if layer.low is not None:
            options["low"] = layer.low
        if layer.high is not None:
            options["high"] = layer.high
        if out is not None:
            options |= {"out_scale": out.scale, "out_zero_point": out.zero_point}
            options["out_bits"] = out.bits
        packed, scale, shift, correction = (
            tensors[f"{name}.{part}"] for part in ("packed", "scale", "shift", "correction")
        )
        y = int4_conv2d(
            _pixels(x[0]), packed, scale, shift, correction,
            **self.geometry,  # type: ignore[arg-type]
            groups=layer.groups_(),
            zero_point=source.zero_point,
            bits=source.bits,
            residual=_pixels(x[1]) if len(x) == 2 else None,
            **options,  # type: ignore[arg-type]
        ).permute(0, 3, 1, 2)  # fmt: skip
        return y if len(self.output.shape) == 3 else y.flatten(1)


def _pixels(x: Tensor) -> Tensor:
    """``[N, C, H, W]``, best in channels_last, or ``[N, C]``, as ``[N, H, W, C]``."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x[:, None, None]
