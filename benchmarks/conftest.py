"""Devices, threads and time measurement of the benchmarks.

Every benchmark first checks that all peers compute the same result. Then it times them interleaved
(A B C, C B A, ...), so that a temporary slowdown of the machine affects all of them.

Environment variables:
    FDDA_BENCH_DEVICE: ``cpu`` (default) or ``cuda``. On a GPU, the time of the kernels is measured
        too, since launching them often takes longer.
    FDDA_BENCH_THREADS: Number of CPU threads, 2 by default.
    FDDA_BENCH_LOG: File to which each result is appended at once, as one line of JSON.
"""

import ctypes
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from typing import Any

import pytest
import torch

from fdda_ext import build_info

DEVICE = os.environ.get("FDDA_BENCH_DEVICE", "cpu")
LOG = os.environ.get("FDDA_BENCH_LOG")
ROUNDS = 20
#: Seconds of one peer in one round. Short calls are repeated to fill them.
TURN = 0.004

Peers = dict[str, Callable[[], Any]]
#: Packages of optional peers.
PEERS = ("nncf", "openvino", "onnxruntime", "cupy")


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("FDDA_BENCH_THREADS", "2")))
    # Keep freed memory. Otherwise page faults for large outputs take longer than the operators.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["fdda_ext"] = dataclasses.asdict(build_info())
    machine_info["torch"] = torch.__version__
    packages = packages_distributions()  # the distribution of cupy is cupy-cuda13x
    machine_info["peers"] = {name: version(packages[name][0]) for name in PEERS if name in packages}
    if DEVICE == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()


@pytest.fixture(autouse=True)
def compiled_afresh() -> None:
    """Reset torch.compile, which stops compiling a function after a few different shapes."""
    torch.compiler.reset()


@pytest.fixture
def device() -> str:
    return DEVICE


def seconds_per_call(function: Callable[[], Any], calls: int) -> float:
    """Return the mean time of a call, including its work on the GPU."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def device_microseconds(function: Callable[[], Any], calls: int) -> float:
    """Return the mean time of a call's kernels and copies on the GPU, without gaps between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    spans = [
        event.time_range.elapsed_us()
        for event in profile.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return sum(spans) / calls


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that times peers interleaved and, given floor_bytes, a copy of that size.

    It writes medians and interquartile ranges to extra_info, in microseconds, and on a GPU also the
    time of the kernels. pytest-benchmark's own table shows only fdda_ext.
    """

    def run(group: str, peers: Peers, floor_bytes: int | None = None, rounds: int = ROUNDS) -> None:
        benchmark.group = group
        if floor_bytes is not None:
            source = torch.empty(floor_bytes // 2, dtype=torch.uint8, device=DEVICE).random_()
            target = torch.empty_like(source)
            peers = {**peers, "copy": lambda: target.copy_(source)}
        calls = {}
        for name, function in peers.items():
            if rounds < ROUNDS:  # a call takes seconds
                calls[name] = 1
                continue
            seconds_per_call(function, 2)
            spent = seconds_per_call(function, 2)
            calls[name] = max(1, min(50, int(TURN / spent))) if spent else 50
        times: dict[str, list[float]] = {name: [] for name in peers}
        for turn in range(rounds):
            for name in list(peers) if turn % 2 == 0 else reversed(peers):
                times[name].append(1e6 * seconds_per_call(peers[name], calls[name]))
        for name, values in times.items():
            low, median, high = statistics.quantiles(values, n=4)
            benchmark.extra_info[name] = {"median_us": median, "iqr_us": high - low}
            if DEVICE == "cuda":
                spent = device_microseconds(peers[name], calls[name])
                benchmark.extra_info[name]["device_us"] = spent
        benchmark.extra_info["floor_bytes"] = floor_bytes
        benchmark.pedantic(
            lambda: seconds_per_call(peers["fdda_ext"], calls["fdda_ext"]),
            rounds=min(rounds, 5),
        )
        if LOG:
            with open(LOG, "a") as file:
                file.write(json.dumps({"group": group, **benchmark.extra_info}) + "\n")
        parts = []
        for name in times:
            found = benchmark.extra_info[name]
            spent = f" ({found['device_us']:.1f})" if "device_us" in found else ""
            parts.append(f"{name} {found['median_us']:.0f}{spent}")
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{group}: {'  '.join(parts)} us")

    return run
