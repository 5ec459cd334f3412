"""torchvision beside a torch its wheel was not built with.

Registries serve torchvision with CUDA ops that a CPU build of torch cannot load. Models and
transforms need none of them; only the registration of fake kernels for two missing operators
would fail at import, so those are declared first.
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
    """torchvision, with ``datasets``, ``models`` and ``transforms``.

    Raises:
        UsageError: If it is not installed.
    """
    from importlib.util import find_spec

    if find_spec("torchvision") is None:
        raise UsageError(
            "torchvision: expected the package to be installed, got none; "
            "pip install --no-deps torchvision"
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
