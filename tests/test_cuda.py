"""The CUDA kernels on a GPU: results against the CPU, streams, CUDA graphs, reproducibility.

The test files of the operators also run on CUDA, through their ``device`` fixture. The tests named
``sanitized`` are small and run every kernel. ``make gpu`` runs them under compute-sanitizer too.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import test_fdda as fdda
import test_zero_shot as zero_shot
import torch
from test_cuda_host import CONV_CASES
from test_int4_conv2d import make_case, run
from torch import Tensor, library
from torch.nn import functional as F

from fdda_ext.data import calibration_set
from fdda_ext.deploy import CodeGrid, IntegerProgram, capture, lower
from fdda_ext.errors import UsageError
from fdda_ext.methods import FDDA, Problem, build_method
from fdda_ext.models import load_model
from fdda_ext.ops import class_batch_stats, class_stats_loss, fake_quantize, int4_pack_weight
from fdda_ext.quantization import QuantizationConfig, calibrate, prepare

pytestmark = pytest.mark.needs_cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def unaligned(x: Tensor) -> Tensor:
    """Return a copy that is not aligned to 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [torch.Tensor.contiguous, channels_last, unaligned]


def quantize(
    x: Tensor, grad: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None
) -> list[Tensor]:
    """Return y and the gradients of x, scale and zero point."""
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
    """Compare with the CPU: y and dx bit by bit, sums up to rounding."""
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
    """Return arguments of class_stats_loss with five layers and one absent class."""
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
    """Return the loss, its gradients, and the first layer's statistics and their gradient."""
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


