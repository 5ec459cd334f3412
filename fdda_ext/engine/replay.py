"""Steps on a GPU as CUDA graphs. The host launches one graph instead of hundreds of kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from ..errors import UsageError
from .memory import is_out_of_memory
from .profiling import is_profiling

__all__ = ["Replayed"]

#: Ordinary calls before the capture, so that the graph lacks what libraries do at first use.
_ORDINARY = 3


class Replayed:
    """Forward and backward pass of a step, captured once as a CUDA graph and then replayed.

    A replay runs the captured kernels on the same memory. So everything that the step reads besides
    its inputs (weights, running statistics) may only change in place, and decisions of the host
    must not depend on values. Random numbers from ``random`` are the same as without a graph.

    Args:
        parameters: Parameters for which the step computes gradients.
        random: Generator that the step draws from, if any.
    """

    def __init__(self, parameters: Iterable[Tensor], random: torch.Generator | None = None) -> None:
        self._parameters = list(parameters)
        self._random = random
        self._key: Hashable = None
        self._ordinary = 0  # calls since the key changed
        self._graph: torch.cuda.CUDAGraph | None = None
        # Tensors of the captured step, all in the graph's memory.
        self._inputs: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}
        self._gradients: list[Tensor | None] = []

    def __call__(
        self, step: Callable[..., dict[str, Tensor]], *inputs: Tensor, key: Hashable = None
    ) -> dict[str, Tensor]:
        """Return ``step(*inputs)``.

        Args:
            step: Function that returns named tensors without gradients.
            inputs: Arguments of ``step``, on the GPU.
            key: Everything that the host decides. Another key, shape or dtype causes a new capture.

        Raises:
            UsageError: If the step cannot be captured.
        """
        if is_profiling():  # profiling waits for the device after every stage
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
        """Whether the next call of the same step is a replay."""
        return self._graph is not None

    def _capture(self, step: Callable[..., dict[str, Tensor]], inputs: Iterable[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        if self._random is not None:
            graph.register_generator_state(self._random)
        try:
            # torch's default stream for captures is on the first device that captured, so this one
            # gets its own. "thread_local" lets threads that load images use the device meanwhile.
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
                f"copies to it, got true and a step that cannot be captured ({reason})"
            ) from error
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._graph = graph
