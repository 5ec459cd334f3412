"""The integer program: a module that runs a checked list of instructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C
from ..errors import UsageError
from .device import DeviceProgram
from .instructions import (
    Instruction,
    Value,
    check_step,
    check_value,
    require,
    run_instructions,
)
from .native import NativeProgram

__all__ = ["IntegerProgram"]


class IntegerProgram(nn.Module):
    """A network in integer arithmetic, from images to logits.

    Attributes:
        image: Input value: normalised float32 ``(C, H, W)``.
        mean, std: Normalisation per channel, which the program applies to uint8 images; None if
            unknown.
        instructions: Instructions in execution order. The last one computes the logits.
        tensors: Tensors of the instructions by name.

    Raises:
        UsageError: If the instructions do not fit together.
    """

    def __init__(
        self,
        image: Value,
        instructions: Sequence[Instruction],
        tensors: Mapping[str, Tensor],
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.image = image
        self.instructions = tuple(instructions)
        self.mean, self.std = mean, std
        self._check(tensors)
        self._buffer_names = {name: f"tensor{i}" for i, name in enumerate(tensors)}
        for name, tensor in tensors.items():
            self.register_buffer(self._buffer_names[name], tensor)
        self._native: NativeProgram | None = None
        self._on_device: dict[torch.device, DeviceProgram] = {}
        self.requires_grad_(False).eval()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights, scales and shifts of the instructions by name."""
        return {name: self.get_buffer(self._buffer_names[name]) for name in self._buffer_names}

    @property
    def output(self) -> Value:
        """Value of the logits."""
        return self.instructions[-1].output

    def float_values(self) -> list[Value]:
        """Return the float32 values between image and logits, such as shortcuts."""
        made = [i.output for i in self.instructions[:-1]]
        return [value for value in made if value.grid is None]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, float32 ``[N, K]``.

        Args:
            images: Normalised float32 images ``[N, C, H, W]``, or raw uint8 images.

        Raises:
            UsageError: If shape or dtype is wrong, or uint8 images come without ``mean`` and
                ``std``.
        """
        self.check_images(images)
        if images.is_cpu:
            return self.native(images)
        if images.is_cuda and _C.cuda_archs:
            return self.on_device(images.device)(images)
        return self.by_instructions(images)

    def check_images(self, images: Tensor) -> None:
        """Check that `forward` takes ``images``.

        Raises:
            UsageError: If it does not.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image.shape:
            expected = ", ".join(map(str, self.image.shape))
            raise UsageError(
                f"IntegerProgram: expected images [N, {expected}], got {list(images.shape)}"
            )
        self._check_dtype(images)

    @property
    def native(self) -> NativeProgram:
        """Form of the program that runs on the CPU."""
        if self._native is None:
            tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}
            self._native = NativeProgram(self.image, self.instructions, tensors, self._normaliser)
        return self._native

    def on_device(self, device: torch.device) -> DeviceProgram:
        """Form of the program that runs on a CUDA device."""
        if device not in self._on_device:
            self._on_device[device] = DeviceProgram(
                self.image, self.instructions, self.tensors, self._normaliser, device
            )
        return self._on_device[device]

    def __getstate__(self) -> dict[str, Any]:
        # Both are rebuilt on demand.
        return {**super().__getstate__(), "_native": None, "_on_device": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerProgram:
        """Move tensors between devices, but keep dtypes: ``half()`` changes nothing."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def by_instructions(self, images: Tensor) -> Tensor:
        """Compute bit-identical logits with torch's own operators."""
        return run_instructions(self.image, self.instructions, self.tensors, self.normalise(images))

    def _check_dtype(self, images: Tensor) -> None:
        if images.dtype not in (torch.float32, torch.uint8):
            raise UsageError(
                f"IntegerProgram: expected images in float32 or uint8, got {images.dtype}"
            )
        if images.dtype == torch.uint8 and (self.mean is None or self.std is None):
            raise UsageError(
                "IntegerProgram: expected normalised float32 images (mean and std are unknown), "
                "got uint8"
            )

    @property
    def _normaliser(self) -> Callable[[Tensor], Tensor] | None:
        return self.normalise if self.mean is not None and self.std is not None else None

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise uint8 images to float32; return float32 images unchanged."""
        if images.dtype == torch.float32:
            return images
        mean, std = (
            torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        return (images.to(torch.float32) / 255 - mean) / std

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        try:
            check_value(self.image)
            require(self.image.grid is None and len(self.image.shape) == 3, "float32 [C, H, W]")
            for values in (self.mean, self.std):
                fits = values is None or len(values) == self.image.shape[0]
                require(fits, "one mean and one std per channel")
            require(self.std is None or 0 not in self.std, "no std of 0")
            require(bool(self.instructions), "at least one instruction")
        except ValueError as error:
            raise UsageError(f"IntegerProgram: expected image to have {error}") from None
        known = {self.image.name: self.image}
        for step in self.instructions:
            try:
                check_step(step, known, self.image, tensors)
            except ValueError as error:
                raise UsageError(
                    f"IntegerProgram: expected {type(step).__name__} {step.output.name} to have "
                    f"{error}"
                ) from None
            known[step.output.name] = step.output
        if self.output.grid is not None:
            raise UsageError(
                "IntegerProgram: expected logits in float32, "
                f"got codes of {self.output.grid.bits} bits"
            )
