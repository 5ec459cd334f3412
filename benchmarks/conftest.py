"""Devices and threads of the benchmarks.

Every benchmark first checks that it computes what its peers compute. FDDA_BENCH_DEVICE=cuda
measures on a GPU, each call waiting for its end; FDDA_BENCH_THREADS pins the CPU threads (2).
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fdda_ext import build_info

DEVICE = os.environ.get("FDDA_BENCH_DEVICE", "cpu")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("FDDA_BENCH_THREADS", "2")))


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["fdda_ext"] = str(build_info())
    machine_info["torch"] = torch.__version__
    if DEVICE == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def measure(benchmark: Any) -> Callable[[Callable[[], Any], int], None]:
    """Time a function, with the bytes it must at least move as the floor."""

    def run(function: Callable[[], Any], floor_bytes: int) -> None:
        def call() -> None:
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        call()
        benchmark.extra_info["floor_bytes"] = floor_bytes
        benchmark.pedantic(call, rounds=30, iterations=3, warmup_rounds=5)
        benchmark.extra_info["gb_per_s"] = floor_bytes / benchmark.stats.stats.median / 1e9

    return run
