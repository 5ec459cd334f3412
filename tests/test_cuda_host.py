"""The CUDA kernels on a simulated device, without a GPU: same bits, or same sums, as on the CPU.

tests/simt compiles csrc/cuda/*.cu as plain C++ and runs every thread of every block (see its
launch.cuh for what that can and cannot show). The operators appear as torch.ops.fdda_simt.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

import fdda_ext.ops  # noqa: F401  registers torch.ops.fdda

ROOT = Path(__file__).resolve().parent.parent
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.ops.fdda


@pytest.fixture(scope="module")
def simt(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The operators of csrc/cuda on the simulated device."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "building fdda_ext takes a C++ compiler, and so does this test"
    library = tmp_path_factory.mktemp("simt") / "simt.so"
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared"]
    command += ["-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{ROOT / 'tests' / 'simt'}", f"-I{ROOT / 'csrc'}"]
    command += [f"-isystem{path}" for path in include_paths()]
    command += [str(ROOT / "tests" / "simt" / "ops.cpp"), "-o", str(library)]
    command += [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(str(library))
    return torch.ops.fdda_simt


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, so that whatever a kernel fails to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype; half of them run the threads of a block last to first, to show missing barriers."""
    reversed_order = request.param in (torch.bfloat16, torch.float64)
    monkeypatch.setenv("FDDA_SIMT_REVERSED", "1" if reversed_order else "0")
    return request.param


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def unaligned(x: Tensor) -> Tensor:
    """One value off the 16-byte borders."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def channel_slice(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x, 1e4), x], 1)[:, x.shape[1] :]


def channels_last_slice(x: Tensor) -> Tensor:
    return channels_last(torch.cat([x, torch.full_like(x, 1e4)], 1))[:, : x.shape[1]]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def assert_sums_close(actual: Tensor, expected: Tensor, magnitude: float) -> None:
    """Sums in another order: equal within float32's rounding of what was added up."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max().item() <= 1e-5 * magnitude + 1e-30


QUANTIZE_CASES = [
    ((1,), None),
    ((4097,), None),
    ((3, 5, 7, 9), None),
    ((70000,), None),  # several tiles and slots
    ((1,), 0),
    ((17, 31), 0),
    ((3, 5, 7, 9), 1),  # runs shorter than a warp
    ((2, 3, 48, 48), 1),  # runs of a block of threads
    ((2, 2, 130, 129), 1),  # several blocks a run, odd
    ((5, 3), 1),  # rows
    ((300, 40), 1),  # rows in packs, several units
    ((9, 1100), 1),  # several strips
    ((2, 64, 3, 5), -3),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str, indirect=True)
@pytest.mark.parametrize("layout", [contiguous, channels_last, unaligned, transposed])
@pytest.mark.parametrize(("shape", "axis"), QUANTIZE_CASES, ids=str)
def test_fake_quantize(
    simt: SimpleNamespace,
    shape: tuple[int, ...],
    axis: int | None,
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = layout(torch.randn(shape, generator=generator).to(dtype))
    grad = torch.randn(shape, generator=generator).to(dtype)
    channels = [] if axis is None else [shape[axis]]
    scale = 0.1 + 0.2 * torch.rand(channels, generator=generator)
    zero = 3 * torch.randn(channels, generator=generator)
    y = simt.fake_quantize(x, scale, zero, -8, 7, axis)
    assert torch.equal(y, CPU.fake_quantize(x, scale, zero, -8, 7, axis))
    assert y.stride() == torch.empty_like(x).stride()
    for upstream in (grad, layout(grad)):
        arguments = (upstream, x, scale, zero, -8, 7, axis)
        dx, ds, dz = simt._fake_quantize_backward(*arguments)
        expected = CPU._fake_quantize_backward(*arguments)
        assert torch.equal(dx, expected[0]) and dx.stride() == expected[0].stride()
        magnitude = grad.float().abs().sum().item() / (channels or [1])[0]
        assert_sums_close(ds, expected[1], 10 * magnitude)
        assert_sums_close(dz, expected[2], 10 * magnitude)


@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((0, 3), 1), ((3, 0), 0), ((2, 0), 1)])
def test_fake_quantize_of_nothing(
    simt: SimpleNamespace, shape: tuple[int, ...], axis: int | None
) -> None:
    x = torch.zeros(shape)
    one = torch.ones([] if axis is None else [shape[axis]])
    assert simt.fake_quantize(x, one, one, 0, 15, axis).shape == shape
    dx, ds, dz = simt._fake_quantize_backward(x, x, one, one, 0, 15, axis)
    assert dx.shape == shape and ds.shape == one.shape and not ds.any() and not dz.any()


STATS_CASES = [
    (6, 4, 5, 7),
    (5, 3, 1, 1),
    (4, 1, 9, 3),
    (9, 130),
    (1, 2, 3),
    (3, 5, 2, 3, 4),
    (2, 40, 7, 7),
    (2, 3, 50, 71),  # two chunks of a plane
    (3, 8, 40, 40),  # rows in packs, several chunks
    (2, 264, 3, 3),  # several strips
    (40, 2, 3),  # more samples than a warp has lanes
]
STATS_LAYOUTS = [contiguous, channels_last, unaligned, channel_slice, channels_last_slice]


