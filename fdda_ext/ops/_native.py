"""Helpers of the op modules: autograd functions, device checks and errors."""

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
    """Return an autograd function for an op, with a third of the overhead of register_autograd.

    The arguments are those of torch's ``register_autograd``.
    """

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
    """Call a private backward op without the overhead of autograd.

    Under ``create_graph=True`` the call goes through autograd, which raises a clear error.
    """
    if torch.is_grad_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def usage_error(error: Exception, op: str, x: torch.Tensor) -> UsageError:
    """Return the UsageError for an exception of the native op.

    Args:
        error: ValueError of the argument checks, or NotImplementedError of the dispatcher, which
            found no kernel for the device of x.
        op: Name of the op.
        x: Tensor whose device selected the kernel.
    """
    if isinstance(error, ValueError):
        return UsageError(str(error))
    if x.device.type == "cuda" and not _C.cuda_archs:
        return UsageError(
            f"{op}: expected x on the CPU, because this build of fdda_ext has no CUDA kernels, "
            f"got {x.device}; reinstall it where nvcc is found, or with FDDA_CUDA=1"
        )
    return UsageError(
        f"{op}: expected x to be dense on the CPU or a CUDA device, got {x.layout} on {x.device}"
    )


def check_one_device(op: str, *tensors: torch.Tensor) -> None:
    """Raise UsageError if the tensors are on different devices; for fake kernels.

    If one argument is on "meta", PyTorch calls the fake kernel even if the others are real.
    """
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            raise UsageError(
                f"{op}: expected all tensors on one device, "
                f"got {tensors[0].device} and {tensor.device}"
            )


def refuse_double_backward(op: str) -> None:
    """Give the private op `_<op>_backward` an autograd formula that raises NotImplementedError."""

    def backward(ctx: object, *grads: object) -> None:
        raise NotImplementedError(
            f"{op}: double backward is not supported; "
            "call backward or grad without create_graph=True"
        )

    library.register_autograd(f"fdda::_{op}_backward", backward)
