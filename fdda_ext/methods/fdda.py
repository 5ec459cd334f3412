"""FDDA: fine-grained data distribution alignment (Zhong et al., ECCV 2022).

One labelled image per class gives every class a centre in the batch-normalisation statistics of
the deep layers. A label-conditional generator is trained to hit those centres (eq. 6), noisy copies
of them (eq. 7), the teacher's running statistics and the right class; the quantized network is
distilled on its images and the real ones together.

One iteration, ``FDDA.step``:

1. the generator makes batch A (mixed labels) and batch B (few classes) and takes a step on

       L_G = 1/2 CE(T(A), y) + 1/2 CE(T(B), c) + 0.2 L_BNS(A) + 0.9 L_D(B) + 0.01 L_C(B)

2. after the warm-up, the student takes a step on calibration images and on batch A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from ..data import augment
from ..distribution import gather, shard, share_of, shares, sum_gradients_, total
from ..engine import must_fit, restore_random, stage
from ..errors import UsageError
from ..quantization import calibrate, set_activation_mode
from ..statistics import (
    Distortion,
    bns_loss,
    capture,
    centralised_and_distorted_loss,
    compute_centres,
    first_class_layer,
    noise_pull_loss,
    running_statistics,
    save_centres,
)
from ..synthesis import ConditionalGenerator, GeneratorConfig
from .base import Method, Problem
from .distillation import ImageSampler, Student

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["FDDA", "FDDAConfig"]


@dataclass(frozen=True)
class FDDAConfig:
    """FDDA's generator, its losses and their schedule (one iteration is one generator step).

    The defaults are those of the paper and its code: epochs of 200 iterations, 400 in all.

    Attributes:
        generator: Size of the generator.
        batch: Images in each of the generator's two batches, A (mixed labels) and B (class BNS).
        classes_per_batch: Classes in batch B, sharing its images evenly; the paper has 1.
        bns_weight: Of L_BNS over all layers, on batch A.
        centralised_weight: Of L_C; 0.01 in the authors' code, 0.05 in notes on the paper.
        distorted_weight: Of L_D.
        classification_weight: Of the cross entropy of the teacher on A and on B together.
        distortion: Noise on the centres for L_D.
        lr: Of Adam, betas (0.5, 0.999).
        lr_milestones: Iterations after which the rate is a tenth of what it was.
        warmup_iterations: Generator steps before the first student step.
        student_steps_per_iteration: Student steps after each generator step once the warm-up is
            over, all but the first on images of their own; the paper has 1.
        misclassified_iterations: For so long, a class whose calibration image the teacher gets
            wrong is pulled towards noise instead of its centre; then it is no longer drawn for B.
        ranges_from: Where activation ranges come from: "generated", the moving average over the
            first `range_iterations` generated batches (the paper); "calibration", the real images.
        range_iterations: Length of that phase.
        generated_crop: Least share of a generated image's area that the random crop before the
            student step keeps (real images: as the data set says).
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    batch: int = 16
    classes_per_batch: int = 1
    bns_weight: float = 0.2
    centralised_weight: float = 0.01
    distorted_weight: float = 0.9
    classification_weight: float = 1.0
    distortion: Distortion = field(default_factory=Distortion)
    lr: float = 1e-3
    lr_milestones: list[int] = field(default_factory=lambda: [20_000, 40_000, 60_000])
    warmup_iterations: int = 10_000
    student_steps_per_iteration: int = 1
    misclassified_iterations: int = 1_000
    ranges_from: Literal["generated", "calibration"] = "generated"
    range_iterations: int = 800
    generated_crop: float = 0.5

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise UsageError(f"fdda: expected batch at least 2, got {self.batch}")
        if self.classes_per_batch < 1 or self.batch % self.classes_per_batch:
            raise UsageError(
                f"fdda: expected classes_per_batch to divide batch ({self.batch}), "
                f"got {self.classes_per_batch}"
            )
        if self.student_steps_per_iteration < 1:
            raise UsageError(
                "fdda: expected student_steps_per_iteration at least 1, "
                f"got {self.student_steps_per_iteration}"
            )
        if not 0 <= self.generated_crop <= 1:
            raise UsageError(
                f"fdda: expected generated_crop between 0 and 1, got {self.generated_crop}"
            )
        for name in (
            "bns_weight",
            "centralised_weight",
            "distorted_weight",
            "classification_weight",
            "warmup_iterations",
            "misclassified_iterations",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(
                    f"fdda: expected {name} at least 0 and finite, got {getattr(self, name)}"
                )
        if not 0 < self.lr < math.inf:
            raise UsageError(f"fdda: expected lr above 0 and finite, got {self.lr}")
        if self.ranges_from == "generated" and not (
            1 <= self.range_iterations <= self.warmup_iterations
        ):
            raise UsageError(
                "fdda: expected range_iterations between 1 and warmup_iterations "
                f"({self.warmup_iterations}), got {self.range_iterations}"
            )

    def scaled(self, share: float) -> FDDAConfig:
        """The same schedule in ``share`` of its iterations."""
        return replace(
            self,
            lr_milestones=[round(m * share) for m in self.lr_milestones],
            warmup_iterations=max(round(self.warmup_iterations * share), 1),
            misclassified_iterations=round(self.misclassified_iterations * share),
            range_iterations=max(round(self.range_iterations * share), 1),
        )


class FDDA(Method):
    """The method of the paper; every constant is a setting, with the paper's as default."""

    summary = "generator aligned with per-class BN statistics, distillation on real and generated"
    distributed = True

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.problem = problem
        self.config = settings.fdda
        self.distillation = settings.distillation
        self.iterations = self.config.warmup_iterations + math.ceil(
            self.distillation.steps / self.config.student_steps_per_iteration
        )
        self.random = problem.random()

        self.centres = compute_centres(
            problem.teacher, problem.images, problem.labels, problem.num_classes
        )
        with torch.no_grad():
            layers = capture(problem.teacher, problem.images[:1]).layers
        self.running = running_statistics(layers)
        self.first_layer = first_class_layer(len(layers))
        self.num_correct = int(self.centres.correct.sum())
        if self.num_correct == 0:
            raise UsageError(
                "fdda: expected a teacher that classifies some calibration images rightly, got "
                "none; check the weights, the class order and the normalisation of the data"
            )

        with must_fit(settings__fdda__generator__channels=self.config.generator.channels):
            with torch.random.fork_rng():  # the initial weights depend on the seed alone
                torch.manual_seed(problem.seed)
                self.generator = ConditionalGenerator(
                    problem.num_classes, problem.image_size, self.config.generator
                ).to(problem.device)
            self.generator_optimizer = torch.optim.Adam(
                self.generator.parameters(), lr=self.config.lr, betas=(0.5, 0.999)
            )

        self.quantization = problem.quantization
        self.student = problem.student()
        self.trainer = Student(self.student, problem, self.distillation)
        self.images = ImageSampler(problem, self.distillation.real_batch, self.random)
        least, most = problem.augmentation.crop_scale
        self.generated_augmentation = replace(
            problem.augmentation, crop_scale=(max(least, self.config.generated_crop), most)
        )
        if self.config.ranges_from == "calibration":
            calibrate(self.student, problem.images)

    @override
    def step(self, iteration: int) -> Mapping[str, Tensor]:
        with must_fit(settings__fdda__batch=self.config.batch):
            metrics, images, labels = self.generator_step(iteration)
        if self.config.ranges_from == "generated" and iteration < self.config.range_iterations:
            self.range_step(iteration, images)
        if iteration >= self.config.warmup_iterations:
            if self.distillation.generated_batch > self.config.batch:
                images, labels = self.generate(self.distillation.generated_batch)
            metrics["student"] = self.student_step(images, labels)
            more = min(
                self.config.student_steps_per_iteration - 1,
                self.distillation.steps - self.trainer.steps_done,
            )
            for _ in range(more):
                self.student_step(*self.generate(self.distillation.generated_batch))
        return metrics

    # ---- the generator ----------------------------------------------------------------------

    def generator_step(self, iteration: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """One Adam step on L_G; returns the losses, and batch A without its graph.

        Of several processes, each returns the labels of all images and its share of the images.
        """
        config = self.config
        for group in self.generator_optimizer.param_groups:
            group["lr"] = config.lr * 0.1 ** sum(iteration >= m for m in config.lr_milestones)

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
        with stage("generator: backward"):
            self.generator_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            sum_gradients_(self.generator.parameters())
        with stage("generator: optimizer"):
            self.generator_optimizer.step()
        metrics = {
            "generator": loss,
            "classification": loss_class,
            "bns": loss_bns,
            "centralised": loss_centralised,
            "distorted": loss_distorted,
        }
        return total(metrics), images[:own].detach(), labels_a

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

    def draw_labels(self, count: int) -> Tensor:
        """Uniformly random labels ``[count]``."""
        return torch.randint(
            self.problem.num_classes,
            (count,),
            generator=self.random,
            device=self.problem.device,
        )

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

    @torch.no_grad()
    def range_step(self, iteration: int, images: Tensor) -> None:
        """Move the activation ranges with one generated batch; fix them after the last."""
        if iteration == 0:
            set_activation_mode(self.student, "observe")
        self.student(images)
        if iteration + 1 == self.config.range_iterations:
            set_activation_mode(self.student, "quantize")

    def student_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Distil on calibration images and on batch A under one random crop and flip."""
        with stage("student: images"):
            real_images, real_labels = self.images.next()
            count = self.distillation.generated_batch
            # The published code passes this tensor through NumPy, which fails; the tensor is meant.
            generated = augment(
                gather(images, shares(len(labels)))[:count],
                self.generated_augmentation,
                self.random,
                same_for_batch=True,
            )
            images = torch.cat([real_images, generated])
            labels = torch.cat([real_labels, labels[:count]])
        return self.trainer.step(images, labels)

    @torch.no_grad()
    def generate(self, count: int) -> tuple[Tensor, Tensor]:
        """Images ``[count, 3, H, W]`` of random labels ``[count]``, without a generator step."""
        labels = self.draw_labels(count)
        with self.problem.autocast(), stage("student: images"):
            return self.generator.sample(labels, self.random), labels

    # ---- state ------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "trainer": self.trainer.state_dict(),
            "images": self.images.order,
            "random": self.random.get_state(),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.trainer.load_state_dict(state["trainer"])
        self.images.order = state["images"]
        restore_random(self.random, state["random"])

    @override
    def save_artifacts(self, folder: Path) -> None:
        """The generator and the centres, as safetensors."""
        save_file(
            {name: tensor.cpu() for name, tensor in self.generator.state_dict().items()},
            str(folder / "generator.safetensors"),
        )
        save_centres(self.centres, folder / "centres.safetensors")
