"""Settings of all methods, one section each. A preset is a file with such settings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from .adaquant import AdaQuantConfig
from .bitsplit import BitSplitConfig
from .brecq import BRECQConfig
from .deepinversion import AdaptiveDeepInversionConfig, DeepInversionConfig
from .distillation import DistillationConfig
from .dsg import DSGConfig
from .fdda import FDDAConfig
from .gdfq import GDFQConfig
from .lapq import LAPQConfig
from .qdrop import QDropConfig
from .qimera import QimeraConfig
from .zaq import ZAQConfig
from .zeroq import ZeroQConfig

__all__ = ["MethodSettings"]


@dataclass(frozen=True)
class MethodSettings:
    """Settings of the student step (`distillation`) and of every method."""

    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    fdda: FDDAConfig = field(default_factory=FDDAConfig)
    gdfq: GDFQConfig = field(default_factory=GDFQConfig)
    qimera: QimeraConfig = field(default_factory=QimeraConfig)
    zaq: ZAQConfig = field(default_factory=ZAQConfig)
    zeroq: ZeroQConfig = field(default_factory=ZeroQConfig)
    dsg: DSGConfig = field(default_factory=DSGConfig)
    di: DeepInversionConfig = field(default_factory=DeepInversionConfig)
    adi: AdaptiveDeepInversionConfig = field(default_factory=AdaptiveDeepInversionConfig)
    lapq: LAPQConfig = field(default_factory=LAPQConfig)
    bitsplit: BitSplitConfig = field(default_factory=BitSplitConfig)
    brecq: BRECQConfig = field(default_factory=BRECQConfig)
    qdrop: QDropConfig = field(default_factory=QDropConfig)
    adaquant: AdaQuantConfig = field(default_factory=AdaQuantConfig)

    def scaled(self, share: float) -> MethodSettings:
        """Return all schedules with ``share`` of their iterations, milestones and phases."""
        return MethodSettings(**{f.name: getattr(self, f.name).scaled(share) for f in fields(self)})
