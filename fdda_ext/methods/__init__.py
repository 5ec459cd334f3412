"""The methods, one file each, with a common interface."""

import difflib

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..distribution import begin_alike, is_launched, world_size
from ..errors import UsageError
from .adaquant import AdaQuant, AdaQuantConfig
from .base import Method, Problem
from .bitsplit import BitSplit, BitSplitConfig
from .brecq import BRECQ, BRECQConfig
from .calibration import MSE, CalibrationDistillation, MinMax, Noise
from .deepinversion import (
    AdaptiveDeepInversion,
    AdaptiveDeepInversionConfig,
    DeepInversion,
    DeepInversionConfig,
)
from .distillation import DistillationConfig, Student, distillation_loss
from .dsg import DSG, DSGConfig
from .fdda import FDDA, FDDAConfig
from .gdfq import GDFQ, GDFQConfig
from .lapq import LAPQ, LAPQConfig
from .memory import MemoryEstimate, check_memory, estimate_memory
from .options import why_unused
from .pace import TRIAL_SHARE, Pace, fitting_share, measure_pace
from .qdrop import QDrop, QDropConfig
from .qdrop_plus import QDropPlus
from .qimera import Qimera, QimeraConfig
from .settings import MethodSettings
from .zaq import ZAQ, ZAQConfig
from .zeroq import ZeroQ, ZeroQConfig

__all__ = [
    "BRECQ",
    "DSG",
    "FDDA",
    "GDFQ",
    "LAPQ",
    "METHODS",
    "MSE",
    "TRIAL_SHARE",
    "ZAQ",
    "AdaQuant",
    "AdaQuantConfig",
    "AdaptiveDeepInversion",
    "AdaptiveDeepInversionConfig",
    "BRECQConfig",
    "BitSplit",
    "BitSplitConfig",
    "CalibrationDistillation",
    "DSGConfig",
    "DeepInversion",
    "DeepInversionConfig",
    "DistillationConfig",
    "FDDAConfig",
    "GDFQConfig",
    "LAPQConfig",
    "MemoryEstimate",
    "Method",
    "MethodSettings",
    "MinMax",
    "Noise",
    "Pace",
    "Problem",
    "QDrop",
    "QDropConfig",
    "QDropPlus",
    "Qimera",
    "QimeraConfig",
    "ZAQConfig",
    "ZeroQ",
    "ZeroQConfig",
    "build_method",
    "build_on_few",
    "check_memory",
    "check_method",
    "distillation_loss",
    "estimate_memory",
    "fitting_share",
    "measure_pace",
    "method_class",
    "why_unused",
]

#: Every method by its name on the command line.
METHODS: dict[str, type[Method]] = {
    "fdda": FDDA,
    "distill": CalibrationDistillation,
    "gdfq": GDFQ,
    "qimera": Qimera,
    "zaq": ZAQ,
    "zeroq": ZeroQ,
    "dsg": DSG,
    "di": DeepInversion,
    "adi": AdaptiveDeepInversion,
    "noise": Noise,
    "lapq": LAPQ,
    "bitsplit": BitSplit,
    "brecq": BRECQ,
    "qdrop": QDrop,
    "qdrop_plus": QDropPlus,
    "adaquant": AdaQuant,
    "minmax": MinMax,
    "mse": MSE,
}


def build_method(name: str, problem: Problem, settings: MethodSettings) -> Method:
    """Build the method called ``name``, ready for its first step.

    With several ranks, all start from the state of the first.

    Raises:
        UsageError: If the name is unknown, or the method does not support this network.
    """
    check_method(name, problem.teacher)
    method = method_class(name)(problem, settings)
    if isinstance(trainer := getattr(method, "trainer", None), Student):
        trainer.check_objective()
    if world_size() > 1:
        state = method.state_dict()
        begin_alike(state)
        method.load_state_dict(state)
    return method


def build_on_few(name: str, problem: Problem, settings: MethodSettings, images: int) -> Method:
    """Build a method for a trial with ``images`` of the problem's images.

    A method that needs labels gets all images, because it needs every class.
    """
    some = problem if METHODS[name].needs_labels else problem.with_images(images)
    return build_method(name, some, settings)


def check_method(name: str, teacher: nn.Module) -> None:
    """Refuse a method that does not support ``teacher``, before anything is computed.

    Raises:
        UsageError: If the name is unknown, or ``teacher`` lacks the batch normalisation it needs.
    """
    if not method_class(name).needs_statistics:
        return
    if any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in teacher.modules()):
        return
    others = [other for other, kind in METHODS.items() if not kind.needs_statistics]
    raise UsageError(
        f"{name}: expected model to have batch normalisation, whose statistics this method "
        f"matches, got {type(teacher).__name__} without it; use {', '.join(others)} instead"
    )


def method_class(name: str) -> type[Method]:
    """Return the class of the method called ``name``.

    Raises:
        UsageError: If the name is unknown, or the method does not support the number of ranks.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(
            f"train: expected method to be one of {', '.join(METHODS)}, got {name}{hint}"
        )
    if is_launched() and not METHODS[name].distributed:
        together = ", ".join(n for n, method in METHODS.items() if method.distributed)
        raise UsageError(
            f"train: expected a method that several processes can run ({together}), got {name}"
        )
    return METHODS[name]
