"""Kernels of instruction sets that this processor may lack, on one that computes the same."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def cpu_flags() -> set[str]:
    """What the processor has, in Linux's words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="vpdpbusd belongs to x86")
def test_avxvnni_kernels(tmp_path: Path) -> None:
    """Without AVX-VNNI they run in AVX-512's encoding of vpdpbusd, which is all that differs."""
    flags = cpu_flags()
    if "avx_vnni" in flags:
        encoding = "%{vex%}"
    elif {"avx512vl", "avx512_vnni"} <= flags:
        encoding = "%{evex%}"
    else:
        pytest.skip("this processor has no vpdpbusd")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "building fdda_ext takes a C++ compiler, and so does this test"
    program = tmp_path / "compare"
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
    command += ["-Werror", f"-I{ROOT / 'csrc'}", f'-DFDDA_DOT="{encoding} vpdpbusd"']
    command += [str(ROOT / "tests" / "isa" / "compare.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(program), "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