def on_cuda(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("tile", range(5))
@pytest.mark.parametrize("case", CONV_CASES)
def test_sanitized_int4_conv2d(case: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDDA_INT4_TILE", str(tile))
    *tensors, options = make_case(**CONV_CASES[case])
    expected = run(*tensors, options)
    moved = {name: on_cuda(value) for name, value in options.items()}
    assert torch.equal(run(*map(on_cuda, tensors), moved).cpu(), expected)


@pytest.mark.parametrize("case", ["large_tile", "24_channels", "depthwise_runs", "grouped_words"])
def test_sanitized_int4_conv2d_with_unaligned_tensors(case: str) -> None:
    *tensors, options = make_case(**CONV_CASES[case])
    expected = run(*tensors, options)
    moved = {n: unaligned(v.cuda()) if isinstance(v, Tensor) else v for n, v in options.items()}
    actual = run(*(unaligned(tensor.cuda()) for tensor in tensors), moved)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("channels", [3, 12, 64])
def test_sanitized_int4_image_codes_and_max_pool(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, channels, 33, 31), generator=generator, dtype=torch.uint8)
    images, grid = raw.float() / 64 - 2, CodeGrid(0.25, 5, 4)
    expected = grid.quantize(images).permute(0, 2, 3, 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        moved = images.cuda().contiguous(memory_format=layout)
        codes = torch.ops.fdda._int4_image_codes(moved, None, grid.inverse_scale, 5, 15)
        assert torch.equal(codes.cpu(), expected)
    table = torch.arange(256, dtype=torch.uint8).flip(0).repeat(channels).cuda()
    codes = torch.ops.fdda._int4_image_codes(raw.cuda(), table, 1.0, 0, 0)
    assert torch.equal(codes.cpu(), 255 - raw.permute(0, 2, 3, 1))
    geometry = ((3, 3), (2, 2), (1, 1), (1, 1))
    largest = F.max_pool2d(raw.float(), *geometry).to(torch.uint8)
    pooled = torch.ops.fdda._int4_max_pool(
        raw.cuda().permute(0, 2, 3, 1), *geometry, largest.shape[2:]
    )
    assert torch.equal(pooled.permute(0, 3, 1, 2).cpu(), largest)


def test_int4_conv2d_passes_opcheck() -> None:
    x, weight, scale, shift, options = make_case(**CONV_CASES["residual"])
    for plain, groups in ((weight, 1), (weight[..., :1].contiguous(), 17)):
        library.opcheck(torch.ops.fdda.int4_pack_weight.default, (plain.cuda(), groups))
    arguments = (
        x, int4_pack_weight(weight.cuda()), scale, shift, torch.zeros(17, dtype=torch.int32),
        options["residual"], [3, 3], [1, 1], [1, 1], [1, 1], 1, 3, 0.0, 6.0, 0.3, 5, 0.4, 2, 4,
    )  # fmt: skip
    library.opcheck(torch.ops.fdda.int4_conv2d.default, tuple(map(on_cuda, arguments)))


def test_int4_conv2d_refuses_winograd_and_other_devices() -> None:
    x, weight, scale, shift, options = make_case(**CONV_CASES["3x3"])
    with pytest.raises(UsageError, match="expected winograd to be False on CUDA, got True"):
        int4_pack_weight(weight.cuda(), winograd=True)
    with pytest.raises(UsageError, match="expected weight to be on the device of x, cuda:0"):
        run(x.cuda(), weight, scale, shift, options)


def quantized_network(name: str) -> IntegerProgram:
    images, _ = calibration_set("glyphs")
    student = prepare(load_model(name), QuantizationConfig(), images[:1])
    calibrate(student, images)
    return lower(student, (0.5, 0.4, 0.3), (0.3, 0.2, 0.25))


@pytest.mark.parametrize("network", ["glyphs_resnet", "glyphs_mobilenet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_programs_are_bit_identical_to_the_cpu(network: str, dtype: torch.dtype) -> None:
    """Run whole networks, without and with a CUDA graph that was captured with other images."""
    program = quantized_network(network)
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 16, 3, 32, 32), generator=generator, dtype=torch.uint8)
    batches = raw if dtype == torch.uint8 else raw / 128 - 1
    expected = [program(images) for images in batches]
    program.cuda()
    captured = capture(program, batches[0].cuda())
    for images, logits in zip(batches, expected, strict=True):
        assert torch.equal(program(images.cuda()).cpu(), logits)
        assert torch.equal(captured(images.cuda()).cpu(), logits)
    with pytest.raises(
        UsageError, match=r"expected images of shape \[16, 3, 32, 32\], as captured"
    ):
        captured(batches[0, :5].cuda())


def convolutions(x: Tensor, labels: Tensor) -> list[Tensor]:
    """Run int4_conv2d on codes of x, with 1, 2 and ``channels`` groups."""
    codes = (x * 2 + 8).clamp(0, 15).to(torch.uint8).permute(0, 2, 3, 1)
    channels = codes.shape[3]
    signs = (2 * (labels == 1).to(torch.int8) - 1).repeat(16 * 9 * channels)
    results = []
    for groups in (1, 2, channels):
        sizes = (16 if groups < channels else channels, 3, 3, channels // groups)
        weight = signs[: sizes[0] * 9 * sizes[3]].view(sizes)
        ones = torch.ones(sizes[0], device="cuda")
        zeros = torch.zeros(sizes[0], dtype=torch.int32, device="cuda")
        results.append(
            torch.ops.fdda.int4_conv2d(
                codes, int4_pack_weight(weight, groups), ones, ones, zeros, None, [3, 3], [1, 1],
                [1, 1], [1, 1], groups, 0, -1e9, 1e9, 1.0, 0, 1.0, 0, 0,
            )
        )  # fmt: skip
    return results


def everything(tensors: list[Tensor]) -> list[Tensor]:
    """Return the results of all operators, with gradients."""
    x, grad, scale, zero_point, labels = tensors
    target = torch.zeros((1, 2, x.shape[1]), device="cuda")
    weight = torch.ones((1, 2), device="cuda")
    results = quantize(x, grad, scale, zero_point, 1) + convolutions(x, labels)
    return results + statistics_results(([x], labels, [target], [target], weight))


def everything_inputs() -> list[Tensor]:
    shape = (4, 8, 20, 20)
    tensors = [tensor.cuda() for tensor in quantize_inputs(shape, 1, torch.float32)]
    return [*tensors, torch.tensor([0, 1, 0, 1], device="cuda")]


def test_results_are_bit_identical_every_time() -> None:
    runs = [everything(everything_inputs()) for _ in range(3)]
    for first, second in pairwise(runs):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators_run_on_the_current_stream() -> None:
    """Copy the input late on another stream; a kernel on the wrong stream would read zeros."""
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


def test_operators_can_be_captured_in_a_cuda_graph() -> None:
    static = everything_inputs()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        everything(static)  # creates lazy handles before the capture
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


def test_operators_do_not_change_the_current_device() -> None:
    last = torch.cuda.device_count() - 1
    before = torch.cuda.current_device()
    x = torch.randn(5, 3, device=f"cuda:{last}")
    one = torch.ones([], device=x.device)
    y = fake_quantize(x, one, one, 0, 15)
    assert y.device == x.device and torch.cuda.current_device() == before


def on_gpu(task: Problem, **changes: Any) -> Problem:
    tensors = {"images": task.images.cuda(), "labels": task.labels.cuda()}
    return replace(task, teacher=task.teacher.cuda(), **tensors, **changes)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_replayed_fdda_iterations_equal_launched_ones(
    precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare random numbers, losses and students, also after a checkpoint."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    # The schedule is long enough for graphs in both phases of the generator.
    chosen = fdda.settings({"steps": 8}, warmup_iterations=10, misclassified_iterations=6)
    launched, replayed, resumed = (
        FDDA(on_gpu(fdda.problem(right=True), precision=precision, cuda_graphs=graphs), chosen)
        for graphs in (False, True, True)
    )
    close = 1e-3 if precision == torch.float32 else 3e-2
    for iteration in range(launched.iterations):
        if iteration == 14:
            resumed.load_state_dict(copy.deepcopy(replayed.state_dict()))
        expected, found = launched.step(iteration), replayed.step(iteration)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=close, atol=close)
        if iteration >= 14:
            again = resumed.step(iteration)
            torch.testing.assert_close(again["student"], found["student"], rtol=close, atol=close)
    assert torch.equal(launched.random.get_state(), replayed.random.get_state())
    assert replayed.replayed_generator.is_captured and replayed.trainer.replayed.is_captured
    assert not launched.trainer.replayed.is_captured
    for one, other in zip(
        launched.student.parameters(), replayed.student.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=close, atol=close)


@pytest.mark.parametrize("grid", ["deploy", "paper"])
@pytest.mark.parametrize("name", ["distill", "gdfq", "qimera", "di", "adi"])
def test_replayed_student_steps_equal_launched_ones(
    name: str, grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare every kind of method with a student step, while the images change."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    chosen = zero_shot.tiny()
    student = replace(chosen.distillation, steps=10, real_batch=3, generated_batch=3)
    chosen = replace(chosen, distillation=student)
    launched, replayed = (
        build_method(name, on_gpu(fdda.problem(right=True, grid=grid), cuda_graphs=graphs), chosen)
        for graphs in (False, True)
    )
    for iteration in range(launched.iterations):
        expected, found = launched.step(iteration), replayed.step(iteration)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-2, atol=1e-2)
    assert replayed.trainer.replayed.is_captured


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_fdda_iterations_do_not_synchronize_and_lower_to_a_program(precision: torch.dtype) -> None:
    task = on_gpu(fdda.problem(right=True), precision=precision)
    method = FDDA(task, fdda.settings())
    for iteration in range(method.iterations - 1):
        losses = method.step(iteration)
        assert all(bool(loss.isfinite()) for loss in losses.values()), losses
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.step(method.iterations - 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        torch.testing.assert_close(lower(method.student)(task.images), method.student(task.images))
