"""The native part of fdda_ext; importing it registers torch.ops.fdda."""

built_with_torch: str
stable_abi: str
cuda_archs: str

def cuda_versions() -> tuple[int, int]:
    """CUDA runtime linked in and version the driver supports, e.g. (13000, 13000); 0 if none."""

def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None:
    """Forces an instruction set; raises ValueError if this build or processor lacks it."""

def num_threads() -> int: ...
