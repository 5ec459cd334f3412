"""All settings of the methods, one section each; a preset is a file of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from .distillation import DistillationConfig
from .fdda import FDDAConfig

__all__ = ["MethodSettings"]


@dataclass(frozen=True)
class MethodSettings:
    """One section for each mechanism.

    Attributes:
        distillation: The student step.
        fdda: The generator of FDDA.
    """

    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    fdda: FDDAConfig = field(default_factory=FDDAConfig)

    def scaled(self, share: float) -> MethodSettings:
        """Every schedule in ``share`` of its iterations, milestones and phases with it."""
        return MethodSettings(**{f.name: getattr(self, f.name).scaled(share) for f in fields(self)})
