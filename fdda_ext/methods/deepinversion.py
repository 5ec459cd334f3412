"""DeepInversion and Adaptive DeepInversion: dreaming to distill (Yin et al., CVPR 2020).

Images of wanted classes, from the teacher alone: it must assign them, its batch normalisations must
find the statistics of their training in the batch, and the images must be smooth::

    L = CE(T(x), y) + 0.01 R_feat + 1e-4 TV(x) + 1e-5 mean |x| (+ 0.2 R_compete)

The adaptive version looks for images that the student has not mastered yet::

    R_compete = 1 - JS(p, q),  p = softmax(S(x) / 3),  q = softmax(T(x) / 3)
    JS(p, q) = 1/2 KL(p || m) + 1/2 KL(q || m),        m = (p + q) / 2

The published code takes KL(m || p) and KL(m || q) of probabilities clamped to [0.01, 0.99], which
is no Jensen-Shannon divergence; the formula is followed. The norms of its first two regularisers
have no gradient at 0; here they have. The best images are those of the last resolution.

The paper quantizes nothing. This project lets its images, as many of each class as can be, set the
activation ranges, and the student then learns from the teacher on them. The rounds of the adaptive
version are this project's, too: in each, a share of the images is made against the student of the
rounds before (in the first there is none to compete with), then a share of the student's steps
sees all images so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from ..engine import stage
from ..errors import UsageError
from ..statistics import BatchNormCapture, feature_distance, total_variation
from ..synthesis import ImageOptimisationConfig
from .base import Problem
from .optimised_images import OptimisedImages, OptimisedImagesConfig

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = [
    "AdaptiveDeepInversion",
    "AdaptiveDeepInversionConfig",
    "DeepInversion",
    "DeepInversionConfig",
    "jensen_shannon",
]


@dataclass(frozen=True)
class DeepInversionConfig(OptimisedImagesConfig):
    """DeepInversion's images; the defaults are the run that its code's page gives.

    Attributes:
        feature_weight: Of R_feat.
        first_layer_weight: c_0, of the first layer within it.
        variation_weight: Of the total variation.
        length_weight: Of the mean length of an image.
    """

    name = "di"

    synthesis: ImageOptimisationConfig = field(
        default_factory=lambda: ImageOptimisationConfig(
            images=1000,
            batch=84,
            steps=3000,
            coarse_steps=2000,
            start_std=1.0,
            lr=0.25,
            betas=[0.5, 0.9],
            schedule="cosine",
            warmup_steps=100,
            jitter=30,
            mirror=True,
            clip=True,
            keep_best=True,
        )
    )
    feature_weight: float = 0.01
    first_layer_weight: float = 10.0
    variation_weight: float = 1e-4
    length_weight: float = 1e-5

    def __post_init__(self) -> None:
        self.check_not_negative(
            "feature_weight", "first_layer_weight", "variation_weight", "length_weight"
        )


@dataclass(frozen=True)
class AdaptiveDeepInversionConfig(DeepInversionConfig):
    """DeepInversion's settings, and those of the competition.

    Attributes:
        competition_weight: Of R_compete.
        rounds: Parts that images and student steps come in.
    """

    name = "adi"

    competition_weight: float = 0.2
    rounds: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("competition_weight")
        if self.rounds < 2:
            raise UsageError(f"adi: expected rounds at least 2, got {self.rounds}")


def jensen_shannon(logits: Tensor, other_logits: Tensor, temperature: float = 3.0) -> Tensor:
    """JS of the softened distributions of logits ``[N, K]``, the mean over N, from 0 to ln 2."""
    p, q = (F.log_softmax(x / temperature, dim=1) for x in (logits, other_logits))
    middle = torch.logaddexp(p, q) - math.log(2)
    from_p, from_q = (F.kl_div(middle, x, reduction="batchmean", log_target=True) for x in (p, q))
    return 0.5 * (from_p + from_q)


class DeepInversion(OptimisedImages):
    """Images of wanted classes whose batches have the stored BN statistics."""

    summary = "no data: images of wanted classes out of the network itself, distillation"
    presets = "di"
    sections = ("di", "distillation")

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config: DeepInversionConfig = settings.di
        super().__init__(problem, self.config, settings.distillation)

    @override
    def image_loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        seen = self.teach(images)
        with stage("images: losses"):
            terms = self.terms(images, labels, seen)
            loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
        return {"images": loss, **{name: term for name, (_, term) in terms.items()}}

    def terms(
        self, images: Tensor, labels: Tensor, seen: BatchNormCapture
    ) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of every term of the loss, of what the teacher has ``seen``."""
        config = self.config
        features = feature_distance(seen.inputs, self.running, config.first_layer_weight)
        return {
            "classification": (1.0, F.cross_entropy(seen.logits, labels)),
            "features": (config.feature_weight, features),
            "variation": (config.variation_weight, total_variation(images)),
            "length": (config.length_weight, images.flatten(1).norm(dim=1).mean()),
        }


class AdaptiveDeepInversion(DeepInversion):
    """DeepInversion against the student, in turn with its distillation."""

    summary = "no data: DeepInversion, in rounds, on what the student has not mastered"
    presets = "adi"
    sections = ("adi", "distillation")

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config: AdaptiveDeepInversionConfig = settings.adi
        OptimisedImages.__init__(
            self, problem, self.config, settings.distillation, self.config.rounds
        )

    @override
    def terms(
        self, images: Tensor, labels: Tensor, seen: BatchNormCapture
    ) -> dict[str, tuple[float, Tensor]]:
        terms = super().terms(images, labels, seen)
        if self.rounds_made:
            competition = 1 - jensen_shannon(self.student(images), seen.logits)
            terms["competition"] = (self.config.competition_weight, competition)
        return terms
