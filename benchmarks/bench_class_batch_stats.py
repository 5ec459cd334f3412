"""Compare class_batch_stats with a loop over classes, and with var_mean and index_add (eager and
compiled)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fdda_ext.ops import class_batch_stats

SHAPES = [(128, 256, 14, 14), (64, 64, 56, 56)]
NUM_CLASSES = [10, 1000]


def ours(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    return class_batch_stats(x, labels, num_classes)[1:]


def loop(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    x = x.float()
    means, variances = [], []
    for k in range(num_classes):
        own = x[labels == k]
        if not own.shape[0]:
            means.append(x.new_zeros(x.shape[1]))
            variances.append(x.new_zeros(x.shape[1]))
            continue
        means.append(own.mean(dim=(0, 2, 3)))
        variances.append(own.var(dim=(0, 2, 3), unbiased=False))
    return torch.stack(means), torch.stack(variances)


def merge(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Compute the statistics of each image, and merge them over the images of a class."""
    variance, mean = torch.var_mean(x.float(), dim=(2, 3), correction=0)
    zeros = mean.new_zeros(num_classes, mean.shape[1])
    count = zeros[:, :1].index_add(0, labels, mean.new_ones(labels.shape[0], 1)).clamp_min(1)
    class_mean = zeros.index_add(0, labels, mean) / count
    spread = variance + (mean - class_mean[labels]) ** 2
    return class_mean, zeros.index_add(0, labels, spread) / count


PEERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "fdda_ext": ours,
    "loop": loop,
    "index_add": merge,
    "compile": torch.compile(merge, dynamic=False),
}


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, num_classes: int, device: str
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    return x, torch.arange(shape[0], device=device) * 7 % num_classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_classes", NUM_CLASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward(compare, device, shape, num_classes, dtype):
    x, labels = inputs(shape, dtype, num_classes, device)

    def forward(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], object]:
        return torch.no_grad()(lambda: function(x, labels, num_classes))

    peers = {name: forward(function) for name, function in PEERS.items()}
    for function in peers.values():
        for got, expected in zip(function(), peers["loop"](), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    name = f"class_batch_stats forward, {shape}, {num_classes} classes, {dtype}"
    compare(name, peers, x.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_classes", NUM_CLASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward_backward(compare, device, shape, num_classes, dtype):
    x, labels = inputs(shape, dtype, num_classes, device)
    gradients = list(torch.randn(2, num_classes, shape[1], device=device))

    def step(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(x, labels, num_classes), x, gradients)

        return run

    peers = {name: step(function) for name, function in PEERS.items()}
    rtol, atol = (1e-3, 1e-6) if dtype is torch.float32 else (2e-2, 1e-5)
    for function in peers.values():
        torch.testing.assert_close(function()[0], peers["loop"]()[0], rtol=rtol, atol=atol)
    name = f"class_batch_stats forward and backward, {shape}, {num_classes} classes, {dtype}"
    compare(name, peers, 3 * x.nbytes)
