"""The native extension of fdda_ext. Importing it registers torch.ops.fdda."""

built_with_torch: str
stable_abi: str
cuda_archs: str

def cuda_versions() -> tuple[int, int]:
    """Return the CUDA versions of the linked runtime and of the driver, e.g. 13000; 0 if none."""

def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None:
    """Force an instruction set. Raises ValueError if this build or processor lacks it."""

def num_threads() -> int: ...
