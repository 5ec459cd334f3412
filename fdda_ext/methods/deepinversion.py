"""DeepInversion and Adaptive DeepInversion: dreaming to distill (Yin et al., CVPR 2020).

Images of given classes are optimised with the teacher alone. The teacher must assign these classes,
the BN statistics of a batch must match the running statistics, and the images must be smooth::

    L = CE(T(x), y) + 0.01 R_feat + 1e-4 TV(x) + 1e-5 mean |x| (+ 0.2 R_compete)

The adaptive version looks for images on which the student still differs from the teacher::

    R_compete = 1 - JS(p, q),  p = softmax(S(x) / 3),  q = softmax(T(x) / 3)
    JS(p, q) = 1/2 KL(p || m) + 1/2 KL(q || m),        m = (p + q) / 2

Differences::

                           | authors' code                                      | here
    -----------------------+----------------------------------------------------+-------------------
    JS in R_compete        | KL(m || p) and KL(m || q) of probabilities clamped | the formula
                           | to [0.01, 0.99], not a Jensen-Shannon divergence   |
    -----------------------+----------------------------------------------------+-------------------
    norms in R_feat and TV | without gradient at 0                              | with gradient at 0

* The best images are those of the last resolution.
* The paper does not quantize. Here the images, with balanced classes, set the activation ranges,
  and the student is then distilled on them.
* The adaptive version has rounds. Each optimises a share of the images, except in the first round
  with the current student in R_compete. Then a share of the student steps uses all images so far.
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
    """Settings of DeepInversion. The defaults are those of the run on its code's page.

    Attributes:
        feature_weight: Weight of R_feat.
        first_layer_weight: Weight of the first layer in R_feat, c_0.
        variation_weight: Weight of the total variation.
        length_weight: Weight of the mean length of an image.
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
    """Settings of DeepInversion and of the competition.

    Attributes:
        competition_weight: Weight of R_compete.
        rounds: Number of rounds, with equal shares of the images and the student steps.
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
    """Return JS of the softened distributions of logits ``[N, K]``: a mean over N, 0 to ln 2."""
    p, q = (F.log_softmax(x / temperature, dim=1) for x in (logits, other_logits))
    middle = torch.logaddexp(p, q) - math.log(2)
    from_p, from_q = (F.kl_div(middle, x, reduction="batchmean", log_target=True) for x in (p, q))
    return 0.5 * (from_p + from_q)


class DeepInversion(OptimisedImages):
    """Images of given classes whose batches match the running statistics."""

    summary = "no data: images of given classes from the network itself, distillation"
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
        """Return weight and value of every term of the loss, given the teacher's pass ``seen``."""
        config = self.config
        features = feature_distance(seen.inputs, self.running, config.first_layer_weight)
        return {
            "classification": (1.0, F.cross_entropy(seen.logits, labels)),
            "features": (config.feature_weight, features),
            "variation": (config.variation_weight, total_variation(images)),
            "length": (config.length_weight, images.flatten(1).norm(dim=1).mean()),
        }


class AdaptiveDeepInversion(DeepInversion):
    """DeepInversion against the student, alternating with distillation."""

    summary = "no data: DeepInversion in rounds, on images where student and float network differ"
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
