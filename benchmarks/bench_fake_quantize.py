"""fake_quantize against eager LSQ+, the same compiled, and torch's own operators."""

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
    """LSQ+ as it is usually written, with straight-through rounding."""
    if axis is not None:
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    zero_point = zero_point + (zero_point.round() - zero_point).detach()
    inside = torch.clamp(x * (1 / scale) + zero_point, QUANT_MIN, QUANT_MAX)
    code = inside + (inside.round() - inside).detach()
    return (code - zero_point) * scale


def learnable(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """torch's operator with gradients for all three; they differ from LSQ's at the borders."""
    limits = (QUANT_MIN, QUANT_MAX)
    if axis is None:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, *limits)
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, *limits)


def fixed(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """torch's operator without gradients for scale and zero point: less work than the others."""
    scale, zero_point = scale.detach(), zero_point.detach().int()
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, QUANT_MIN, QUANT_MAX)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, QUANT_MIN, QUANT_MAX)


PEERS: dict[str, Callable[..., Tensor]] = {
    "fdda_ext": ours,
    "eager": eager_lsq,
    "compile": torch.compile(eager_lsq, dynamic=False),
    "torch learnable": learnable,
    "torch fixed": fixed,
}


def inputs(case: str, device: str) -> tuple[Tensor, Tensor, Tensor, int | None]:
    shape, axis = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, requires_grad=True)
    count = 1 if axis is None else shape[axis]
    scale = torch.full((count,), 0.3, device=device, requires_grad=True)
    zero_point = torch.zeros(count, device=device, requires_grad=True)
    return x, scale, zero_point, axis


@pytest.mark.parametrize("case", CASES)
def bench_forward(compare, device, case):
    arguments = inputs(case, device)

    def forward(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: function(*arguments))

    peers = {name: forward(function) for name, function in PEERS.items()}
    for function in peers.values():
        torch.testing.assert_close(function(), peers["fdda_ext"]())
    compare(f"fake_quantize forward, {case}", peers, 2 * arguments[0].nbytes)


@pytest.mark.parametrize("case", CASES)
def bench_forward_backward(compare, device, case):
    *leaves, axis = inputs(case, device)
    gradient = torch.randn_like(leaves[0])

    def step(name: str) -> Callable[[], tuple[Tensor, ...]]:
        wanted = leaves[:1] if name == "torch fixed" else leaves
        return lambda: torch.autograd.grad(PEERS[name](*leaves, axis), wanted, gradient)

    peers = {name: step(name) for name in PEERS}
    for name in ("eager", "compile"):
        for got, expected in zip(peers["fdda_ext"](), peers[name](), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)
    compare(f"fake_quantize forward and backward, {case}", peers, 5 * leaves[0].nbytes)
