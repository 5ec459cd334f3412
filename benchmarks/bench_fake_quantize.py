"""fake_quantize against eager LSQ with zero point, the same compiled, and torch's learnable op."""

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


def eager_lsq(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """LSQ+ as it is usually written, with straight-through rounding."""
    if axis is not None:
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    zero_point = zero_point + (zero_point.round() - zero_point).detach()
    t = x * (1 / scale)
    code = torch.clamp(t + (t.round() - t).detach() + zero_point, QUANT_MIN, QUANT_MAX)
    return (code - zero_point) * scale


def builtin(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, scale, zero_point, QUANT_MIN, QUANT_MAX
        )
    return torch._fake_quantize_learnable_per_channel_affine(
        x, scale, zero_point, axis, QUANT_MIN, QUANT_MAX
    )


def ours(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    return fake_quantize(x, scale, zero_point, QUANT_MIN, QUANT_MAX, axis)


PEERS = {
    "fdda_ext": ours,
    "eager": eager_lsq,
    "compile": torch.compile(eager_lsq, dynamic=False),
    "builtin": builtin,
}


def inputs(case: str, device: str) -> tuple[Tensor, Tensor, Tensor, int | None]:
    shape, axis = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, requires_grad=True)
    count = 1 if axis is None else shape[axis]
    scale = torch.full((count,), 0.3, device=device, requires_grad=True)
    zero_point = torch.zeros(count, device=device, requires_grad=True)
    return x, scale, zero_point, axis


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
def bench_forward(benchmark, measure, device, case, peer):
    benchmark.group = f"fake_quantize forward, {case}"
    x, scale, zero_point, axis = inputs(case, device)
    with torch.no_grad():
        expected = ours(x, scale, zero_point, axis)
        torch.testing.assert_close(PEERS[peer](x, scale, zero_point, axis), expected)
        measure(lambda: PEERS[peer](x, scale, zero_point, axis), 2 * x.nbytes)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
def bench_forward_backward(benchmark, measure, device, case, peer):
    benchmark.group = f"fake_quantize forward and backward, {case}"
    x, scale, zero_point, axis = inputs(case, device)
    gradient = torch.randn_like(x)

    def step(function=PEERS[peer]):
        y = function(x, scale, zero_point, axis)
        return torch.autograd.grad(y, (x, scale, zero_point), gradient)

    if peer != "builtin":  # its gradients differ at the edges of the range, by definition
        for got, expected in zip(step(), step(eager_lsq), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)
    measure(step, 5 * x.nbytes)
