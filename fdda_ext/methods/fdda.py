"""FDDA: fine-grained data distribution alignment (Zhong et al., ECCV 2022).

One labelled image per class gives every class a centre in the batch-normalisation statistics of
the deep layers. A label-conditional generator is trained to hit those centres (eq. 6), noisy copies
of them (eq. 7), the teacher's running statistics and the right class; the quantized network is
distilled on its images and the real ones together.

One iteration, ``AlternatingTraining.step``:

1. the generator makes batch A (mixed labels) and batch B (few classes) and takes a step on

       L_G = 1/2 CE(T(A), y) + 1/2 CE(T(B), c) + 0.2 L_BNS(A) + 0.9 L_D(B) + 0.01 L_C(B)

2. after the warm-up, the student takes a step on calibration images and on batch A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self, override

from ..data import augment
from ..distribution import shard, share_of
from ..engine import stage
from ..errors import UsageError
from ..statistics import (
    Distortion,
    bns_loss,
    capture,
    centralised_and_distorted_loss,
    compute_centres,
    first_class_layer,
    noise_pull_loss,
    save_centres,
)
from .alternating import AlternatingConfig, AlternatingTraining
from .base import Problem
from .distillation import ImageSampler

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["FDDA", "FDDAConfig"]


@dataclass(frozen=True)
class FDDAConfig(AlternatingConfig):
    """FDDA's generator, its losses and their schedule (one iteration is one generator step).

    The defaults are those of the paper and its code: epochs of 200 iterations, 400 in all.
    ``batch`` is the size of each of the generator's two: A of mixed labels, B for the class BNS.

    Attributes:
        classes_per_batch: Classes in batch B, sharing its images evenly; the paper has 1.
        bns_weight: Of L_BNS over all layers, on batch A.
        centralised_weight: Of L_C; 0.01 in the authors' code, 0.05 in notes on the paper.
        distorted_weight: Of L_D.
        classification_weight: Of the cross entropy of the teacher on A and on B together.
        distortion: Noise on the centres for L_D.
        misclassified_iterations: For so long, a class whose calibration images the teacher gets
            wrong is pulled towards noise instead of its centre; then it is no longer drawn for B.
        class_depth: Share of the BN layers, from the input on, that the class losses leave out;
            None for the paper's start layer, see `fdda_ext.statistics.first_class_layer`.
        generated_crop: Least share of a generated image's area that the random crop before the
            student step keeps (real images: as the data set says).
    """

    name = "fdda"

    classes_per_batch: int = 1
    bns_weight: float = 0.2
    centralised_weight: float = 0.01
    distorted_weight: float = 0.9
    classification_weight: float = 1.0
    distortion: Distortion = field(default_factory=Distortion)
    misclassified_iterations: int = 1_000
    class_depth: float | None = None
    generated_crop: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes_per_batch < 1 or self.batch % self.classes_per_batch:
            raise UsageError(
                f"fdda: expected classes_per_batch to divide batch ({self.batch}), "
                f"got {self.classes_per_batch}"
            )
        if not 0 <= self.generated_crop <= 1:
            raise UsageError(
                f"fdda: expected generated_crop between 0 and 1, got {self.generated_crop}"
            )
        if self.class_depth is not None and not 0 <= self.class_depth < 1:
            raise UsageError(
                f"fdda: expected class_depth at least 0 and below 1, got {self.class_depth}"
            )
        self.check_not_negative(
            "bns_weight",
            "centralised_weight",
            "distorted_weight",
            "classification_weight",
            "misclassified_iterations",
        )

    @override
    def scaled(self, share: float) -> Self:
        return replace(
            super().scaled(share),
            misclassified_iterations=round(self.misclassified_iterations * share),
        )


class FDDA(AlternatingTraining):
    """The method of the paper; every constant is a setting, with the paper's as default."""

    summary = "generator aligned with per-class BN statistics, distillation on real and generated"
    distributed = True
    needs_labels = True
    sections = ("fdda", "distillation")

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.fdda
        self.centres = compute_centres(
            problem.teacher, problem.images, problem.labels, problem.num_classes
        )
        self.num_correct = int(self.centres.correct.sum())
        if self.num_correct == 0:
            raise UsageError(
                "fdda: expected a teacher that classifies some calibration images rightly, got "
                "none; check the weights, the class order and the normalisation of the data"
            )
        super().__init__(problem, settings.fdda, settings.distillation)
        self.student_batch = self.distillation.generated_batch
        layers = len(self.running.means)
        depth = settings.fdda.class_depth
        self.first_layer = first_class_layer(layers) if depth is None else int(layers * depth)
        self.images = ImageSampler(problem, self.distillation.real_batch, self.random)
        least, most = problem.augmentation.crop_scale
        self.generated_augmentation = replace(
            problem.augmentation, crop_scale=(max(least, self.config.generated_crop), most)
        )

    # ---- the generator ----------------------------------------------------------------------

    @override
    def generator_loss(self, iteration: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """L_G; the images are batch A."""
        config = self.config
        labels_a = self.draw_labels(config.batch)
        classes = self.draw_classes(iteration)  # [P]
        index_b = torch.arange(config.batch, device=classes.device) % classes.shape[0]
        labels = torch.cat([labels_a, classes[index_b]])
        with self.problem.autocast():
            with stage("generator: images"):
                images = self.generator.sample(labels, self.random, num_batches=2)
            with stage("generator: teacher"):
                seen = capture(self.problem.teacher, images)
        with stage("generator: losses"):
            own = images.shape[0] // 2  # of both batches, a process has the same share
            inputs_a, inputs_b = zip(*(x.split(own) for x in seen.inputs), strict=True)
            loss_bns = bns_loss(inputs_a, self.running)
            loss_centralised, loss_distorted = self.class_losses(
                iteration, inputs_b, classes, shard(index_b)
            )
            own_labels = torch.cat([shard(part) for part in labels.chunk(2)])
            loss_class = share_of(config.batch) * F.cross_entropy(seen.logits.float(), own_labels)
            loss = (
                config.classification_weight * loss_class
                + config.bns_weight * loss_bns
                + config.distorted_weight * loss_distorted
                + config.centralised_weight * loss_centralised
            )
        losses = {
            "generator": loss,
            "classification": loss_class,
            "bns": loss_bns,
            "centralised": loss_centralised,
            "distorted": loss_distorted,
        }
        return losses, images[:own], labels_a

    @override
    def phase(self, iteration: int) -> bool:
        """Whether classes of no good centre are still drawn."""
        return iteration < self.config.misclassified_iterations

    def class_losses(
        self, iteration: int, inputs: Sequence[Tensor], classes: Tensor, class_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L_C and L_D of batch B, means over its classes; noise for classes of no good centre."""
        share = torch.full_like(classes, 1 / classes.shape[0], dtype=torch.float32)
        trusted = self.centres.correct[classes]
        loss_centralised, loss_distorted = centralised_and_distorted_loss(
            inputs[self.first_layer :],
            class_index,
            self.centres.statistics.of_classes(classes, self.first_layer),
            share * trusted,
            self.config.distortion,
            self.random,
        )
        if iteration < self.config.misclassified_iterations:
            loss_distorted = loss_distorted + noise_pull_loss(
                inputs, class_index, share * ~trusted, self.random
            )
        return loss_centralised, loss_distorted

    def draw_classes(self, iteration: int) -> Tensor:
        """The P different classes of batch B; later on, only those the teacher gets right."""
        allowed, available = torch.ones_like(self.centres.correct), self.problem.num_classes
        if iteration >= self.config.misclassified_iterations:
            allowed, available = self.centres.correct, self.num_correct
        count = min(self.config.classes_per_batch, available)
        # By lot; torch.multinomial would wait for the device to look at the weights.
        lots = torch.rand(allowed.shape, generator=self.random, device=allowed.device)
        return lots.masked_fill(~allowed, -1.0).topk(count).indices

    # ---- the student ------------------------------------------------------------------------

    @override
    def student_images(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Calibration images, and batch A under one random crop and flip."""
        # The published code passes this tensor through NumPy, which fails; the tensor is meant.
        images = augment(images, self.generated_augmentation, self.random, same_for_batch=True)
        if self.distillation.real_batch == 0:
            return images, labels
        real_images, real_labels = self.images.next()
        return torch.cat([real_images, images]), torch.cat([real_labels, labels])

    # ---- state ------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "images": self.images.order}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.images.order = state["images"]

    @override
    def save_artifacts(self, folder: Path) -> None:
        """What every generator leaves, and the centres."""
        super().save_artifacts(folder)
        save_centres(self.centres, folder / "centres.safetensors")
