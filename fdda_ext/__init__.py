"""FDDA: four-bit post-training quantization of CNNs from one labelled image per class.

Importing the package loads its native extension and registers ``torch.ops.fdda.*``. Quantization
in three lines::

    student = fdda_ext.quantize(network, images, labels, bits="W4A4")
    print(fdda_ext.report(student), fdda_ext.evaluate(student, loader))
    fdda_ext.export(student, "network.int4.safetensors")
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch  # loads libtorch, which the native extension links against

from fdda_ext.about import BuildInfo, build_info
from fdda_ext.version import __version__

if TYPE_CHECKING:
    from fdda_ext.api import Report, evaluate, export, quantize, report, restore, save

__all__ = [
    "BuildInfo",
    "Report",
    "__version__",
    "build_info",
    "evaluate",
    "export",
    "load",
    "quantize",
    "report",
    "restore",
    "save",
]

#: Names from `fdda_ext.api`, which is imported at their first use because it takes seconds.
_OF_API = ("Report", "evaluate", "export", "quantize", "report", "restore", "save")


def __getattr__(name: str) -> Any:
    if name in _OF_API:
        return getattr(importlib.import_module("fdda_ext.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `evaluate` and `export` functions when submodules of the same names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _OF_API and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def load(path: str | Path) -> torch.nn.Module:
    """Load the `fdda_ext.deploy.IntegerProgram` that ``fdda_ext.export`` wrote to a file.

    Args:
        path: The file, such as ``model.int4.safetensors`` in a run folder.

    Returns:
        A module that maps images ``[N, C, H, W]``, normalised float32 or uint8, to logits
        ``[N, K]``.

    Raises:
        UsageError: If the file is missing, damaged, or holds no valid program.
    """
    # Importing it takes seconds.
    program: torch.nn.Module = importlib.import_module("fdda_ext.deploy").load_program(Path(path))
    return program
