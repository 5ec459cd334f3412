"""Build fdda_ext._C, one extension with the CPU kernels and, if nvcc is found, the CUDA kernels.

Environment:
    FDDA_CUDA: 1 requires the CUDA kernels, 0 omits them. If unset, they are built if nvcc is found.
    TORCH_CUDA_ARCH_LIST: Architectures as in torch, e.g. "8.0 9.0+PTX".
    CUDA_HOME: CUDA toolkit to use. If unset, nvcc is searched on PATH.
    MAX_JOBS: Number of compilers that run at once.
    FDDA_OPTIMIZE: Optimization level of the C++ compiler, 3 if unset.

torch's CUDAExtension does not work with a CPU-only torch. The stable ABI needs no CUDA library of
torch at build time, so this script calls nvcc and links its objects with a static CUDA runtime.
The extension can then be imported on machines without any CUDA library.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

ROOT = Path(__file__).resolve().parent
# The oldest supported torch. One build works with this and all later versions.
STABLE_ABI = (2, 11)
STABLE_ABI_TARGET = f"0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000"
DEFAULT_ARCHS = ["7.5", "8.0", "8.6", "8.9", "9.0", "12.0"]
# Without contraction to fma, all instruction sets and CUDA give bit-identical results.
CXX_FLAGS = [f"-O{os.environ.get('FDDA_OPTIMIZE', '3')}", "-g0", "-ffp-contract=off"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
# --no-as-needed keeps libtorch, which loads libtorch_cuda if torch has it, although the extension
# uses no symbol of it. --exclude-libs separates the static CUDA runtime from torch's copy of it.
LINK_FLAGS = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--exclude-libs,ALL"]
NVCC_FLAGS = ["-O3", "--fmad=false", "--extended-lambda", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class CudaToolkit:
    """An nvcc and its static runtime library."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        dryrun = self._ask("--dryrun", "-x", "cu", "-c", os.devnull)
        directories = [Path(path) for path in re.findall(r'"-L([^"]+)"', dryrun)]
        found = [path for path in directories if (path / "libcudart_static.a").exists()]
        if not found:
            raise FileNotFoundError(
                f"FDDA_CUDA: expected libcudart_static.a beside {nvcc}, got none in "
                f"{[str(path) for path in directories]}; install the CUDA runtime's development "
                "files or set FDDA_CUDA=0"
            )
        self.runtime_dir = str(found[0])
        self.include_dirs = re.findall(r'^#\$ INCLUDES="-I([^"]+)"', dryrun, re.MULTILINE)

    def _ask(self, *arguments: str) -> str:
        done = subprocess.run([self.nvcc, *arguments], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    def architectures(self) -> list[str]:
        """Return TORCH_CUDA_ARCH_LIST, or the default architectures that this nvcc supports."""
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
        if asked:
            return asked
        known = self._ask("--list-gpu-arch").split()
        archs = [a for a in DEFAULT_ARCHS if f"compute_{a.replace('.', '')}" in known]
        return [*archs[:-1], f"{archs[-1]}+PTX"]

    def compile(self, source: Path, target: Path, include_dirs: list[str]) -> None:
        command = [self.nvcc, "-c", str(source), "-o", str(target), *NVCC_FLAGS]
        command += [f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}"]
        command += [f"-I{path}" for path in include_dirs]
        for arch in self.architectures():
            number = arch.removesuffix("+PTX").replace(".", "")
            command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                command.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)


def find_toolkit() -> CudaToolkit | None:
    """Return the toolkit that FDDA_CUDA selects, or None for a CPU-only build."""
    asked = os.environ.get("FDDA_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"setup.py: expected FDDA_CUDA to be 0 or 1, got {asked!r}")
    if asked == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    usual_places = f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else usual_places)
    if nvcc is None:
        if asked == "1":
            raise SystemExit(
                "setup.py: expected nvcc on PATH or in CUDA_HOME/bin because FDDA_CUDA=1, got "
                "none; install the CUDA toolkit or set FDDA_CUDA=0"
            )
        return None
    try:
        return CudaToolkit(nvcc)
    except FileNotFoundError as error:
        if asked == "1":
            raise SystemExit(f"setup.py: {error}") from None
        print(f"warning: building without CUDA: {error}", file=sys.stderr)
        return None


class Build(BuildExtension):
    """torch's build_ext, extended to compile the .cu files into extra objects first."""

    def build_extensions(self) -> None:
        if TOOLKIT is not None:
            (extension,) = self.extensions
            extension.extra_objects = self._compile_cuda(TOOLKIT, extension.include_dirs)
        super().build_extensions()

    def _compile_cuda(self, toolkit: CudaToolkit, include_dirs: list[str]) -> list[str]:
        folder = Path(self.build_temp).resolve() / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        python_include = [path for path in self.compiler.include_dirs if path not in include_dirs]
        headers = [*ROOT.glob("csrc/common/*.h"), *ROOT.glob("csrc/cuda/*.cuh"), ROOT / "setup.py"]
        newest_header = max(path.stat().st_mtime for path in headers)
        objects, jobs = [], []
        for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
            target = folder / f"{source.stem}.o"
            objects.append(str(target))
            newest = max(newest_header, source.stat().st_mtime)
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                jobs.append((source, target, [*include_dirs, *python_include]))
        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda job: toolkit.compile(*job), jobs))
        return objects


TOOLKIT = find_toolkit()


def extension() -> Extension:
    sources = sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/**/*.cpp"))
    archs = " ".join(TOOLKIT.architectures()) if TOOLKIT else ""
    return Extension(
        "fdda_ext._C",
        sources=[str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[
            str(ROOT / "csrc"),
            *include_paths(),
            *(TOOLKIT.include_dirs if TOOLKIT else []),
        ],
        library_dirs=[*library_paths(), *([TOOLKIT.runtime_dir] if TOOLKIT else [])],
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=LINK_FLAGS + (["-lcudart_static", "-lrt", "-ldl"] if TOOLKIT else []),
        define_macros=[
            ("TORCH_TARGET_VERSION", STABLE_ABI_TARGET),
            ("FDDA_BUILT_WITH_TORCH", f'"{torch.__version__}"'),
            ("FDDA_STABLE_ABI", f'"{STABLE_ABI[0]}.{STABLE_ABI[1]}"'),
            ("FDDA_CUDA_ARCHS", f'"{archs}"'),
            *([("FDDA_WITH_CUDA", "1")] if TOOLKIT else []),
        ],
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
