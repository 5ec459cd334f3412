"""What the native part of this installation is made of, and what of it runs here."""

from dataclasses import dataclass

import torch

from fdda_ext import _C
from fdda_ext.errors import UsageError
from fdda_ext.version import __version__

__all__ = ["BuildInfo", "build_info"]


@dataclass(frozen=True)
class BuildInfo:
    """Facts for bug reports and for choosing a device.

    Attributes:
        version: of fdda_ext.
        torch: the version that is running.
        built_with_torch: the version whose headers were used.
        stable_abi: the oldest torch this build runs with, e.g. "2.11".
        cuda_archs: CUDA architectures compiled in, e.g. ("8.0", "9.0+PTX"); empty without CUDA.
        cuda_usable: whether the CUDA kernels can run now.
        cuda_reason: why they cannot; empty if they can.
        isas: CPU instruction sets compiled in, worst to best.
        isa: the one that runs. FDDA_ISA in the environment chooses another.
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
    """Reports the version, the torch and CUDA it was built for, and what runs on this machine.

    Raises:
        UsageError: FDDA_ISA names an instruction set that this processor lacks.
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
