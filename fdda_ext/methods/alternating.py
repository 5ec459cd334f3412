"""Methods that train a generator and the student in alternation.

An iteration takes one generator step on the method's loss and, after the warm-up, one or more
student steps on generated images. Activation ranges are set along the way.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import Self, override

from ..distribution import gather, shares, sum_gradients_, total
from ..engine import Replayed, must_fit, restore_random, stage
from ..errors import UsageError
from ..quantization import set_activation_mode
from ..statistics import capture, running_statistics
from ..synthesis import ConditionalGenerator, GeneratorConfig
from .base import Method, MethodConfig, Phase, Problem
from .distillation import DistillationConfig, Student

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["AlternatingConfig", "AlternatingTraining", "save_images"]

#: Generated images that a run folder keeps for inspection.
_SHOWN = 64


@dataclass(frozen=True)
class AlternatingConfig(MethodConfig):
    """The generator and the schedule of its training.

    Attributes:
        generator: Size of the generator.
        batch: Images in a generator step.
        lr: Learning rate of Adam, with betas (0.5, 0.999).
        lr_milestones: Iterations after which the learning rate is divided by ten.
        warmup_iterations: Generator steps before the first student step.
        student_steps_per_iteration: Student steps per iteration after the warm-up; all but the
            first generate their own images.
        ranges_from: Source of the activation ranges. "generated": a moving average over the first
            `range_iterations` generated batches. With the configured range rule, "sampled":
            generated images at the end of the warm-up; "calibration": the calibration images.
        range_iterations: Number of batches for "generated".
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    batch: int = 16
    lr: float = 1e-3
    lr_milestones: list[int] = field(default_factory=lambda: [20_000, 40_000, 60_000])
    warmup_iterations: int = 10_000
    student_steps_per_iteration: int = 1
    ranges_from: Literal["generated", "sampled", "calibration"] = "generated"
    range_iterations: int = 800

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise UsageError(f"{self.name}: expected batch at least 2, got {self.batch}")
        if self.student_steps_per_iteration < 1:
            raise UsageError(
                f"{self.name}: expected student_steps_per_iteration at least 1, "
                f"got {self.student_steps_per_iteration}"
            )
        self.check_not_negative("warmup_iterations")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"{self.name}: expected lr above 0 and finite, got {self.lr}")
        if self.ranges_from == "generated" and not (
            1 <= self.range_iterations <= self.warmup_iterations
        ):
            raise UsageError(
                f"{self.name}: expected range_iterations between 1 and warmup_iterations "
                f"({self.warmup_iterations}), got {self.range_iterations}"
            )

    def scaled(self, share: float) -> Self:
        """Return the same schedule with ``share`` of its iterations."""
        return replace(
            self,
            lr_milestones=[round(m * share) for m in self.lr_milestones],
            warmup_iterations=max(round(self.warmup_iterations * share), 1),
            range_iterations=max(round(self.range_iterations * share), 1),
        )