def statistics_accuracy(dtype: torch.dtype) -> dict[str, float]:
    return (
        {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 1e-5}
    )


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str, indirect=True)
@pytest.mark.parametrize("layout", [*STATS_LAYOUTS, transposed])
@pytest.mark.parametrize("shape", STATS_CASES, ids=str)
def test_class_batch_stats(
    simt: SimpleNamespace,
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    offset = 4 * torch.randn((1, shape[1]) + (1,) * (len(shape) - 2), generator=generator)
    x = layout((torch.randn(shape, generator=generator) + offset).to(dtype))
    for num_classes in (1, 4):
        labels = torch.randint(num_classes, shape[:1], generator=generator)
        count, mean, var = simt.class_batch_stats(x, labels, num_classes)
        expected = CPU.class_batch_stats(x, labels, num_classes)
        assert torch.equal(count, expected[0])
        torch.testing.assert_close(mean, expected[1], **statistics_accuracy(dtype))
        torch.testing.assert_close(var, expected[2], **statistics_accuracy(dtype))
        grads = torch.randn((2, *mean.shape), generator=generator).to(mean)
        arguments = (*grads, x, labels, *expected[:2])
        grad_x = simt._class_batch_stats_backward(*arguments)
        assert torch.equal(grad_x, CPU._class_batch_stats_backward(*arguments))
        assert grad_x.stride() == torch.empty_like(x).stride()


def test_class_batch_stats_leaves_out_samples_without_a_class(simt: SimpleNamespace) -> None:
    x = torch.tensor([[1.0], [3.0], [7.0], [5.0]])
    labels = torch.tensor([0, 5, -1, 0])
    count, mean, var = simt.class_batch_stats(x, labels, 2)
    assert count.tolist() == [2, 0]
    assert mean.tolist() == [[3.0], [0.0]] and var.tolist() == [[4.0], [0.0]]
    one = torch.ones(2, 1)
    grad_x = simt._class_batch_stats_backward(one, one, x, labels, count, mean)
    assert grad_x.tolist() == [[-1.5], [0.0], [0.0], [2.5]]


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0)], ids=str)
def test_class_batch_stats_of_nothing(simt: SimpleNamespace, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    labels = torch.zeros(shape[0], dtype=torch.int64)
    count, mean, var = simt.class_batch_stats(x, labels, 2)
    assert torch.equal(count, CPU.class_batch_stats(x, labels, 2)[0])
    assert mean.shape == (2, shape[1]) and not mean.any() and not var.any()
    assert simt._class_batch_stats_backward(mean, var, x, labels, count, mean).shape == shape


def test_statistics_are_stable_under_a_large_mean(simt: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    for layout in (contiguous, channels_last):
        x = layout(100 + torch.randn((4, 3, 56, 56), generator=generator))
        x[..., 0, 0] = -1000  # the first value is of no use as a shift
        labels = torch.tensor([0, 1, 0, 1])
        _, mean, var = simt.class_batch_stats(x, labels, 2)
        _, expected_mean, expected_var = CPU.class_batch_stats(x.double(), labels, 2)
        assert ((var - expected_var) / expected_var).abs().max() < 1e-5
        assert ((mean - expected_mean) / expected_mean).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str, indirect=True)
@pytest.mark.parametrize("layout", STATS_LAYOUTS)
@pytest.mark.parametrize(("sets", "num_classes"), [(1, 1), (2, 3), (3, 40)])
def test_class_stats_loss(
    simt: SimpleNamespace,
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    sets: int,
    num_classes: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    labels = torch.randint(num_classes, (6,), generator=generator)
    xs, means, variances = [], [], []
    # With layers that have no positions or no channels.
    for layer, (width, size) in enumerate(
        [(5, 12), (3, 0), (0, 2), (33, 8), (64, 4), (70, 1), (4, 0)]
    ):
        x = torch.randn((6, width, size, size), generator=generator) + layer
        xs.append(layout(x.to(dtype)))
        for targets in (means, variances):
            target = torch.rand((sets, num_classes, width), generator=generator)
            targets.append(target.to(statistics))
    weight = torch.rand((sets, num_classes), generator=generator).to(statistics)
    arguments = (xs, labels, means, variances, weight)
    loss, saved = simt.class_stats_loss(*arguments)
    expected_loss, expected_saved = CPU.class_stats_loss(*arguments)
    accuracy = statistics_accuracy(dtype)
    torch.testing.assert_close(saved, expected_saved, **accuracy)
    torch.testing.assert_close(loss, expected_loss, rtol=10 * accuracy["rtol"], atol=1e-6)
    upstream = torch.rand(loss.shape, generator=generator).to(statistics)
    grads = simt._class_stats_loss_backward(upstream, *arguments, expected_saved)
    expected_grads = CPU._class_stats_loss_backward(upstream, *arguments, expected_saved)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected)
        assert grad.stride() == expected.stride()


def test_class_stats_loss_takes_more_layers_than_a_launch(simt: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(3, 1 + i % 4, 2, generator=generator) for i in range(70)]
    targets = [torch.rand(2, 2, x.shape[1], generator=generator) for x in xs]
    arguments = (xs, torch.tensor([0, 1, 0]), targets, targets[::1], torch.rand(2, 2))
    loss, saved = simt.class_stats_loss(*arguments)
    expected_loss, expected_saved = CPU.class_stats_loss(*arguments)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(saved, expected_saved)
    grads = simt._class_stats_loss_backward(loss, *arguments, saved)
    expected_grads = CPU._class_stats_loss_backward(loss, *arguments, saved)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected)
