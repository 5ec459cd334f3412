"""Steps on a GPU as CUDA graphs: the host launches one graph instead of hundreds of kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from ..errors import UsageError
from .memory import is_out_of_memory
from .profiling import is_profiling

__all__ = ["Replayed"]

#: Ordinary calls before the capture: what libraries set up at first use must not be part of it.
_ORDINARY = 3


class Replayed:
    """Forward and backward pass of a step, captured once as a CUDA graph and replayed since.

    A replay runs the kernels of the captured call on the same memory. So all that the step reads
    besides its inputs (weights, running statistics) may be changed in place only, and no decision
    of the host may depend on values; random numbers of ``random`` go on as they would without.

    Args:
        parameters: Whose gradients the step leaves.
        random: What it draws from, if anything.
    """

    def __init__(self, parameters: Iterable[Tensor], random: torch.Generator | None = None) -> None:
        self._parameters = list(parameters)
        self._random = random
        self._key: Hashable = None
        self._ordinary = 0  # calls since the key changed
        self._graph: torch.cuda.CUDAGraph | None = None
        # Of the captured step, all in the graph's memory.
        self._inputs: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}
        self._gradients: list[Tensor | None] = []

    def __call__(
        self, step: Callable[..., dict[str, Tensor]], *inputs: Tensor, key: Hashable = None
    ) -> dict[str, Tensor]:
        """``step(*inputs)``.

        Args:
            step: Returns named tensors without gradient.
            inputs: What it is called with, on the GPU.
            key: What the host decides in it: with another key, or inputs of other shapes, the step
                is another one and captured anew.

        Raises:
            UsageError: If the step cannot be captured.
        """
        if is_profiling():  # which waits for the device after every stage
            return step(*inputs)
        key = (key, *((x.shape, x.dtype) for x in inputs))
        if key != self._key:
            self._key, self._ordinary = key, 0
            self._graph, self._inputs, self._outputs, self._gradients = None, [], {}, []
        if self._graph is None:
            if self._ordinary < _ORDINARY:
                self._ordinary += 1
                return step(*inputs)
            self._capture(step, inputs)
        assert self._graph is not None
        with torch.cuda.device_of(self._parameters[0]):
            return self._replay(self._graph, inputs)

    def _replay(self, graph: torch.cuda.CUDAGraph, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        graph.replay()
        return {name: tensor.clone() for name, tensor in self._outputs.items()}

    @property
    def is_captured(self) -> bool:
        """Whether the next call is a replay, if it is of the same step."""
        return self._graph is not None

    def _capture(self, step: Callable[..., dict[str, Tensor]], inputs: Iterable[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        if self._random is not None:
            graph.register_generator_state(self._random)
        try:
            # On a stream of this device: torch's own for captures is of the first that had one.
            # Threads that load images may go on using the device meanwhile.
            with (
                torch.cuda.device_of(self._parameters[0]),
                torch.cuda.graph(
                    graph,
                    stream=torch.cuda.Stream(self._parameters[0].device),
                    capture_error_mode="thread_local",
                ),
            ):
                self._outputs = step(*self._inputs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                "train: expected cuda_graphs false with a network that waits for the device or "
                f"copies to it, got true, and a step that no CUDA graph can hold ({reason})"
            ) from error
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._graph = graph