class AlternatingTraining(Method):
    """Alternating generator and student steps. A method defines their losses and images."""

    distils = True
    needs_statistics = True

    @classmethod
    @override
    def observes(cls, settings: MethodSettings) -> bool:
        config: AlternatingConfig = getattr(settings, cls.sections[0])
        return config.ranges_from == "generated"

    def __init__(
        self, problem: Problem, config: AlternatingConfig, distillation: DistillationConfig
    ) -> None:
        self.problem = problem
        self.schedule = config
        self.distillation = distillation
        self.iterations = config.warmup_iterations + math.ceil(
            distillation.steps / config.student_steps_per_iteration
        )
        self.random = problem.random()
        with torch.no_grad():
            layers = capture(problem.teacher, problem.images[:1]).layers
        self.running = running_statistics(layers)
        with must_fit(
            **{f"settings__{config.name}__generator__channels": config.generator.channels}
        ):
            with torch.random.fork_rng():  # the initial weights depend only on the seed
                torch.manual_seed(problem.seed)
                self.generator = self.build_generator().to(problem.device)
            self.generator_optimizer = torch.optim.Adam(
                self.generator.parameters(), lr=config.lr, betas=(0.5, 0.999)
            )
        self.replayed_generator = Replayed(self.generator.parameters(), self.random)
        self.quantization = problem.quantization
        self.student = problem.student()
        self.trainer = Student(self.student, problem, distillation)
        #: Generated images in a student step.
        self.student_batch = distillation.real_batch + distillation.generated_batch
        if config.ranges_from == "calibration":
            if not self.real_images:
                raise UsageError(
                    f"{config.name}: expected ranges_from generated or sampled, because the method "
                    "must not use real images, got calibration"
                )
            problem.calibrate(self.student, problem.images)

    # ---- what a method defines --------------------------------------------------------------

    def build_generator(self) -> ConditionalGenerator:
        """Build the generator on the CPU."""
        return ConditionalGenerator(
            self.problem.num_classes,
            self.problem.image_size,
            self.schedule.generator,
            self.problem.channels,
        )

    @abstractmethod
    def generator_loss(self, iteration: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Compute the loss of the generator in one forward pass.

        Returns:
            The terms of the loss, with their sum as "generator"; images for the student; their
            labels. Each rank returns its share of the images and all labels.
        """

    @property
    def generator_sizes(self) -> dict[str, int]:
        """Settings that determine the memory of a generator step, for `must_fit`."""
        return {f"settings__{self.schedule.name}__batch": self.schedule.batch}

    def phase(self, iteration: int) -> Hashable | None:
        """Return a key for the host's decisions in `generator_loss`.

        Iterations with the same key share one CUDA graph. None, if the decisions vary: no graph is
        made.
        """
        return None

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Generate images ``[count, C, H, W]`` with random labels ``[count]``."""
        labels = self.draw_labels(count)
        return self.generator.sample(labels, self.random), labels

    def student_images(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Make the student's batch from generated images ``[student_batch, C, H, W]``."""
        return images, labels

    # ---- the steps --------------------------------------------------------------------------

    @override
    def step(self, iteration: int) -> Mapping[str, Tensor]:
        schedule = self.schedule
        with must_fit(**self.generator_sizes):
            metrics, images, labels = self.generator_step(iteration)
        if schedule.ranges_from == "generated" and iteration < schedule.range_iterations:
            self.range_step(iteration, images)
        if schedule.ranges_from == "sampled" and iteration + 1 == max(
            schedule.warmup_iterations, 1
        ):
            self.set_ranges()
        if iteration >= schedule.warmup_iterations:
            if self.student_batch > schedule.batch:
                images, labels = self.generate()
            metrics |= self.student_step(images, labels)
            more = min(
                schedule.student_steps_per_iteration - 1,
                self.distillation.steps - self.trainer.steps_done,
            )
            for _ in range(more):
                self.student_step(*self.generate())
        return metrics

    def generator_step(self, iteration: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Take one Adam step on `generator_loss`; return its result, detached."""
        for group in self.generator_optimizer.param_groups:
            decays = sum(iteration >= m for m in self.schedule.lr_milestones)
            group["lr"] = self.schedule.lr * 0.1**decays

        def step() -> dict[str, Tensor]:
            return self.generator_gradients(iteration)

        phase = self.phase(iteration)
        replayed = phase is not None and self.problem.replays
        found = self.replayed_generator(step, key=phase) if replayed else step()
        images, labels = found.pop("images"), found.pop("labels")
        sum_gradients_(self.generator.parameters())
        with stage("generator: optimizer"):
            self.generator_optimizer.step()
        return total(found), images, labels

    def generator_gradients(self, iteration: int) -> dict[str, Tensor]:
        """Run the forward and backward pass of `generator_loss`; return its results by name."""
        # Frees the memory of the previous gradients for this pass.
        self.generator_optimizer.zero_grad(set_to_none=True)
        losses, images, labels = self.generator_loss(iteration)
        with stage("generator: backward"):
            losses["generator"].backward()
        found = {name: loss.detach() for name, loss in losses.items()}
        return found | {"images": images.detach(), "labels": labels}

    @torch.no_grad()
    def range_step(self, iteration: int, images: Tensor) -> None:
        """Update the activation ranges with one generated batch. Fix them after the last batch."""
        if iteration == 0:
            set_activation_mode(self.student, "observe")
        self.student(images)
        if iteration + 1 == self.schedule.range_iterations:
            set_activation_mode(self.student, "quantize")

    @torch.no_grad()
    def set_ranges(self) -> None:
        """Set the activation ranges from at least one generated image per class."""
        batches = math.ceil(self.problem.num_classes / self.student_batch)
        images = [self.all_images(*self.generate()) for _ in range(batches)]
        self.problem.calibrate(self.student, images)

    def student_step(self, images: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        """Take a student step on the batch that `student_images` makes; return the metrics."""
        with stage("student: images"):
            images = self.all_images(images, labels)[: self.student_batch]
            images, labels = self.student_images(images, labels[: self.student_batch])
        return self.trainer.step(images, labels)

    def all_images(self, images: Tensor, labels: Tensor) -> Tensor:
        """Gather the images of all ranks."""
        return gather(images, shares(len(labels)))

    @torch.no_grad()
    def generate(self) -> tuple[Tensor, Tensor]:
        """Generate `student_batch` labelled images, without a generator step."""
        with self.problem.autocast(), stage("student: images"):
            return self.draw(self.student_batch)

    def draw_labels(self, count: int) -> Tensor:
        """Draw uniformly random labels ``[count]``."""
        return torch.randint(
            self.problem.num_classes,
            (count,),
            generator=self.random,
            device=self.problem.device,
        )

    # ---- state ------------------------------------------------------------------------------

    @property
    @override
    def phases(self) -> list[Phase]:
        warmup = self.schedule.warmup_iterations
        return [Phase(n) for n in (warmup, self.iterations - warmup) if n]

    @property
    @override
    def synthetic_images(self) -> int:
        return self.trainer.steps_done * self.student_batch

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "trainer": self.trainer.state_dict(),
            "random": self.random.get_state(),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.trainer.load_state_dict(state["trainer"])
        restore_random(self.random, state["random"])

    @override
    def save_artifacts(self, folder: Path) -> None:
        """Write the generator and some labelled images as safetensors."""
        before = self.random.get_state()
        with torch.no_grad():
            images, labels = self.draw(_SHOWN)
        self.random.set_state(before)
        state = {name: tensor.cpu() for name, tensor in self.generator.state_dict().items()}
        save_file(state, str(folder / "generator.safetensors"))
        save_images(folder / "images.safetensors", images, labels)


def save_images(path: Path, images: Tensor, labels: Tensor) -> None:
    """Write normalised images ``[n, C, H, W]`` and their labels ``[n]`` or ``[n, K]``."""
    labels = labels if labels.dim() == 1 else labels.argmax(1)
    save_file({"images": images.float().cpu().contiguous(), "labels": labels.cpu()}, str(path))
