"""Compare fake_quantize with LSQ+ (eager and compiled), with torch's own operators and, if they are
installed, with NNCF's operator and a CuPy kernel."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fdda_ext.ops import fake_quantize

CASES = {
    "32x256x14x14 per tensor": ((32, 256, 14, 14), None),
    "64x64x56x56 per tensor": ((64, 64, 56, 56), None),
    "512x512x3x3 per channel": ((512, 512, 3, 3), 0),
}
QUANT_MIN, QUANT_MAX = -8, 7


def ours(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    return fake_quantize(x, scale, zero_point, QUANT_MIN, QUANT_MAX, axis)


def eager_lsq(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """LSQ+ as it is usually written, with a straight-through estimator for rounding."""
    if axis is not None:
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    zero_point = zero_point + (zero_point.round() - zero_point).detach()
    inside = torch.clamp(x.float() * (1 / scale) + zero_point, QUANT_MIN, QUANT_MAX)
    code = inside + (inside.round() - inside).detach()
    return ((code - zero_point) * scale).to(x.dtype)


def learnable(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """torch's operator with all three gradients, which differ from LSQ's at the clamping limits."""
    limits = (QUANT_MIN, QUANT_MAX)
    if axis is None:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, *limits)
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, *limits)


def fixed(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """torch's operator without gradients for scale and zero point, which does less work."""
    scale, zero_point = scale.detach(), zero_point.detach().int()
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, QUANT_MIN, QUANT_MAX)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, QUANT_MIN, QUANT_MAX)


def nncf(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """NNCF's operator, whose parameters are the ends of the range."""
    from nncf.torch.quantization.quantize_functions import QuantizeAsymmetric

    if axis is not None:
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    low = (QUANT_MIN - zero_point) * scale
    levels = QUANT_MAX - QUANT_MIN + 1
    return QuantizeAsymmetric.apply(x, low, (levels - 1) * scale, QUANT_MIN, QUANT_MAX, levels)


PEERS: dict[str, Callable[..., Tensor]] = {
    "fdda_ext": ours,
    "eager": eager_lsq,
    "compile": torch.compile(eager_lsq, dynamic=False),
    "torch learnable": learnable,
    "torch fixed": fixed,
}


def cupy_kernel() -> Callable[..., Tensor]:
    """Return the forward pass as one fused CuPy kernel, for a GPU."""
    import cupy

    kernel = cupy.ElementwiseKernel(
        "T x, float32 s, float32 z, float32 low, float32 high",
        "T y",
        "y = (fminf(fmaxf(rintf((float)x * (1.0f / s)) + rintf(z), low), high) - rintf(z)) * s",
        "fake_quantize",
    )

    def function(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        parameters = (cupy.from_dlpack(p.detach().view(shape)) for p in (scale, zero_point))
        y = kernel(cupy.from_dlpack(x.detach()), *parameters, QUANT_MIN, QUANT_MAX)
        return torch.from_dlpack(y)

    return function


if importlib.util.find_spec("nncf"):
    PEERS["nncf"] = nncf


#: torch's own operators take only float32.
DTYPES = {torch.float32: list(PEERS), torch.bfloat16: ["fdda_ext", "eager", "compile"]}
#: Tolerances (rtol, atol): the rounding of one output, and of sums over the whole tensor.
CLOSE = {torch.float32: (1e-3, 1e-2), torch.bfloat16: (2e-2, 1e-1)}


def inputs(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, int | None]:
    shape, axis = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    count = 1 if axis is None else shape[axis]
    scale = torch.full((count,), 0.3, device=device, requires_grad=True)
    zero_point = torch.zeros(count, device=device, requires_grad=True)
    return x, scale, zero_point, axis


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def bench_forward(compare, device, case, dtype):
    arguments = inputs(case, dtype, device)

    def forward(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: function(*arguments))

    peers = {name: forward(PEERS[name]) for name in DTYPES[dtype]}
    if device == "cuda" and dtype is torch.float32 and importlib.util.find_spec("cupy"):
        peers["cupy"] = forward(cupy_kernel())
    for function in peers.values():
        # A value halfway between two codes may be rounded to either.
        differ = (function() - peers["fdda_ext"]()).abs() > 1e-4
        assert differ.float().mean() < 1e-5
    compare(f"fake_quantize forward, {case}, {dtype}", peers, 2 * arguments[0].nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def bench_forward_backward(compare, device, case, dtype):
    *leaves, axis = inputs(case, dtype, device)
    gradient = torch.randn(leaves[0].shape, device=device).to(dtype)

    def step(name: str) -> Callable[[], tuple[Tensor, ...]]:
        wanted = leaves[:1] if name == "torch fixed" else leaves
        return lambda: torch.autograd.grad(PEERS[name](*leaves, axis), wanted, gradient)

    peers = {name: step(name) for name in DTYPES[dtype]}
    for name in ("eager", "compile"):
        for got, expected in zip(peers["fdda_ext"](), peers[name](), strict=True):
            rtol, atol = CLOSE[dtype]
            torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    name = f"fake_quantize forward and backward, {case}, {dtype}"
    compare(name, peers, 5 * leaves[0].nbytes)


class PlainFunction(torch.autograd.Function):
    """The overhead of any operator written in Python: it computes a single product."""

    @staticmethod
    def forward(ctx, x, scale, zero_point):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, scale, zero_point)
        return x * 1

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        _, scale, zero_point = ctx.saved_tensors
        return grad, scale, zero_point


def bench_dispatch(compare, device):
    """Measure the overhead of a call, with sixteen elements."""
    CASES["16"] = ((16,), None)
    *leaves, axis = inputs("16", torch.float32, device)
    gradient = torch.ones(16, device=device)

    def step(function: Callable[..., Tensor], *more: object) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*leaves, *more), leaves, gradient)

    peers = {
        "fdda_ext": step(ours, axis),
        "eager": step(eager_lsq, axis),
        "torch learnable": step(learnable, axis),
        "plain Function": step(PlainFunction.apply),
    }
    for got, expected in zip(peers["fdda_ext"](), peers["eager"](), strict=True):
        torch.testing.assert_close(got, expected)
    compare("fake_quantize forward and backward, 16 elements", peers, 5 * leaves[0].nbytes)
