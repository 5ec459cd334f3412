"""Methods that optimise images: synthesis first, then activation ranges, then distillation.

An iteration is one step on the pixels of a batch or, once the images of a round are made, one
student step on all images so far. The images of the first round set the activation ranges.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, override

from ..engine import must_fit, restore_random, stage
from ..errors import UsageError
from ..quantization import QuantizationConfig
from ..statistics import BatchNormCapture, capture, running_statistics
from ..synthesis import ImageOptimisation, ImageOptimisationConfig
from .alternating import save_images
from .base import Method, MethodConfig, Problem
from .distillation import DistillationConfig, ImageSampler, Student

__all__ = ["OptimisedImages", "OptimisedImagesConfig"]


@dataclass(frozen=True)
class OptimisedImagesConfig(MethodConfig):
    """Settings of image synthesis.

    Attributes:
        synthesis: Number of images, steps and learning rate.
    """

    synthesis: ImageOptimisationConfig = field(default_factory=ImageOptimisationConfig)

    def scaled(self, share: float) -> Self:
        """Return the same schedule with ``share`` of its iterations."""
        return replace(self, synthesis=self.synthesis.scaled(share))


class OptimisedImages(Method):
    """Synthesis batch by batch, ranges, distillation. A method defines the loss of the images.

    Args:
        problem: Network and shape of its images.
        config: Settings of the method.
        distillation: Settings of the student step; with 0 steps, the images only set the ranges.
        rounds: Number of rounds, with equal shares of the images and the student steps.
    """

    real_images = False
    distils = True
    needs_statistics = True

    #: Whether images are made for given classes; if not, the teacher's prediction is the label.
    labelled: bool = True

    def __init__(
        self,
        problem: Problem,
        config: OptimisedImagesConfig,
        distillation: DistillationConfig,
        rounds: int = 1,
    ) -> None:
        synthesis = config.synthesis
        if synthesis.images < rounds:
            raise UsageError(
                f"{config.name}: expected images at least {rounds}, one for each round, "
                f"got {synthesis.images}"
            )
        self.problem = problem
        self.name = config.name
        self.synthesis = synthesis
        self.distillation = distillation
        self.rounds = rounds
        self.random = problem.random()
        with torch.no_grad():
            layers = capture(problem.teacher, problem.images[:1]).layers
        self.running = running_statistics(layers)
        #: Class of every image of the run, balanced, ``[images]``.
        self.labels = self._balanced_labels(synthesis.images)
        parts = [
            part.split(math.ceil(len(part) / math.ceil(len(part) / synthesis.batch)))
            for part in self.labels.tensor_split(rounds)
        ]
        self.batch_sizes = [len(batch) for part in parts for batch in part]
        #: Number of finished batches at the end of each round.
        self.round_ends = list(accumulate(len(part) for part in parts))
        self.iterations = len(self.batch_sizes) * synthesis.steps + distillation.steps
        #: Images made so far, ``[n, C, H, W]``.
        self.images = problem.images.new_empty((0, *problem.images.shape[1:]))
        self.batches_made = 0
        self.batch: ImageOptimisation | None = None
        self.sampler: ImageSampler | None = None
        self.build_student(problem.quantization)

    def _balanced_labels(self, count: int) -> Tensor:
        """Return ``count`` labels: all classes in random order, repeated."""
        classes = self.problem.num_classes
        orders = [
            torch.randperm(classes, generator=self.random, device=self.problem.device)
            for _ in range(math.ceil(count / classes))
        ]
        return torch.cat(orders)[:count]

    def build_student(self, quantization: QuantizationConfig) -> None:
        """Build a student without ranges, and its optimizer."""
        self.quantization = quantization
        self.student = replace(self.problem, quantization=quantization).student()
        self.trainer = Student(self.student, self.problem, self.distillation)

    # ---- what a method defines --------------------------------------------------------------

    @abstractmethod
    def image_loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss, with their sum as "images".

        Args:
            images: Batch as the network sees it, ``[N, C, H, W]``, with gradient. Its first image
                has the number ``len(self.images)`` in the run.
            labels: Classes of these images, ``[N]``.
        """

    def set_ranges(self) -> None:
        """Set the student's ranges from the images made so far."""
        self.problem.calibrate(self.student, self.images)

    def teach(self, images: Tensor) -> BatchNormCapture:
        """Run the teacher on ``images [N, C, H, W]``; return its BN inputs and float32 logits."""
        with self.problem.autocast(), stage("images: teacher"):
            seen = capture(self.problem.teacher, images)
        return seen._replace(logits=seen.logits.float())

    # ---- the steps --------------------------------------------------------------------------

    @property
    def rounds_made(self) -> int:
        """Number of rounds whose images are complete."""
        return sum(self.batches_made >= end for end in self.round_ends)

    @override
    def step(self, iteration: int) -> Mapping[str, Tensor]:
        if self.trainer.steps_done < self.distillation.steps * self.rounds_made // self.rounds:
            assert self.sampler is not None
            with stage("student: images"):
                images, labels = self.sampler.next()
            return self.trainer.step(images, labels)
        with must_fit(**{f"settings__{self.name}__synthesis__batch": self.synthesis.batch}):
            return self.image_step()

    def image_step(self) -> Mapping[str, Tensor]:
        """Take one step on the pixels of a batch; after the last, keep the batch."""
        first, count = self.images.shape[0], self.batch_sizes[self.batches_made]
        self.batch = self.batch or self.begin_batch(count)
        losses = self.image_loss(self.batch.show(), self.labels[first : first + count])
        with stage("images: step"):
            self.batch.step(losses["images"])
        if self.batch.finished:
            self.end_batch(self.batch.result)
        return {name: loss.detach() for name, loss in losses.items()}

    def begin_batch(self, count: int) -> ImageOptimisation:
        """Begin a batch of ``count`` images with noise."""
        problem = self.problem
        return ImageOptimisation(
            self.synthesis,
            count,
            problem.images.shape[1:],
            self.random,
            problem.pixel_range,
            problem.augmentation.flip,
        )

    @torch.no_grad()
    def end_batch(self, images: Tensor) -> None:
        """Add a batch. At the end of a round, show its images to the student."""
        first = self.images.shape[0]
        if not self.labelled:
            answers = self.teach(images.contiguous(memory_format=torch.channels_last)).logits
            self.labels[first : first + images.shape[0]] = answers.argmax(1)
        self.images = torch.cat([self.images, images])
        self.batch = None
        self.batches_made += 1
        if self.batches_made in self.round_ends:
            if self.batches_made == self.round_ends[0]:
                self.set_ranges()
            self.sampler = self.build_sampler()

    def build_sampler(self) -> ImageSampler:
        """Build a sampler of the images made so far."""
        images = self.images.contiguous(memory_format=torch.channels_last)
        shown = replace(self.problem, images=images, labels=self.labels[: images.shape[0]])
        batch = self.distillation.real_batch + self.distillation.generated_batch
        return ImageSampler(shown, batch, self.random)

    # ---- state ------------------------------------------------------------------------------

    @property
    @override
    def synthetic_images(self) -> int:
        return len(self.images)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "labels": self.labels,
            "batches_made": self.batches_made,
            "batch": None if self.batch is None else self.batch.state_dict(),
            "trainer": self.trainer.state_dict(),
            "order": None if self.sampler is None else self.sampler.order,
            "random": self.random.get_state(),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images, self.labels = state["images"], state["labels"].clone()
        self.batches_made = state["batches_made"]
        self.batch = self.sampler = None
        if state["batch"] is not None:
            self.batch = self.begin_batch(self.batch_sizes[self.batches_made])
            self.batch.load_state_dict(state["batch"])
        if state["order"] is not None:
            self.sampler = self.build_sampler()
            self.sampler.order = state["order"]
        self.trainer.load_state_dict(state["trainer"])
        restore_random(self.random, state["random"])

    @override
    def save_artifacts(self, folder: Path) -> None:
        """Write the images with their labels as safetensors."""
        save_images(folder / "images.safetensors", self.images, self.labels[: len(self.images)])
