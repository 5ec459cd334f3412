"""class_batch_stats against a loop over classes, index_add, and var_mean + index_add compiled."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fdda_ext.ops import class_batch_stats

SHAPES = [(32, 256, 14, 14), (64, 64, 56, 56)]
NUM_CLASSES = 10


def ours(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return class_batch_stats(x, labels, NUM_CLASSES)[1:]


def loop(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    means, variances = [], []
    for k in range(NUM_CLASSES):
        own = x[labels == k]
        means.append(own.mean(dim=(0, 2, 3)))
        variances.append(own.var(dim=(0, 2, 3), unbiased=False))
    return torch.stack(means), torch.stack(variances)


def merge(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of each image, merged over the images of a class."""
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
    zeros = mean.new_zeros(NUM_CLASSES, mean.shape[1])
    count = torch.bincount(labels, minlength=NUM_CLASSES)[:, None]
    class_mean = zeros.index_add(0, labels, mean) / count
    spread = variance + (mean - class_mean[labels]) ** 2
    return class_mean, zeros.index_add(0, labels, spread) / count


PEERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "fdda_ext": ours,
    "loop": loop,
    "index_add": merge,
    "compile": torch.compile(merge, dynamic=False),
}


def inputs(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, requires_grad=True)
    return x, torch.arange(shape[0], device=device) % NUM_CLASSES


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward(compare, device, shape):
    x, labels = inputs(shape, device)

    def forward(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], object]:
        return torch.no_grad()(lambda: function(x, labels))

    peers = {name: forward(function) for name, function in PEERS.items()}
    for function in peers.values():
        for got, expected in zip(function(), peers["loop"](), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    compare(f"class_batch_stats forward, {shape}", peers, x.nbytes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward_backward(compare, device, shape):
    x, labels = inputs(shape, device)

    def step(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            mean, variance = function(x, labels)
            return torch.autograd.grad((mean.square() + variance).sum(), x)

        return run

    peers = {name: step(function) for name, function in PEERS.items()}
    for function in peers.values():
        torch.testing.assert_close(function()[0], peers["loop"]()[0], rtol=1e-3, atol=1e-6)
    compare(f"class_batch_stats forward and backward, {shape}", peers, 3 * x.nbytes)
