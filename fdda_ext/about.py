"""Versions, CUDA support and CPU instruction sets of this installation."""

from dataclasses import dataclass

import torch

from fdda_ext import _C
from fdda_ext.errors import UsageError
from fdda_ext.version import __version__

__all__ = ["BuildInfo", "build_info"]


@dataclass(frozen=True)
class BuildInfo:
    """Facts about the build, for bug reports and to choose a device.

    Attributes:
        version: Version of fdda_ext.
        torch: Version of the running torch.
        built_with_torch: Version of torch at build time.
        stable_abi: Oldest torch that this build runs with, e.g. "2.11".
        cuda_archs: CUDA architectures of this build, e.g. ("8.0", "9.0+PTX"); empty without CUDA.
        cuda_usable: Whether the CUDA kernels can run now.
        cuda_reason: Reason why they cannot run; empty if they can.
        isas: CPU instruction sets of this build, worst to best.
        isa: Instruction set in use. The environment variable FDDA_ISA selects another.
        threads: CPU threads, as set by torch.set_num_threads.
    """

    version: str
    torch: str
    built_with_torch: str
    stable_abi: str
    cuda_archs: tuple[str, ...]
    cuda_usable: bool
    cuda_reason: str
    isas: tuple[str, ...]
    isa: str
    threads: int


def _why_cuda_is_unusable() -> str:
    if not _C.cuda_archs:
        return "fdda_ext was built without CUDA"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA support"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    runtime, driver = _C.cuda_versions()
    if driver // 1000 < runtime // 1000:
        return (
            f"the CUDA driver supports {driver // 1000}.{driver % 1000 // 10}, but fdda_ext was "
            f"built with CUDA {runtime // 1000}.{runtime % 1000 // 10}"
        )
    return ""


def build_info() -> BuildInfo:
    """Return facts about this installation.

    Raises:
        UsageError: If this build or processor lacks the instruction set that FDDA_ISA names.
    """
    reason = _why_cuda_is_unusable()
    try:
        isa = _C.isa()
    except ValueError as error:
        raise UsageError(str(error)) from None
    return BuildInfo(
        version=__version__,
        torch=torch.__version__,
        built_with_torch=_C.built_with_torch,
        stable_abi=_C.stable_abi,
        cuda_archs=tuple(_C.cuda_archs.split()),
        cuda_usable=not reason,
        cuda_reason=reason,
        isas=tuple(_C.compiled_isas()),
        isa=isa,
        threads=_C.num_threads(),
    )
