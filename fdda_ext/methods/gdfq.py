"""GDFQ: generative low-bitwidth data-free quantization (Xu et al., ECCV 2020).

GDFQ uses no data. A generator learns to make images that the teacher assigns to the given class,
with the teacher's running statistics. The student learns from the teacher on these images, with
fixed BN statistics (eq. 3, 4 and 8)::

    L_G = CE(T(G(z, y)), y) + 0.1 L_BNS
    L_S = CE(S(x), y) + alpha T^2 KL(softmax(t / T) || softmax(S / T)) / K
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from ..engine import stage
from ..statistics import bns_loss, capture
from .alternating import AlternatingConfig, AlternatingTraining
from .base import Problem

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["GDFQ", "GDFQConfig"]


@dataclass(frozen=True)
class GDFQConfig(AlternatingConfig):
    """Settings of GDFQ's generator, losses and schedule.

    Attributes:
        bns_weight: Weight of L_BNS.
        classification_weight: Weight of the teacher's cross entropy.
    """

    name = "gdfq"

    bns_weight: float = 0.1
    classification_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("bns_weight", "classification_weight")


class GDFQ(AlternatingTraining):
    """A label-conditional generator aligned with the teacher's BN statistics."""

    summary = "no data: generator aligned with the network's BN statistics, distillation"
    presets = "gdfq"
    sections = ("gdfq", "distillation")
    real_images = False

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.gdfq
        super().__init__(problem, self.config, settings.distillation)

    @override
    def generator_loss(self, iteration: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        with self.problem.autocast():
            with stage("generator: images"):
                images, labels = self.draw(self.config.batch)
            with stage("generator: teacher"):
                seen = capture(self.problem.teacher, images)
        with stage("generator: losses"):
            losses = {
                "classification": F.cross_entropy(seen.logits.float(), labels),
                "bns": bns_loss(seen.inputs, self.running),
            }
            loss = (
                self.config.classification_weight * losses["classification"]
                + self.config.bns_weight * losses["bns"]
            )
        return {"generator": loss, **losses}, images, labels
