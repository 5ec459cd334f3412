"""The CUDA kernels on a simulated device, without a GPU, compared with the CPU kernels.

tests/simt compiles csrc/cuda/*.cu as plain C++ and runs every thread of every block (its launch.cuh
explains what this can and cannot show). The operators are in torch.ops.fdda_simt.
"""

import ctypes
import importlib
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from test_int4_conv2d import BAD, CASES, make_case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.cpp_extension import include_paths, library_paths

from fdda_ext.data import calibration_set
from fdda_ext.deploy import CodeGrid, IntegerProgram, lower
from fdda_ext.models import load_model
from fdda_ext.quantization import QuantizationConfig, calibrate, prepare

ROOT = Path(__file__).resolve().parent.parent
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.ops.fdda


@pytest.fixture(scope="module")
def simt(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The operators of csrc/cuda on the simulated device."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "this test needs a C++ compiler, like the build of fdda_ext"
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
    """Fill new tensors with NaN, so that missing writes of a kernel are found."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype; half of them run the threads of a block in reverse, to find missing barriers."""
    reversed_order = request.param in (torch.bfloat16, torch.float64)
    monkeypatch.setenv("FDDA_SIMT_REVERSED", "1" if reversed_order else "0")
    return request.param


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def unaligned(x: Tensor) -> Tensor:
    """Return a copy that is not aligned to 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def channel_slice(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x, 1e4), x], 1)[:, x.shape[1] :]


def channels_last_slice(x: Tensor) -> Tensor:
    return channels_last(torch.cat([x, torch.full_like(x, 1e4)], 1))[:, : x.shape[1]]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def assert_sums_close(actual: Tensor, expected: Tensor, magnitude: float) -> None:
    """Compare sums that were added up in different orders in float32."""
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
    ((2, 3, 48, 48), 1),  # one thread block per run
    ((2, 2, 130, 129), 1),  # several thread blocks per run, odd length
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
def test_fake_quantize_of_empty_tensors(
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


def test_class_batch_stats_ignores_samples_with_bad_labels(simt: SimpleNamespace) -> None:
    x = torch.tensor([[1.0], [3.0], [7.0], [5.0]])
    labels = torch.tensor([0, 5, -1, 0])
    count, mean, var = simt.class_batch_stats(x, labels, 2)
    assert count.tolist() == [2, 0]
    assert mean.tolist() == [[3.0], [0.0]] and var.tolist() == [[4.0], [0.0]]
    one = torch.ones(2, 1)
    grad_x = simt._class_batch_stats_backward(one, one, x, labels, count, mean)
    assert grad_x.tolist() == [[-1.5], [0.0], [0.0], [2.5]]


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0)], ids=str)
def test_class_batch_stats_of_empty_tensors(simt: SimpleNamespace, shape: tuple[int, ...]) -> None:
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
        x[..., 0, 0] = -1000  # the first value is useless as a shift
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
    # Some layers have no positions or no channels.
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


def test_class_stats_loss_takes_more_layers_than_one_launch_holds(simt: SimpleNamespace) -> None:
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


# Convolution of codes ----------------------------------------------------------------------------

#: Cases in addition to the CPU's: every tile and every layout, with full and ragged tiles.
ONE = {"kernel": (1, 1), "padding": (0, 0)}
CONV_CASES = CASES | {
    "large_tile": {"shape": (2, 9, 9, 32), "outputs": 128},
    "large_tile_ragged": {"shape": (3, 8, 7, 48), "outputs": 120, "stride": (2, 1)},
    "wide_tile": {"shape": (2, 9, 9, 80), "outputs": 64, "zero_point": 15},
    "medium_tile": {"shape": (1, 5, 5, 16), "outputs": 48},
    "slices_to_spare": {"shape": (1, 5, 4, 32), "outputs": 70, **ONE},
    "ragged_chunk": {"shape": (1, 5, 5, 48), "outputs": 9},
    "one_pixel": {"shape": (1, 1, 1, 512), "outputs": 100, **ONE},
    "5x5": {"shape": (1, 8, 9, 16), "outputs": 20, "kernel": (5, 5), "padding": (2, 2)},
    "more_taps_than_bits": {
        "shape": (1, 9, 9, 16), "outputs": 8, "kernel": (7, 7), "padding": (3, 3)
    },
    "dilated_units": {
        "shape": (2, 9, 8, 32), "outputs": 40, "dilation": (2, 3), "padding": (3, 3)
    },
    "dilated_bytes": {"shape": (1, 9, 8, 10), "outputs": 40, "dilation": (1, 2)},
    "wide_padding": {"shape": (1, 3, 3, 16), "outputs": 16, "padding": (5, 4)},
    "24_channels": {"shape": (2, 7, 7, 24), "outputs": 144, **ONE},
    "grouped_units": {"shape": (2, 6, 5, 64), "outputs": 80, "groups": 2, "residual": "float"},
    "grouped_bytes": {"shape": (2, 6, 5, 48), "outputs": 48, "groups": 2, "residual": "codes"},
    "grouped_words": {"shape": (2, 6, 5, 32), "outputs": 32, "groups": 8, "residual": "codes"},
    "depthwise_runs": {"shape": (2, 7, 9, 24), "outputs": 24, "groups": 24, "residual": "codes"},
    "depthwise_runs_stride": {
        "shape": (2, 9, 11, 16), "outputs": 16, "groups": 16, "stride": (2, 2), "bits": 8,
        "zero_point": 128, "out_bits": 8,
    },
    "depthwise_7x7": {
        "shape": (1, 9, 8, 11), "outputs": 11, "groups": 11, "kernel": (7, 7), "padding": (3, 3)
    },
    "2_bits": {"shape": (2, 6, 6, 16), "outputs": 16, "bits": 2, "out_bits": 2},
    "no_rows": {"shape": (2, 0, 6, 16), "outputs": 16, "padding": (0, 1)},
}  # fmt: skip

Problem = tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]


def convolve(ops: SimpleNamespace, problem: Problem, **changes: Any) -> Tensor:
    """Call the operator itself, without its Python wrapper."""
    x, weight, scale, shift, options = problem
    o = options | changes
    correction = o["zero_point"] * weight.flatten(1).sum(1, dtype=torch.int32)
    return ops.int4_conv2d(
        x, ops.int4_pack_weight(weight, o["groups"]), scale, shift, correction.int(),
        o.get("residual"), o["kernel"], o["stride"], o["padding"], o["dilation"], o["groups"],
        o["zero_point"], o["low"], o["high"], o["residual_scale"], o["residual_zero_point"],
        o["out_scale"], o["out_zero_point"], o["out_bits"],
    )  # fmt: skip


@pytest.fixture(params=["ascending", "descending"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The order of the threads of a block; with "descending", copies arrive as late as possible."""
    monkeypatch.setenv("FDDA_SIMT_REVERSED", str(int(request.param == "descending")))
    return request.param


@pytest.fixture(params=range(5))
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each tile; if the number of channels is not a multiple of 16, there are only three."""
    monkeypatch.setenv("FDDA_INT4_TILE", str(request.param))
    return request.param


@pytest.mark.parametrize("case", CONV_CASES)
def test_int4_conv2d(simt: SimpleNamespace, order: str, tile: int, case: str) -> None:
    problem = make_case(**CONV_CASES[case])
    expected = convolve(CPU, problem)
    assert torch.equal(convolve(simt, problem), expected)


def test_int4_conv2d_in_the_chosen_tile(
    simt: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_case((2, 9, 9, 80), 100, residual="float")
    expected = convolve(CPU, problem)
    for multiprocessors in ("1", "6", "132"):
        monkeypatch.setenv("FDDA_SIMT_MULTIPROCESSORS", multiprocessors)
        assert torch.equal(convolve(simt, problem), expected)


def test_the_cost_model_chooses_nearly_the_fastest_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check on the measured times what int4_conv2d_plan.cuh says about its constants."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    fit_tiles = importlib.import_module("fit_tiles")
    plan = (ROOT / "csrc" / "cuda" / "int4_conv2d_plan.cuh").read_text()
    rows = fit_tiles.read(fit_tiles.TABLE)
    for name, tiles in fit_tiles.CHOSEN.items():
        listed = re.search(rf"{name}\[\] = \{{(.*?)\}};", plan, re.S)
        assert listed, name
        numbers = [list(map(float, c.split(","))) for c in re.findall(r"\{([^{}]+)\}", listed[1])]
        assert [n[0] for n in numbers] == [fit_tiles.resident(tile) for tile in tiles]
        costs = {tile: n[1:] for tile, n in zip(tiles, numbers, strict=True)}
        mean, worst = fit_tiles.behind_the_fastest(rows[name], costs)
        assert mean < 1.015 and worst < 1.16


@pytest.mark.parametrize("case", ["large_tile", "24_channels", "depthwise_runs", "grouped_words"])
def test_int4_conv2d_with_unaligned_tensors(simt: SimpleNamespace, order: str, case: str) -> None:
    x, weight, scale, shift, options = make_case(**CONV_CASES[case])
    expected = convolve(CPU, (x, weight, scale, shift, options))
    if "residual" in options:
        options["residual"] = unaligned(options["residual"])
    problem = (unaligned(x), unaligned(weight), unaligned(scale), unaligned(shift), options)
    assert torch.equal(convolve(simt, problem), expected)


def guarded(x: Tensor, at_end: bool) -> Tensor:
    """Return a copy with an inaccessible page before its first or after its last byte."""
    page = mmap.PAGESIZE
    size = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for border in (address, address + page + size):
        assert libc.mprotect(ctypes.c_void_p(border), page, 0) == 0  # PROT_NONE
    offset = page + (size - x.nbytes if at_end else 0)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return copy.copy_(x)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    "case",
    ["odd_channels", "1x1_odd", "7x7_stride", "24_channels", "large_tile", "grouped_odd",
     "grouped_words", "depthwise_runs", "depthwise_5x5", "depthwise_few"],
)  # fmt: skip
def test_int4_conv2d_reads_only_inside_its_tensors(
    simt: SimpleNamespace, case: str, at_end: bool
) -> None:
    """Run beside inaccessible pages; an access outside the tensors kills the process."""
    x, weight, scale, shift, options = make_case(**CONV_CASES[case])
    expected = convolve(CPU, (x, weight, scale, shift, options))
    parts = [guarded(tensor, at_end) for tensor in (x, weight, scale, shift)]
    assert torch.equal(convolve(simt, (*parts, options)), expected)


@pytest.mark.parametrize("out_zero_point", [0, 1, 7])
@pytest.mark.parametrize("low", [-float("inf"), -1.5, 0.0])
@pytest.mark.parametrize("high", [float("inf"), 2.5, 6.0])
def test_int4_conv2d_rounds_half_to_even(
    simt: SimpleNamespace, out_zero_point: int, low: float, high: float
) -> None:
    """Use scales for which every second result is a tie."""
    x, weight, scale, shift, options = make_case((1, 8, 8, 1), 8, **ONE)
    problem = (x, weight, torch.full_like(scale, 0.5), torch.zeros_like(shift), options)
    for out_scale in (1.0, 0.25, 2.0):
        changes = {"low": low, "high": high, "out_scale": out_scale}
        changes |= {"out_zero_point": out_zero_point, "zero_point": 8, "out_bits": 3}
        expected = convolve(CPU, problem, **changes)
        assert torch.equal(convolve(simt, problem, **changes), expected)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_int4_conv2d_on_random_geometry(simt: SimpleNamespace, data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        numbers = st.integers(low, high)
        return data.draw(st.tuples(numbers, numbers))

    os.environ["FDDA_INT4_TILE"] = str(data.draw(st.integers(0, 4)))
    os.environ["FDDA_SIMT_REVERSED"] = data.draw(st.sampled_from(["0", "1"]))
    groups = data.draw(st.integers(1, 4))
    kernel, dilation = pair(1, 4), pair(1, 2)
    size = [d * (k - 1) + 1 + e for d, k, e in zip(dilation, kernel, pair(0, 8), strict=True)]
    own = data.draw(st.integers(1, 20) | st.sampled_from([16, 32, 48, 64, 80]))
    bits = data.draw(st.sampled_from([2, 4, 8]))
    problem = make_case(
        (data.draw(st.integers(1, 3)), *size, groups * own),
        groups * data.draw(st.integers(1, 140)),
        seed=data.draw(st.integers(0, 2**31)),
        bits=bits,
        residual=data.draw(st.sampled_from(["none", "codes", "float"])),
        kernel=kernel,
        dilation=dilation,
        stride=pair(1, 3),
        padding=pair(0, 3),
        groups=groups,
        zero_point=data.draw(st.integers(0, 2**bits - 1)),
        out_bits=data.draw(st.sampled_from([0, 3, 4, 8])),
    )
    try:
        assert torch.equal(convolve(simt, problem), convolve(CPU, problem))
    finally:
        del os.environ["FDDA_INT4_TILE"], os.environ["FDDA_SIMT_REVERSED"]


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((5, 3, 3, 3), 1), ((64, 7, 7, 3), 1), ((100, 1, 1, 512), 1), ((48, 3, 3, 8), 3),
        ((10, 3, 3, 3), 5), ((12, 5, 5, 1), 12), ((12, 3, 3, 1), 6), ((1, 2, 3, 1), 1),
    ],
    ids=str,
)  # fmt: skip
def test_packed_weights_hold_every_weight_once(
    simt: SimpleNamespace, shape: tuple[int, ...], groups: int
) -> None:
    numbers = torch.randint(1, 128, shape, dtype=torch.int8)
    packed = simt.int4_pack_weight(numbers, groups)
    with FakeTensorMode():
        fake = CPU.int4_pack_weight(torch.empty(shape, dtype=torch.int8, device="cuda:0"), groups)
    assert packed.shape == fake.shape
    assert torch.equal(packed[packed != 0].sort().values, numbers.flatten().sort().values)


@pytest.mark.parametrize("case", BAD)
def test_int4_conv2d_refuses_bad_arguments(simt: SimpleNamespace, case: str) -> None:
    x, weight, scale, shift, options = make_case((1, 5, 5, 8), 17)
    change, message = BAD[case]
    if case == "channels":  # enough channels to change the size of the packed weight
        change = {"x": torch.zeros(1, 5, 5, 30, dtype=torch.uint8)}
    a: dict[str, Any] = {
        "x": x, "scale": scale, "shift": shift, "correction": torch.zeros(17, dtype=torch.int32),
        "residual": None, "bits": 8, **options, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"int4_conv2d: expected {message}"):
        simt.int4_conv2d(
            a["x"], simt.int4_pack_weight(weight, 1), a["scale"], a["shift"], a["correction"],
            a["residual"], a["kernel"], a["stride"], a["padding"], a["dilation"], a["groups"],
            a["zero_point"], a["low"], a["high"], a["residual_scale"], a["residual_zero_point"],
            a["out_scale"], a["out_zero_point"], a["out_bits"], a["bits"],
        )  # fmt: skip


def test_winograd_is_refused(simt: SimpleNamespace) -> None:
    weight = torch.zeros(8, 3, 3, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="int4_pack_weight: expected winograd to be False on CUDA"):
        simt.int4_pack_weight(weight, 1, True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, "slice"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 4, 4), (3, 1, 3, 3), (2, 5, 6, 2)])
def test_image_codes(simt: SimpleNamespace, shape: tuple[int, ...], layout: Any) -> None:
    """Use ties, values outside the grid and ragged ends; bytes are looked up in a table."""
    generator = torch.Generator().manual_seed(0)
    grid = CodeGrid(0.25, 5, 4)
    raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    table = torch.randint(0, 16, (shape[1], 256), generator=generator, dtype=torch.uint8)
    for images in (raw, raw.float() / 64 - 2):
        if layout == "slice":
            images = torch.cat([images, images], 3)[:, :, :, : shape[3]]
        else:
            images = images.contiguous(memory_format=layout)
        if images.dtype == torch.uint8:
            columns = zip(table, images.unbind(1), strict=True)
            expected = torch.stack([column[plane.long()] for column, plane in columns], 3)
            actual = simt._int4_image_codes(images, table.flatten(), 1.0, 0, 0)
        else:
            expected = grid.quantize(images).permute(0, 2, 3, 1)
            actual = simt._int4_image_codes(images, None, grid.inverse_scale, 5, 15)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("channels", [1, 3, 4, 12, 16, 48])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "ceil_mode"),
    [
        ((3, 3), (2, 2), (1, 1), (1, 1), False),
        ((3, 2), (2, 1), (1, 1), (1, 2), True),
        ((2, 2), (2, 2), (0, 0), (1, 1), True),
    ],
)
def test_max_pool(
    simt: SimpleNamespace,
    channels: int,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, channels, 9, 8), generator=generator, dtype=torch.uint8)
    geometry = (kernel, stride, padding, dilation)
    expected = F.max_pool2d(images.float(), *geometry, ceil_mode).to(torch.uint8)
    for codes in (images.permute(0, 2, 3, 1).contiguous(), images.permute(0, 2, 3, 1)):
        actual = simt._int4_max_pool(codes, *geometry, expected.shape[2:])
        assert torch.equal(actual.permute(0, 3, 1, 2), expected)


def test_image_codes_and_max_pool_refuse_bad_arguments(simt: SimpleNamespace) -> None:
    images = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="expected images to be float32, got float64"):
        simt._int4_image_codes(images.double(), None, 1.0, 0, 15)
    with pytest.raises(ValueError, match="expected table only and always with uint8 images, got"):
        simt._int4_image_codes(images.byte(), None, 1.0, 0, 15)
    with pytest.raises(ValueError, match="expected x to be uint8, got float32"):
        simt._int4_max_pool(images, *[(2, 2)] * 4, (1, 1))
    codes, ones = torch.zeros(1, 4, 4, 3, dtype=torch.uint8), (1, 1)
    for name, pair, least in (
        ("kernel", [2], 1),
        ("stride", [], 1),
        ("padding", [0, -1], 0),
        ("dilation", [1, 2**40], 1),
        ("size", [0, 1], 1),
    ):
        pairs = {"kernel": ones, "stride": ones, "padding": (0, 0), "dilation": ones, "size": ones}
        told = re.escape(f"expected {name} to be two integers of at least {least}, got {pair}")
        with pytest.raises(ValueError, match=told):
            simt._int4_max_pool(codes, *(pairs | {name: pair}).values())
    with pytest.raises(ValueError, match="expected size to end before pixel"):
        simt._int4_max_pool(codes, ones, (2**20, 1), (0, 0), ones, (2**20, 1))


def test_image_codes_and_max_pool_can_be_traced() -> None:
    with FakeTensorMode():
        images = torch.empty(2, 3, 8, 8, device="cuda:0")
        codes = CPU._int4_image_codes(images, None, 1.0, 0, 15)
        assert codes.shape == (2, 8, 8, 3) and codes.dtype == torch.uint8
        largest = CPU._int4_max_pool(codes, (2, 2), (2, 2), (0, 0), (1, 1), (4, 4))
        assert largest.shape == (2, 4, 4, 3) and largest.device == codes.device


@pytest.fixture(scope="module", params=["glyphs_resnet", "glyphs_mobilenet"])
def program(request: pytest.FixtureRequest) -> IntegerProgram:
    images, _ = calibration_set("glyphs")
    student = prepare(load_model(request.param), QuantizationConfig(), images[:1])
    calibrate(student, images)
    return lower(student, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_whole_programs(
    simt: SimpleNamespace,
    program: IntegerProgram,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:
    """Run as on a CUDA device: layers with the kernels, the rest with torch's operators."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    if dtype == torch.float32:
        images = images / 128 - 1
    expected = program(images)
    module = sys.modules["fdda_ext.ops.int4_conv2d"]
    calls = []

    def convolution(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return simt.int4_conv2d(*arguments)

    steps = sys.modules["fdda_ext.deploy.device"]
    monkeypatch.setattr(steps, "_has_kernels", lambda x: True)
    monkeypatch.setattr(steps, "_image_op", simt._int4_image_codes)
    monkeypatch.setattr(steps, "_pool_op", simt._int4_max_pool)
    monkeypatch.setattr(module, "_pack_op", simt.int4_pack_weight)
    monkeypatch.setattr(module, "_conv_op", convolution)
    assert torch.equal(program.on_device(torch.device("cpu"))(images), expected)
    assert len(calls) > 8
