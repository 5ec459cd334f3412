"""FDDA: four-bit post-training quantization of CNNs from one labelled image per class.

Importing the package loads its native part and registers ``torch.ops.fdda.*``.
"""

import importlib
from pathlib import Path

import torch  # the native part links against libtorch, which this loads

from fdda_ext.about import BuildInfo, build_info
from fdda_ext.version import __version__

__all__ = ["BuildInfo", "__version__", "build_info", "load"]


def load(path: str | Path) -> torch.nn.Module:
    """The `fdda_ext.deploy.IntegerProgram` in a file that ``fdda_ext.export`` wrote.

    Args:
        path: The file, ``model.int4.safetensors`` in a run folder.

    Returns:
        A module from images ``[N, C, H, W]``, normalised float32 or uint8, to logits ``[N, K]``.

    Raises:
        UsageError: If the file is missing, damaged, or describes no program that could run.
    """
    # Late, as networks and data come with it.
    program: torch.nn.Module = importlib.import_module("fdda_ext.deploy").load_program(Path(path))
    return program
