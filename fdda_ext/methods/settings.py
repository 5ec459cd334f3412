"""All settings of the methods, one section each; a preset is a file of them."""

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
    """One section for each mechanism.

    Attributes:
        distillation: The student step.
        fdda: The generator of FDDA.
        gdfq: The generator of GDFQ.
        qimera: The generator of Qimera.
        zaq: The generator of ZAQ.
        zeroq: The images of ZeroQ.
        dsg: The images of DSG.
        di: The images of DeepInversion.
        adi: The images of Adaptive DeepInversion.
        lapq: The search of LAPQ.
        bitsplit: Data and rounds of Bit-Split.
        brecq: The reconstruction of BRECQ.
        qdrop: The reconstruction of QDrop.
        adaquant: The calibration of AdaQuant.
    """

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
        """Every schedule in ``share`` of its iterations, milestones and phases with it."""
        return MethodSettings(**{f.name: getattr(self, f.name).scaled(share) for f in fields(self)})
