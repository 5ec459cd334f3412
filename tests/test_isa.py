"""Kernels for instruction sets that this CPU may lack, run with an equivalent instruction."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def cpu_flags() -> set[str]:
    """Return the flags of the CPU in /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="vpdpbusd belongs to x86")
def test_avxvnni_kernels_are_bit_identical_to_plain_loops(tmp_path: Path) -> None:
    """Use the AVX-512 encoding of vpdpbusd if AVX-VNNI is missing; nothing else differs."""
    flags = cpu_flags()
    if "avx_vnni" in flags:
        encoding = "%{vex%}"
    elif {"avx512vl", "avx512_vnni"} <= flags:
        encoding = "%{evex%}"
    else:
        pytest.skip("this processor has no vpdpbusd")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "this test needs a C++ compiler, like the build of fdda_ext"
    program = tmp_path / "compare"
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
    command += ["-Werror", f"-I{ROOT / 'csrc'}", f'-DFDDA_DOT="{encoding} vpdpbusd"']
    command += [str(ROOT / "tests" / "isa" / "compare.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(program), "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
