"""A whole program as one CUDA graph: at batch 1 its launches take longer than its work."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from .program import IntegerProgram

__all__ = ["CapturedProgram", "capture"]

#: Runs before the capture: what torch makes lazily comes to life, and memory is found.
_WARM_UP = 2


class CapturedProgram:
    """Replays a program for images of one shape and dtype; made by `capture`.

    Inputs and results share one piece of memory from call to call, so calls must follow one
    another on one stream.
    """

    def __init__(self, program: IntegerProgram, example: Tensor) -> None:
        self._program = program.on_device(example.device)  # keeps the memory of its weights
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
        """Logits, float32 ``[N, K]``, the same as the program's.

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
    """Captures a program's run on images like `example` in a CUDA graph.

    Args:
        program: Any.
        example: Images ``[N, C, H, W]`` on a CUDA device, float32 or uint8; N is the batch size
            of every call.

    Returns:
        A function of such images that gives the program's logits.

    Raises:
        UsageError: If the example is not on a CUDA device, or not what the program takes.
    """
    program.check_images(example)
    if not example.is_cuda:
        raise UsageError(
            f"capture: expected example on a CUDA device, got {example.device}; programs on the "
            "CPU run in one call already"
        )
    return CapturedProgram(program, example)
