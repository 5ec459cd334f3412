"""The CUDA kernels on a GPU: the CPU's results, on any stream, in CUDA graphs, every time alike.

The files of the operators test CUDA too, through their ``device`` fixture. The tests here named
``sanitized`` are small and reach every kernel: ``make gpu`` also runs them under compute-sanitizer.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fdda_ext.ops import class_batch_stats, class_stats_loss, fake_quantize

pytestmark = pytest.mark.needs_cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def unaligned(x: Tensor) -> Tensor:
    """One value off the 16-byte borders."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [torch.Tensor.contiguous, channels_last, unaligned]


def quantize(
    x: Tensor, grad: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None
) -> list[Tensor]:
    """y, dx, ds, dz."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, scale, zero_point)]
    y = fake_quantize(*leaves, -8, 7, axis)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def quantize_inputs(
    shape: tuple[int, ...], axis: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = [] if axis is None else [shape[axis]]
    return (
        torch.randn(shape, generator=generator).to(dtype),
        torch.randn(shape, generator=generator).to(dtype),
        0.1 + 0.2 * torch.rand(channels, generator=generator),
        3 * torch.randn(channels, generator=generator),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((70001,), None),
        ((3, 5, 7, 9), 1),
        ((2, 3, 48, 50), 1),
        ((2, 2, 130, 129), 1),
        ((301, 40), 1),
        ((9, 1100), 1),
        ((5, 3), 1),
    ],
    ids=str,
)
def test_sanitized_fake_quantize(
    shape: tuple[int, ...],
    axis: int | None,
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    """y and dx have the CPU's bits; the sums agree to float32 rounding of what was added up."""
    x, grad, scale, zero_point = quantize_inputs(shape, axis, dtype)
    expected = quantize(layout(x), layout(grad), scale, zero_point, axis)
    moved = [layout(x.cuda()), layout(grad.cuda()), scale.cuda(), zero_point.cuda()]
    actual = [tensor.cpu() for tensor in quantize(*moved, axis)]
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    magnitude = 10 * grad.float().abs().sum().item() / scale.numel()
    for got, wanted in zip(actual[2:], expected[2:], strict=True):
        assert (got - wanted).abs().max().item() <= 1e-5 * magnitude


def statistics_problem(
    dtype: torch.dtype, layout: Callable[[Tensor], Tensor], device: str
) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor], Tensor]:
    """The arguments of class_stats_loss: five layers, two sets of targets, one class absent."""
    generator = torch.Generator().manual_seed(0)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    xs, means, variances = [], [], []
    for layer, (width, size) in enumerate([(5, 50), (16, 16), (33, 8), (264, 4), (70, 1)]):
        x = torch.randn((6, width, size, size), generator=generator) + layer
        xs.append(layout(x.to(dtype).to(device)))
        for targets in (means, variances):
            target = torch.rand((2, 4, width), generator=generator)
            targets.append(target.to(device, statistics))
    weight = torch.rand((2, 4), generator=generator).to(device, statistics)
    return xs, torch.tensor([0, 2, 2, 3, 0, 2], device=device), means, variances, weight


def statistics_results(
    problem: tuple[list[Tensor], Tensor, list[Tensor], list[Tensor], Tensor],
) -> list[Tensor]:
    """The loss and its gradients, then the first layer's statistics and a gradient of those."""
    xs, labels, *rest = problem
    leaves = [x.detach().requires_grad_() for x in xs]
    loss = class_stats_loss(leaves, labels, *rest)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    count, mean, var = class_batch_stats(leaves[0], labels, 4)
    (gradient,) = torch.autograd.grad((mean + var).sum(), leaves[0])
    return [loss.detach(), *gradients, count, mean.detach(), var.detach(), gradient]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sanitized_class_statistics(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    expected = statistics_results(statistics_problem(dtype, layout, "cpu"))
    actual = statistics_results(statistics_problem(dtype, layout, "cuda"))
    for got, wanted in zip(actual, expected, strict=True):
        accuracy = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-3}
        tolerance = accuracy.get(wanted.dtype, 2e-2)
        scale = wanted.abs().max().item() if wanted.is_floating_point() else 0
        torch.testing.assert_close(got.cpu(), wanted, rtol=tolerance, atol=tolerance * scale)


def everything(tensors: list[Tensor]) -> list[Tensor]:
    """All operators and their gradients, from x, grad, scale, zero_point and labels."""
    x, grad, scale, zero_point, labels = tensors
    target = torch.zeros((1, 2, x.shape[1]), device="cuda")
    weight = torch.ones((1, 2), device="cuda")
    results = quantize(x, grad, scale, zero_point, 1)
    return results + statistics_results(([x], labels, [target], [target], weight))


def everything_inputs() -> list[Tensor]:
    shape = (4, 8, 20, 20)
    tensors = [tensor.cuda() for tensor in quantize_inputs(shape, 1, torch.float32)]
    return [*tensors, torch.tensor([0, 1, 0, 1], device="cuda")]


def test_same_bits_every_time() -> None:
    runs = [everything(everything_inputs()) for _ in range(3)]
    for first, second in pairwise(runs):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_works_on_the_current_stream() -> None:
    """The input is late on a stream of its own: a kernel on another stream would read zeros."""
    inputs = everything_inputs()
    expected = everything(inputs)
    stream = torch.cuda.Stream()
    late = [torch.zeros_like(tensor) for tensor in inputs]
    late[2].fill_(1)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for to, value in zip(late, inputs, strict=True):
            to.copy_(value)
        actual = everything(late)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_can_be_captured_in_a_graph() -> None:
    static = everything_inputs()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        everything(static)  # lazily created handles come to life before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(static)
    static[0].mul_(0.5).add_(0.1)
    static[4].copy_(torch.tensor([1, 1, 0, 0]))
    graph.replay()
    torch.cuda.synchronize()
    expected = everything(static)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_leaves_the_current_device_alone() -> None:
    last = torch.cuda.device_count() - 1
    before = torch.cuda.current_device()
    x = torch.randn(5, 3, device=f"cuda:{last}")
    one = torch.ones([], device=x.device)
    y = fake_quantize(x, one, one, 0, 15)
    assert y.device == x.device and torch.cuda.current_device() == before
