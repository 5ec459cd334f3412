"""FDDA: fine-grained data distribution alignment (Zhong et al., ECCV 2022).

One labelled image per class gives each class a BNS centre: the BN statistics of this image in the
deep layers. A label-conditional generator learns to match these centres (eq. 6), noisy copies of
them (eq. 7), the teacher's running statistics and the right class. The student is distilled on
generated and real images together.

One iteration, `AlternatingTraining.step`, has two parts:

1. The generator makes batch A (mixed labels) and batch B (few classes) and takes a step on

       L_G = 1/2 CE(T(A), y) + 1/2 CE(T(B), c) + 0.2 L_BNS(A) + 0.9 L_D(B) + 0.01 L_C(B)

2. After the warm-up, the student takes a step on calibration images and batch A.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self, override

from ..data import augment
from ..distribution import shard, share_of, world_size
from ..engine import large_blocks_returned, release_freed_memory, stage
from ..errors import UsageError
from ..statistics import (
    CLASSES_PER_PASS,
    BNSCentres,
    Distortion,
    StatisticsTargets,
    capture,
    centralised_and_distorted_targets,
    compute_centres,
    first_class_layer,
    noise_pull_loss,
    noise_pull_targets,
    running_targets,
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
    """Settings of FDDA's generator, losses and schedule. An iteration has one generator step.

    The defaults are those of the paper and its code: 400 epochs of 200 iterations. ``batch`` is the
    size of batch A, with mixed labels, and of batch B, for the class losses.

    Attributes:
        classes_per_batch: Classes in batch B, with equally many images each; 1 in the paper.
        bns_weight: Weight of L_BNS, over all layers, on batch A.
        centralised_weight: Weight of L_C; 0.01 in the authors' code, 0.05 in notes on the paper.
        distorted_weight: Weight of L_D.
        classification_weight: Weight of the teacher's cross entropy on A and B together.
        distortion: Noise on the centres for L_D.
        misclassified_iterations: Number of first iterations in which a class whose calibration
            images the teacher misclassifies is pulled towards noise instead of its centre. Later,
            batch B leaves it out.
        class_depth: Share of the BN layers, from the input on, that the class losses leave out;
            None for the paper's start layer, see `fdda_ext.statistics.first_class_layer`.
        generated_crop: Smallest share of a generated image's area that the random crop before the
            student step keeps; for real images, the data set defines it.
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


class _Drawn(NamedTuple):
    """Random inputs of batch A and batch B for a generator step.

    Attributes:
        noise: Noise for this rank's images of A, then of B, ``[2 N, latent_dim]``.
        labels: Classes of these images, int64 ``[2 N]``.
        labels_a: Classes of A's images on all ranks, int64 ``[batch]``.
        classes: Classes of B, int64 ``[P]``.
        class_index: Index into ``classes`` of this rank's images of B, int64 ``[N]``.
    """

    noise: Tensor
    labels: Tensor
    labels_a: Tensor
    classes: Tensor
    class_index: Tensor


