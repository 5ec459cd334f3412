"""Devices, instruction sets and thread counts for the tests of the native operators.

Tests with the ``device`` fixture run on the CPU and, if the CUDA kernels are usable, on CUDA. With
FDDA_REQUIRE_CUDA=1 the tests on CUDA fail, instead of being skipped, if they are not usable.
"""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from fdda_ext import _C, build_info

CUDA_REQUIRED = os.environ.get("FDDA_REQUIRE_CUDA") == "1"
CUDA_USABLE = build_info().cuda_usable
DEVICES = ["cpu", "cuda"] if CUDA_USABLE or CUDA_REQUIRED else ["cpu"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_cuda: the test needs usable CUDA kernels")


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = item.get_closest_marker("needs_cuda") is not None
    parameters = getattr(item, "callspec", None)
    wanted = wanted or (parameters is not None and parameters.params.get("device") == "cuda")
    if wanted and not CUDA_USABLE:
        reason = f"CUDA kernels are not usable: {build_info().cuda_reason}"
        if CUDA_REQUIRED:
            pytest.fail(f"FDDA_REQUIRE_CUDA=1, but {reason}")
        pytest.skip(reason)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device with usable kernels."""
    return request.param


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU, forced for the test."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One and two CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Handle Ctrl-C as in a terminal, since background commands of a shell ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
