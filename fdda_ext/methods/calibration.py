"""Baselines without synthetic images: calibration alone, and distillation on real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from ..engine import restore_random
from .base import Method, Problem
from .distillation import ImageSampler, Student
from .settings import MethodSettings

__all__ = ["MSE", "CalibrationDistillation", "MinMax", "Noise", "Ranges"]


class Ranges(Method):
    """Ranges of weights and activations, set once from images."""

    rule: ClassVar[Literal["minmax", "mse"]]
    distributed = True
    trains = False
    learns_ranges = False

    def __init_subclass__(cls) -> None:
        cls.fixed_ranges = {"weight_range": cls.rule, "activation_range": cls.rule}

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.quantization = replace(
            problem.quantization, weight_range=self.rule, activation_range=self.rule
        )
        self.student = replace(problem, quantization=self.quantization).student()
        problem.calibrate(self.student, self.images(problem))

    def images(self, problem: Problem) -> Tensor:
        """Return the images for calibration, ``[n, C, H, W]``."""
        return problem.full_size_images

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"student": self.student.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])


class MinMax(Ranges):
    """Ranges from the smallest to the largest value of each tensor."""

    summary = "min-max ranges, no training"
    rule = "minmax"


class Noise(MinMax):
    """Min-max ranges from images of Gaussian noise: a baseline without data."""

    summary = "min-max ranges from Gaussian noise, no data, no training"
    real_images = False

    @override
    def images(self, problem: Problem) -> Tensor:
        random = problem.random()
        return torch.randn(problem.full_size_images.shape, generator=random, device=problem.device)


class MSE(Ranges):
    """Ranges that minimise the mean squared quantization error of each tensor."""

    summary = "ranges with the smallest squared error, no training"
    rule = "mse"


class CalibrationDistillation(Method):
    """FDDA without its generator: the same student step on as many images, all of them real."""

    summary = "distillation on calibration images only"
    distils = True
    distributed = True
    sections = ("distillation",)

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        config = settings.distillation
        self.iterations = config.steps
        self.random = problem.random()
        self.quantization = problem.quantization
        self.student = problem.student()
        problem.calibrate(self.student, problem.images)
        self.trainer = Student(self.student, problem, config)
        self.images = ImageSampler(problem, config.real_batch + config.generated_batch, self.random)

    @override
    def step(self, iteration: int) -> Mapping[str, Tensor]:
        return self.trainer.step(*self.images.next())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "trainer": self.trainer.state_dict(),
            "images": self.images.order,
            "random": self.random.get_state(),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["trainer"])
        self.images.order = state["images"]
        restore_random(self.random, state["random"])
