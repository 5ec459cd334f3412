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

from fdda_ext import ops as _  # noqa: F401  registers torch.ops.fdda

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


@pytest.fixture(params=["ascending", "descending"], autouse=True)
def thread_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In which order the threads of a block run: a missing barrier shows in one of them."""
    monkeypatch.setenv("FDDA_SIMT_REVERSED", "1" if request.param == "descending" else "0")


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def unaligned(x: Tensor) -> Tensor:
    """One value off the 16-byte borders."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def channel_slice(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x, 1e6), x], 1)[:, x.shape[1] :]


def channels_last_slice(x: Tensor) -> Tensor:
    return channels_last(torch.cat([x, torch.full_like(x, 1e6)], 1))[:, : x.shape[1]]


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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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
