"""The integer program: instructions that fit together, as a module."""

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
    """A network in integers, from images to logits.

    Attributes:
        image: The input: float32 ``(C, H, W)``, normalised.
        mean, std: Of the normalisation, which uint8 images get here; None if unknown.
        instructions: In an order in which every value is made before it is read. The last one makes
            the logits.
        tensors: Of the instructions, by name.

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
        """Weights, scales and shifts by name."""
        return {name: self.get_buffer(self._buffer_names[name]) for name in self._buffer_names}

    @property
    def output(self) -> Value:
        """The logits."""
        return self.instructions[-1].output

    def float_values(self) -> list[Value]:
        """What is not in integers, apart from image and logits: shortcuts that are added."""
        made = [i.output for i in self.instructions[:-1]]
        return [value for value in made if value.grid is None]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 ``[N, K]``.

        Args:
            images: float32 ``[N, C, H, W]``, normalised; or uint8, which are normalised here.

        Raises:
            UsageError: If the images have another shape or dtype, or the program cannot normalise.
        """
        self.check_images(images)
        if images.is_cpu:
            return self.native(images)
        if images.is_cuda and _C.cuda_archs:
            return self.on_device(images.device)(images)
        return self.by_instructions(images)

    def check_images(self, images: Tensor) -> None:
        """Whether `forward` takes them.

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
        """The form that runs on the CPU."""
        if self._native is None:
            tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}
            self._native = NativeProgram(self.image, self.instructions, tensors, self._normaliser)
        return self._native

    def on_device(self, device: torch.device) -> DeviceProgram:
        """The form that runs on a CUDA device."""
        if device not in self._on_device:
            self._on_device[device] = DeviceProgram(
                self.image, self.instructions, self.tensors, self._normaliser, device
            )
        return self._on_device[device]

    def __getstate__(self) -> dict[str, Any]:
        # Made again where they are needed.
        return {**super().__getstate__(), "_native": None, "_on_device": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerProgram:
        """To another device, but never to another dtype: ``half()`` changes nothing."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def by_instructions(self, images: Tensor) -> Tensor:
        """The same logits, to the bit, by torch's own operators."""
        return run_instructions(self.image, self.instructions, self.tensors, self.normalise(images))

    def _check_dtype(self, images: Tensor) -> None:
        if images.dtype not in (torch.float32, torch.uint8):
            raise UsageError(
                f"IntegerProgram: expected images in float32 or uint8, got {images.dtype}"
            )
        if images.dtype == torch.uint8 and (self.mean is None or self.std is None):
            raise UsageError(
                "IntegerProgram: expected normalised float32 images, as mean and std are unknown, "
                "got uint8"
            )

    @property
    def _normaliser(self) -> Callable[[Tensor], Tensor] | None:
        return self.normalise if self.mean is not None and self.std is not None else None

    def normalise(self, images: Tensor) -> Tensor:
        """Float32 images: uint8 ones normalised by `mean` and `std`, float32 ones as they are."""
        if images.dtype == torch.float32:
            return images
        mean, std = (
            torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        return (images.to(torch.float32) / 255 - mean) / std

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        try:
            check_value(self.image)
            require(self.image.grid is None and len(self.image.shape) == 3, "floats [C, H, W]")
            for values in (self.mean, self.std):
                fits = values is None or len(values) == self.image.shape[0]
                require(fits, "as many means and deviations as channels")
            require(self.std is None or 0 not in self.std, "deviations other than 0")
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
