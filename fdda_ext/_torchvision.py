"""Import of torchvision with a torch that its wheel was not built for.

Package indexes serve torchvision with CUDA operators that a CPU build of torch cannot load. Models
and transforms need none of them, but the import fails until two of them are declared.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

from torch import library

from .errors import UsageError

__all__ = ["import_torchvision"]

_kept_libraries: list[library.Library] = []


@cache
def import_torchvision() -> ModuleType:
    """Import torchvision with ``datasets``, ``models`` and ``transforms``.

    Raises:
        UsageError: If torchvision is not installed.
    """
    from importlib.util import find_spec

    if find_spec("torchvision") is None:
        raise UsageError(
            "torchvision: expected the package to be installed, got none; "
            "install it with pip install --no-deps torchvision"
        )
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        missing = library.Library("torchvision", "DEF")
        missing.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        missing.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_libraries.append(missing)
        import torchvision
    import torchvision.datasets
    import torchvision.models
    import torchvision.transforms

    return torchvision
