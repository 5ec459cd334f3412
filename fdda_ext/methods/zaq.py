"""ZAQ: zero-shot adversarial quantization (Liu et al., CVPR 2021).

ZAQ uses neither data nor BN statistics. The generator looks for images on which teacher P and
student Q differ, in their logits and in the relations between their channels. The student learns to
agree on these images (eq. 2 to 8)::

    R_l = X X^T,  X the channels of layer l, each of length 1      channel relation map
    D_f = sum_l w_l |R_l^P - R_l^Q|_1 / C_l^2                      w_l: a layer's share of all
    D_o = |p - q|_1 / K
    L_Q = D_o + alpha D_f,       L_G = -D_o - alpha D_f - beta L_a,      L_a = mean |last features|

The features are the BN inputs in the last layer of each image size, except ``[N, C]`` after a
linear layer, which have no channel relations. As in the other methods, the student keeps the
teacher's BN statistics, because those of generated images drift. With the setting
distillation.objective "divergence", the student takes the common student step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from ..engine import stage
from ..errors import UsageError
from ..statistics import capture
from ..synthesis import ConditionalGenerator, GeneratorConfig
from .alternating import AlternatingConfig, AlternatingTraining
from .base import Problem

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["ZAQ", "ZAQConfig", "feature_discrepancy"]


@dataclass(frozen=True)
class ZAQConfig(AlternatingConfig):
    """Settings of ZAQ's generator, losses and schedule.

    Attributes:
        feature_weight: Weight alpha of D_f.
        activation_weight: Weight beta of L_a.
    """

    name = "zaq"

    generator: GeneratorConfig = field(
        default_factory=lambda: GeneratorConfig(latent_dim=256, hidden_eps=1e-5)
    )
    batch: int = 256
    lr_milestones: list[int] = field(default_factory=lambda: [6_000, 12_000])
    warmup_iterations: int = 60
    range_iterations: int = 60
    student_steps_per_iteration: int = 5
    feature_weight: float = 0.1
    activation_weight: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("feature_weight", "activation_weight")
        if self.generator.class_maps:
            raise UsageError("zaq: expected class_maps false, as images have no labels, got true")


def channel_relations(features: Tensor) -> Tensor:
    """Return R ``[N, C, C]``, the cosines between the channels of ``features [N, C, H, W]``."""
    channels = F.normalize(features.flatten(2).float(), dim=2)
    return channels @ channels.transpose(1, 2)


def feature_discrepancy(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Return D_f, a scalar, of features ``[N, C_l, H_l, W_l]`` of L layers; 0 without layers."""
    if not teacher:
        return torch.zeros(())
    distances = torch.stack(
        [
            (channel_relations(p) - channel_relations(q)).abs().mean()
            for p, q in zip(teacher, student, strict=True)
        ]
    )
    shares = distances.detach() / distances.detach().sum().clamp(min=1e-12)
    return (shares * distances).sum()


class ZAQ(AlternatingTraining):
    """Adversarial training of generator and student."""

    summary = "no data: adversarial generator against the student, on logits and features"
    presets = "zaq"
    sections = ("zaq", "distillation")
    real_images = False

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.zaq
        super().__init__(problem, self.config, settings.distillation)
        with torch.no_grad():
            inputs = capture(problem.teacher, problem.images[:1]).inputs
        sizes = {i: x.shape[2:] for i, x in enumerate(inputs) if x.dim() > 2}
        #: Indices of the last BN layer of each run of layers with the same height and width.
        self.layers = [i for i, size in sizes.items() if sizes.get(i + 1) != size]
        if settings.distillation.objective == "discrepancy":
            self.trainer.loss = self.student_loss

    @override
    def build_generator(self) -> ConditionalGenerator:
        problem = self.problem
        return ConditionalGenerator(1, problem.image_size, self.config.generator, problem.channels)

    @override
    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Generate images with the teacher's predictions as labels."""
        one = torch.zeros(count, dtype=torch.int64, device=self.problem.device)
        images = self.generator.sample(one, self.random)
        with torch.no_grad():
            return images, self.problem.teacher(images).argmax(1)

    def discrepancy(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return D_o, D_f and L_a on ``images [N, C, H, W]``."""
        with self.problem.autocast():
            teacher = capture(self.problem.teacher, images)
        student = capture(self.student, images)
        output = (teacher.logits.float() - student.logits).abs().mean()
        features = feature_discrepancy(
            [teacher.inputs[i] for i in self.layers], [student.inputs[i] for i in self.layers]
        )
        return output, features.to(output), teacher.inputs[-1].float().abs().mean()

    @override
    def generator_loss(self, iteration: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        with self.problem.autocast(), stage("generator: images"):
            images, labels = self.draw(self.config.batch)
        with stage("generator: losses"):
            output, features, activation = self.discrepancy(images)
            loss = (
                -output
                - self.config.feature_weight * features
                - self.config.activation_weight * activation
            )
        losses = {"output": output, "features": features, "activation": activation}
        return {"generator": loss, **losses}, images, labels

    def student_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return L_Q, which does not depend on the labels."""
        output, features, _ = self.discrepancy(images)
        return output + self.config.feature_weight * features