class FDDA(AlternatingTraining):
    """The method of the paper. Every constant is a setting, with the paper's value as default.

    Args:
        problem: Network and data.
        settings: Settings with the section ``fdda``.
        centres: BNS centres of the teacher; None to compute them from the calibration images.
    """

    summary = (
        "generator aligned with per-class BN statistics, distillation on real and generated images"
    )
    distributed = True
    needs_labels = True
    sections = ("fdda", "distillation")

    def __init__(
        self, problem: Problem, settings: MethodSettings, centres: BNSCentres | None = None
    ) -> None:
        self.config = settings.fdda
        self.centres = centres or compute_centres(
            problem.teacher,
            problem.images,
            problem.labels,
            problem.num_classes,
            problem.parts(CLASSES_PER_PASS),
        )
        release_freed_memory()  # else the next passes find fragmented memory
        self.num_correct = int(self.centres.correct.sum())
        if self.num_correct == 0:
            raise UsageError(
                "fdda: expected a float network that classifies some calibration images correctly, "
                "got none; check the weights, the class order and the normalisation of the data"
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
        """Compute L_G; the returned images are batch A."""
        drawn = self.draw_batches(iteration)
        with self.problem.autocast():
            with stage("generator: images"):
                images = self.generator(drawn.noise, drawn.labels, num_batches=2)
            with stage("generator: teacher"):
                seen = capture(self.problem.teacher, images)
        with stage("generator: losses"):
            own = images.shape[0] // 2  # a rank has equally many images of both batches
            inputs_a, inputs_b = zip(*(x.split(own) for x in seen.inputs), strict=True)
            distances = {
                name: targets.distances((inputs_a if name == "bns" else inputs_b)[first:])
                for name, (targets, first) in self.terms(iteration, drawn).items()
            }
            loss_class = F.cross_entropy(seen.logits.float(), drawn.labels)
            losses = self.losses(distances, share_of(self.config.batch) * loss_class)
        return losses, images[:own], drawn.labels_a

    @override
    def generator_gradients(self, iteration: int) -> dict[str, Tensor]:
        """Compute the gradients of L_G; for large images, batch A and batch B separately.

        Then each batch passes through generator and teacher alone, with statistics layer by layer,
        so only the gradient of one layer's input is in memory at a time. The gradients are those of
        both batches together, up to the order of summation.
        """
        if not self.one_batch_at_a_time:
            return super().generator_gradients(iteration)
        release_freed_memory()  # the student step has fragmented it
        self.generator_optimizer.zero_grad(set_to_none=True)
        drawn = self.draw_batches(iteration)
        terms_b = self.terms(iteration, drawn)
        terms_a = {"bns": terms_b.pop("bns")}
        (noise_a, noise_b), (labels_a, labels_b) = drawn.noise.chunk(2), drawn.labels.chunk(2)
        with large_blocks_returned():
            found_a, images = self.batch_gradients(noise_a, labels_a, terms_a)
            found_b, _ = self.batch_gradients(noise_b, labels_b, terms_b)
        for name in ("generator", "classification"):
            found_a[name] = found_a[name] + found_b[name]
        return {**found_b, **found_a, "images": images, "labels": drawn.labels_a}

    def batch_gradients(
        self, noise: Tensor, labels: Tensor, terms: dict[str, tuple[StatisticsTargets, int]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradients of one batch's part of L_G; return its terms and the images."""
        distances: dict[str, list[Tensor]] = {name: [] for name in terms}

        def measure(layer: int, x: Tensor) -> None:
            for name, (targets, first) in terms.items():
                if layer >= first:
                    distances[name].append(targets.distances([x], layer - first))

        with self.problem.autocast():
            with stage("generator: images"):
                images = self.generator(noise, labels)
            with stage("generator: teacher"):
                logits = capture(self.problem.teacher, images, measure).logits
        with stage("generator: losses"):
            losses = self.losses(
                {name: torch.cat(parts, 1) for name, parts in distances.items()},
                0.5 * F.cross_entropy(logits.float(), labels),
            )
        with stage("generator: backward"):
            losses["generator"].backward()
        found = {name: loss.detach() for name, loss in losses.items()}, images.detach()
        del losses, logits, images
        release_freed_memory()  # else the next pass finds fragmented memory
        return found

    @property
    @override
    def generator_sizes(self) -> dict[str, int]:
        # Separate batches need half the memory and change only the order of sums.
        whole = {} if self.one_batch_at_a_time else {"images_at_once": 2 * self.config.batch}
        return whole | super().generator_sizes

    @property
    def one_batch_at_a_time(self) -> bool:
        """Whether batch A and batch B pass through the generator and the teacher separately."""
        # Several ranks exchange the statistics of all layers at once, not layer by layer.
        return world_size() == 1 and self.problem.parts(2 * self.config.batch) > 1

    def draw_batches(self, iteration: int) -> _Drawn:
        """Draw the inputs of batch A and batch B."""
        batch = self.config.batch
        labels_a = self.draw_labels(batch)
        classes = self.draw_classes(iteration)
        index_b = torch.arange(batch, device=classes.device) % classes.shape[0]
        labels = torch.cat([labels_a, classes[index_b]])
        noise, labels = self.generator.inputs(labels, self.random, num_batches=2)
        return _Drawn(noise, labels, labels_a, classes, shard(index_b))

    def terms(self, iteration: int, drawn: _Drawn) -> dict[str, tuple[StatisticsTargets, int]]:
        """Return the targets of each loss on statistics, and the first layer that it uses.

        "bns" is for batch A. The others are for batch B: "class" has the targets of both class
        losses, which are means over B's classes. In early iterations, "noise" has targets for
        classes without a good centre.
        """
        classes, class_index = drawn.classes, drawn.class_index
        share = torch.full_like(classes, 1 / classes.shape[0], dtype=torch.float32)
        trusted = self.centres.correct[classes]
        terms = {
            "bns": (running_targets(self.running, len(class_index)), 0),
            "class": (
                centralised_and_distorted_targets(
                    class_index,
                    self.centres.statistics.of_classes(classes, self.first_layer),
                    share * trusted,
                    self.config.distortion,
                    self.random,
                ),
                self.first_layer,
            ),
        }
        if iteration < self.config.misclassified_iterations:
            noise = noise_pull_targets(class_index, self.running, share * ~trusted, self.random)
            terms["noise"] = (noise, 0)
        return terms

    def losses(self, distances: dict[str, Tensor], classification: Tensor) -> dict[str, Tensor]:
        """Return the terms of L_G, or of one batch's part, and their weighted sum as "generator".

        Args:
            distances: Distances of the layers, ``[T, L]``, under the names that `terms` gives.
            classification: Cross entropy of the teacher.
        """
        config = self.config
        losses = {"classification": classification}
        total = config.classification_weight * classification
        if "bns" in distances:
            losses["bns"] = distances["bns"].mean()
            total = total + config.bns_weight * losses["bns"]
        if "class" in distances:
            centralised, distorted = distances["class"].mean(dim=1)
            if "noise" in distances:
                distorted = distorted + noise_pull_loss(distances["noise"])
            total = total + config.distorted_weight * distorted
            total = total + config.centralised_weight * centralised
            losses |= {"centralised": centralised, "distorted": distorted}
        return {"generator": total, **losses}

    @override
    def phase(self, iteration: int) -> bool:
        """Return whether classes without a good centre are still drawn."""
        return iteration < self.config.misclassified_iterations

    def draw_classes(self, iteration: int) -> Tensor:
        """Draw the P different classes of batch B; later only those that the teacher gets right."""
        allowed, available = torch.ones_like(self.centres.correct), self.problem.num_classes
        if iteration >= self.config.misclassified_iterations:
            allowed, available = self.centres.correct, self.num_correct
        count = min(self.config.classes_per_batch, available)
        # torch.multinomial would synchronize with the device to check the weights.
        lots = torch.rand(allowed.shape, generator=self.random, device=allowed.device)
        return lots.masked_fill(~allowed, -1.0).topk(count).indices

    # ---- the student ------------------------------------------------------------------------

    @override
    def student_images(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return calibration images, then batch A under one random crop and flip."""
        # The authors' code passes this tensor through NumPy, which fails.
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
        """Write the generator, some images and the centres."""
        super().save_artifacts(folder)
        save_centres(self.centres, folder / "centres.safetensors")
