"""What the op modules share: loading the operators and turning their errors into UsageError."""

from collections.abc import Callable
from typing import Any

import torch
from torch import library

from fdda_ext import _C
from fdda_ext.errors import UsageError

__all__ = [
    "autograd_function",
    "call_backward",
    "check_one_device",
    "refuse_double_backward",
    "usage_error",
]


def autograd_function(
    op: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The op's autograd, from the arguments of register_autograd, with a third of its overhead."""

    class OpFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

    OpFunction.backward = staticmethod(backward)  # type: ignore[method-assign]
    return OpFunction


def call_backward(op: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a private backward op, past autograd unless it is to be differentiated again.

    Under create_graph the call goes through autograd, which refuses in words.
    """
    if torch.is_grad_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def usage_error(error: Exception, op: str, x: torch.Tensor) -> UsageError:
    """The UsageError that stands for an exception of the native op.

    Args:
        error: a ValueError of the argument checks, whose message is complete, or a
            NotImplementedError of the dispatcher, which knows no kernel for x's device.
        op: the op's name.
        x: the argument that decided about the device.
    """
    if isinstance(error, ValueError):
        return UsageError(str(error))
    if x.device.type == "cuda" and not _C.cuda_archs:
        return UsageError(
            f"{op}: expected x to be on the CPU, as this build of fdda_ext has no CUDA kernels, "
            f"got {x.device}; reinstall it where nvcc is found, or with FDDA_CUDA=1"
        )
    return UsageError(
        f"{op}: expected x to be dense on the CPU or a CUDA device, got {x.layout} on {x.device}"
    )


def check_one_device(op: str, *tensors: torch.Tensor) -> None:
    """For fake kernels: one argument on "meta" would make them answer for real ones besides.

    Raises:
        UsageError: If the tensors lie on different devices.
    """
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            raise UsageError(
                f"{op}: expected all tensors on one device, "
                f"got {tensors[0].device} and {tensor.device}"
            )


def refuse_double_backward(op: str) -> None:
    """Attaches an autograd formula to the private op `_<op>_backward` that refuses in words."""

    def backward(ctx: object, *grads: object) -> None:
        raise NotImplementedError(
            f"{op}: double backward is not supported; its backward is not differentiable "
            "(call backward or grad without create_graph=True)"
        )

    library.register_autograd(f"fdda::_{op}_backward", backward)
