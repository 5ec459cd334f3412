"""A whole program as one CUDA graph.

At batch size 1, launching the kernels takes longer than running them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from .program import IntegerProgram

__all__ = ["CapturedProgram", "capture"]

#: Calls before the capture, in which torch initialises its state and allocates memory.
_WARM_UP = 2


class CapturedProgram:
    """A program that runs as a CUDA graph, for images of one shape and dtype; see `capture`.

    All calls use the same memory, so they must follow one another on one stream.
    """

    def __init__(self, program: IntegerProgram, example: Tensor) -> None:
        self._program = program.on_device(example.device)  # keeps the weights alive
        self._images = example.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(example.device), torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._program(self._images)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph, stream=stream):
                self._logits = self._program(self._images)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the program's logits, float32 ``[N, K]``.

        Raises:
            UsageError: If the images differ from the example in shape, dtype or device.
        """
        for what, got, expected in (
            ("shape", list(images.shape), list(self._images.shape)),
            ("dtype", images.dtype, self._images.dtype),
            ("device", images.device, self._images.device),
        ):
            if got != expected:
                raise UsageError(
                    f"CapturedProgram: expected images of {what} {expected}, as captured, got {got}"
                )
        with torch.cuda.device(images.device):
            self._images.copy_(images)
            self._graph.replay()
            return self._logits.clone()


def capture(program: IntegerProgram, example: Tensor) -> CapturedProgram:
    """Capture a program in a CUDA graph.

    Args:
        program: Program to capture.
        example: Images ``[N, C, H, W]`` on a CUDA device, float32 or uint8. Every call takes
            images of this shape, dtype and device.

    Returns:
        A function from images to the program's logits.

    Raises:
        UsageError: If ``example`` is not on a CUDA device, or the program does not take it.
    """
    program.check_images(example)
    if not example.is_cuda:
        raise UsageError(
            f"capture: expected example on a CUDA device, got {example.device}; on the CPU, "
            "call the program itself"
        )
    return CapturedProgram(program, example)
