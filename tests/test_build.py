"""The build: contents of the source archive, symbols of the extension, environment variables."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import fdda_ext
from fdda_ext import _C, build_info

ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in the repository with additional environment variables."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1800,  # for a process that hangs; a slow machine takes less
    )


def test_build_info_is_correct() -> None:
    info = build_info()
    assert info.version == fdda_ext.__version__
    assert info.torch == torch.__version__
    assert info.stable_abi == "2.11"
    assert info.isas[0] == "scalar" and info.isa in info.isas
    assert info.threads == torch.get_num_threads()
    assert info.cuda_usable == (info.cuda_reason == "")
    assert all(re.fullmatch(r"\d+\.\d+[a-z]?(\+PTX)?", arch) for arch in info.cuda_archs)
    assert asdict(info)["isa"] == info.isa


def test_every_operator_has_a_cpu_kernel_and_a_cuda_kernel_if_built() -> None:
    differentiable = ("fake_quantize", "class_batch_stats", "class_stats_loss")
    names = [*differentiable, *(f"_{name}_backward" for name in differentiable)]
    for name in [*names, "int4_pack_weight", "int4_conv2d"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fdda::{name}", "CPU")
        cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"fdda::{name}", "CUDA")
        assert cuda == bool(build_info().cuda_archs)


def test_isa_is_forced_by_the_environment() -> None:
    code = "import fdda_ext; print(fdda_ext.build_info().isa)"
    assert run_python("-c", code, FDDA_ISA="scalar").stdout.strip() == "scalar"


def test_unknown_isa_in_the_environment_is_refused() -> None:
    done = run_python("-c", "import fdda_ext; fdda_ext.build_info()", FDDA_ISA="sse9")
    assert "UsageError: FDDA_ISA: expected the instruction set to be one of scalar" in done.stderr
    assert done.stderr.strip().endswith("got sse9")


def test_unknown_isa_is_refused_and_changes_nothing() -> None:
    before = _C.isa()
    with pytest.raises(ValueError, match="set_isa: expected the instruction set to be one of"):
        _C.set_isa("sse9")
    assert _C.isa() == before


def symbols(*options: str) -> str:
    return subprocess.run(
        ["nm", "-D", *options, _C.__file__], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils is not installed")
def test_only_the_stable_abi_of_torch_is_used() -> None:
    """Expect no C++ symbols of at:: or c10::, and weak ones if only a CUDA libtorch has them."""
    undefined = symbols("--undefined-only")
    assert re.search(r" U (aoti_torch|torch)_\w+", undefined)
    assert not re.findall(r"_ZNK?(?:2at|3c10)\w*", undefined)
    assert " U aoti_torch_get_current_cuda_stream" not in undefined


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils is not installed")
def test_no_cuda_library_is_needed_to_import() -> None:
    """Check that the CUDA runtime is linked statically and hidden."""
    assert not re.findall(r" \w (cuda\w+|__cuda\w+|cu[A-Z]\w+)", symbols())


def test_the_package_imports_without_a_gpu() -> None:
    code = "import fdda_ext.ops, fdda_ext; print(fdda_ext.build_info().cuda_usable)"
    # The import of torch's compiler takes as long as that of torch. No command needs it at start.
    code += "; import sys, fdda_ext.train; print('torch._dynamo' in sys.modules)"
    done = run_python("-c", code, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_forcing_cuda_without_nvcc_is_refused() -> None:
    done = run_python("setup.py", "--version", FDDA_CUDA="1", CUDA_HOME="/nonexistent")
    assert done.returncode != 0
    assert "setup.py: expected nvcc on PATH or in CUDA_HOME/bin" in done.stderr


def test_a_wrong_value_of_fdda_cuda_is_refused() -> None:
    done = run_python("setup.py", "--version", FDDA_CUDA="yes")
    assert done.returncode != 0
    assert "setup.py: expected FDDA_CUDA to be 0 or 1, got 'yes'" in done.stderr


def test_the_source_archive_holds_all_files_that_a_build_needs(tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as m; m.build_sdist({str(tmp_path)!r})"
    done = run_python("-c", code, FDDA_CUDA="0")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "fdda_ext/py.typed"}
    for folder, endings in {
        "csrc": ("h", "cuh", "cpp", "cu"),
        "fdda_ext": ("py", "pyi", "yaml", "safetensors"),
        "tests": ("py",),
    }.items():
        for ending in endings:
            wanted |= {str(path.relative_to(ROOT)) for path in ROOT.glob(f"{folder}/**/*.{ending}")}
    assert wanted - held == set()
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_an_installation_holds_presets_and_weights(tmp_path: Path) -> None:
    done = run_python("setup.py", "-q", "build_py", "--build-lib", str(tmp_path), FDDA_CUDA="0")
    assert done.returncode == 0, done.stderr
    for ending in ("py", "pyi", "yaml", "safetensors"):
        wanted = {path.relative_to(ROOT) for path in ROOT.glob(f"fdda_ext/**/*.{ending}")}
        held = {path.relative_to(tmp_path) for path in tmp_path.rglob(f"*.{ending}")}
        assert wanted == held
    assert len(list(tmp_path.glob("fdda_ext/presets/imagenet/*.yaml"))) == 16
