"""Compare class_stats_loss with plain PyTorch, eager and compiled: all BN layers of ResNet-18, 16
images of 224x224, FDDA's two sets of targets."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fdda_ext.ops import class_stats_loss

IMAGES = 16
#: Channels and height of the input of each BN layer of ResNet-18.
LAYERS = [(64, 112)] + 4 * [(64, 56)] + 5 * [(128, 28)] + 5 * [(256, 14)] + 5 * [(512, 7)]


def composed(
    xs: list[Tensor], labels: Tensor, means: list[Tensor], variances: list[Tensor], weight: Tensor
) -> Tensor:
    """Compute the loss of a batch with a single class, as in the paper."""
    losses = []
    for x, target_mean, target_variance in zip(xs, means, variances, strict=True):
        variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        distance = (mean - target_mean[:, 0]) ** 2 + (variance - target_variance[:, 0]) ** 2
        losses.append(weight[:, 0] * distance.mean(1))
    return torch.stack(losses, 1)


PEERS: dict[str, Callable[..., Tensor]] = {
    "fdda_ext": class_stats_loss,
    "composed": composed,
    "compile": torch.compile(composed, dynamic=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_forward_backward(compare, device, dtype):
    torch.manual_seed(0)
    xs = [torch.randn(IMAGES, c, s, s, device=device).to(dtype).requires_grad_() for c, s in LAYERS]
    labels = torch.zeros(IMAGES, dtype=torch.int64, device=device)
    means = [torch.randn(2, 1, c, device=device) for c, _ in LAYERS]
    variances = [torch.rand(2, 1, c, device=device) for c, _ in LAYERS]
    weight = torch.tensor([[0.01], [0.9]], device=device)

    def step(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(xs, labels, means, variances, weight).sum(), xs)

        return run

    peers = {name: step(function) for name, function in PEERS.items()}
    for function in peers.values():
        for got, expected in zip(function(), peers["composed"](), strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-8)
    name = f"class_stats_loss forward and backward, ResNet-18, {IMAGES} images, {dtype}"
    compare(name, peers, 3 * sum(x.nbytes for x in xs))
