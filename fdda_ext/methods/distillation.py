"""The student step that many methods share: distillation of the teacher into the student."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from ..data import augment
from ..distribution import shard, share_of, sum_gradients_, total
from ..engine import Replayed, must_fit, stage
from ..errors import UsageError
from ..image_size import height_and_width
from ..quantization import bits_table, project_scales_, scale_parameters
from ..reconstruction import (
    RoundingConfig,
    SoftlyRounded,
    check_ranges_stay,
    region,
    share_decided,
    soften_,
)
from .base import Problem

__all__ = [
    "DistillationConfig",
    "ImageSampler",
    "Student",
    "distillation_loss",
]


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of the student step (FDDA, ECCV 2022, section 3.4; constants of the authors' code).

    Attributes:
        steps: Student steps in the whole run.
        real_batch: Calibration images per step; synthetic ones if the method uses no real images.
        generated_batch: Generated images per step; calibration or optimised images if the method
            has no generator.
        objective: Loss of the student: "divergence", see `distillation_loss`, or "discrepancy",
            ZAQ's loss, which ignores the settings of the divergence.
        temperature: Temperature T of the softened distributions.
        weight: Weight alpha of the divergence.
        reduction: Reduction of the divergence: "batch" sums over classes and averages over images
            (FDDA); "batch_and_classes" averages over both (GDFQ), which is K times less.
        cross_entropy_weight: Weight of the cross entropy with the labels.
        optimizer: "adam", or "sgd" with Nesterov momentum 0.9.
        lr: Learning rate of weights, biases and BN's affine parameters.
        scale_lr: Learning rate of scales and zero points.
        weight_decay: Weight decay of everything except scales and zero points.
        lr_milestones: Steps after which the learning rates are divided by ten.
        cosine_half_period: Steps in which a cosine takes the learning rates to zero; then they rise
            again (the authors' 20 000 steps do not divide their 70 000). None for the whole run, 0
            for no cosine.
        frozen_scales: Whether the quantizers' ranges stay fixed.
        rounding: Settings of learned rounding (AdaRound), which replaces the training of weights.
            None to train the weights with straight-through gradients.
    """

    steps: int = 70_000
    objective: Literal["divergence", "discrepancy"] = "divergence"
    real_batch: int = 16
    generated_batch: int = 16
    temperature: float = 20.0
    weight: float = 20.0
    reduction: Literal["batch", "batch_and_classes"] = "batch"
    cross_entropy_weight: float = 1.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 1e-6
    scale_lr: float = 1e-6
    weight_decay: float = 1e-4
    lr_milestones: list[int] = field(default_factory=list)
    cosine_half_period: int | None = 20_000
    frozen_scales: bool = False
    rounding: RoundingConfig | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "real_batch", "weight", "cross_entropy_weight", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(
                    "distillation: expected "
                    f"{name} at least 0 and finite, got {getattr(self, name)}"
                )
        for name in ("generated_batch", "temperature", "lr", "scale_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(
                    f"distillation: expected {name} above 0 and finite, got {getattr(self, name)}"
                )
        if self.cosine_half_period is not None and self.cosine_half_period < 0:
            raise UsageError(
                "distillation: expected cosine_half_period at least 0, "
                f"got {self.cosine_half_period}"
            )

    @property
    def unused(self) -> dict[str, str]:
        """Fields without effect because of other fields, each with the reason."""
        found: dict[str, str] = {}
        if self.objective == "discrepancy":
            names = ("temperature", "weight", "reduction", "cross_entropy_weight")
            found |= dict.fromkeys(names, "the objective is discrepancy")
        if self.frozen_scales:
            found["scale_lr"] = "frozen_scales keeps the scales fixed"
        return found

    def scaled(self, share: float) -> DistillationConfig:
        """Return the same schedule with ``share`` of its steps."""
        period = self.cosine_half_period
        return replace(
            self,
            steps=round(self.steps * share),
            lr_milestones=[round(m * share) for m in self.lr_milestones],
            cosine_half_period=max(round(period * share), 1) if period else period,
        )


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, config: DistillationConfig
) -> Tensor:
    """Return ``CE(S, y) + alpha T^2 KL(softmax(t / T) || softmax(S / T))`` (FDDA, eq. 11).

    Args:
        student_logits: S, ``[N, K]``.
        teacher_logits: t, ``[N, K]``, without gradient.
        labels: Classes, int64 ``[N]``, or shares of the classes, float ``[N, K]``.
        config: Weights, temperature and reduction.

    Returns:
        A scalar. For large T, ``T^2 KL`` is about half the mean over classes of the squared
        difference of centred logits.
    """
    t = config.temperature
    divergence = F.kl_div(
        F.log_softmax(student_logits / t, dim=1),
        F.log_softmax(teacher_logits / t, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    if config.reduction == "batch_and_classes":
        divergence = divergence / student_logits.shape[1]
    loss = config.weight * t * t * divergence
    if config.cross_entropy_weight:
        loss = loss + config.cross_entropy_weight * F.cross_entropy(student_logits, labels)
    return loss


class ImageSampler:
    """Shuffled batches of augmented calibration images; the last partial batch is dropped."""

    def __init__(self, problem: Problem, batch_size: int, random: torch.Generator) -> None:
        self.problem = problem
        self.batch_size = min(batch_size, problem.images.shape[0])
        self.random = random
        self.order = torch.empty(0, dtype=torch.int64, device=problem.device)

    def next(self) -> tuple[Tensor, Tensor]:
        """Return images ``[B, C, H, W]`` and labels ``[B]``."""
        if self.order.numel() < self.batch_size:
            self.order = torch.randperm(
                self.problem.images.shape[0], generator=self.random, device=self.problem.device
            )
        chosen, self.order = self.order.tensor_split([self.batch_size])
        problem = self.problem
        images = augment(
            problem.full_size_images[chosen],
            problem.augmentation,
            self.random,
            size=height_and_width(problem.image_size),
        )
        return images, self.problem.labels[chosen]


class Student:
    """The student with its optimizers, trained by one distillation step at a time."""

    def __init__(self, network: GraphModule, problem: Problem, config: DistillationConfig) -> None:
        self.network = network.eval()
        self.problem = problem
        self.config = config
        self.steps_done = 0
        #: A method's own loss of a batch of images and labels, a scalar; None for `divergence`.
        self.loss: Callable[[Tensor, Tensor], Tensor] | None = None
        #: The network as trained: with softly rounded weights if rounding is learned.
        self.function, self.soft = network, list[SoftlyRounded]()
        if config.rounding is not None:
            check_ranges_stay(problem.quantization, "distillation.rounding")
            names = dict.fromkeys(row.name for row in bits_table(network))
            self.function = region(network, [str(network.graph.output_node().args[0])], ())[0]
            self.soft = soften_(self.function, names)
            for layer in self.soft:
                layer.layer.weight.requires_grad_(False)
                layer.layer.weight_quantizer.requires_grad_(False)
        scales = scale_parameters(network)
        if config.frozen_scales:
            for parameter in scales:
                parameter.requires_grad_(False)
        trained = [p for p in network.parameters() if p.requires_grad]
        scale_ids = {id(parameter) for parameter in scales}
        groups = [
            {
                "params": [p for p in trained if id(p) not in scale_ids],
                "lr": config.lr,
                "weight_decay": config.weight_decay,
            },
            {
                "params": [p for p in trained if id(p) in scale_ids],
                "lr": config.scale_lr,
                "weight_decay": 0.0,
            },
        ]
        groups = [group for group in groups if group["params"]]
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        else:
            optimizer = torch.optim.Adam(groups)
        self.full_rates = [group["lr"] for group in optimizer.param_groups]
        self.optimizers = [optimizer]
        if config.rounding is not None:
            alphas = [layer.alpha for layer in self.soft]
            self.optimizers.append(torch.optim.Adam(alphas, lr=config.rounding.lr))
        self.parameters: list[Tensor] = [
            parameter
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        self.replayed = Replayed(self.parameters)

    def rate_factor(self) -> float:
        """Return the factor of the learning rates: milestones times cosine annealing.

        The cosine is 1 at the start, 0 after a half period, then 1 again.
        """
        factor = 0.1 ** sum(self.steps_done >= m for m in self.config.lr_milestones)
        half_period = self.config.cosine_half_period
        if half_period == 0:
            return factor
        half_period = half_period or max(self.config.steps, 1)
        return factor * 0.5 * (1 + math.cos(math.pi * self.steps_done / half_period))

    def check_objective(self) -> None:
        """Refuse an objective that the method does not define.

        Raises:
            UsageError: If it is "discrepancy" and the method has no loss of its own, or if it is
                "discrepancy" and rounding is learned.
        """
        if self.config.objective == "discrepancy" and self.loss is None:
            raise UsageError(
                "distillation: expected objective divergence with this method, got discrepancy"
            )
        if self.config.objective == "discrepancy" and self.soft:
            raise UsageError(
                "distillation: expected rounding null with the objective discrepancy, "
                f"got {self.config.rounding}"
            )

    def divergence(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return `distillation_loss` for ``images [N, C, H, W]``."""
        with torch.no_grad(), self.problem.autocast(), stage("student: teacher"):
            teacher_logits = self.problem.teacher(images).float()
        with stage("student: forward"):
            return distillation_loss(self.function(images), teacher_logits, labels, self.config)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Distil the teacher into the student on ``images [N, C, H, W]``; return scalar metrics.

        ``student`` is the loss. If rounding is learned, ``decided`` is the share of decided
        roundings; ``regulariser`` follows after the warm-up. Each rank passes the whole batch and
        computes on its share.
        """
        share = share_of(len(labels))
        images, labels = shard(images), shard(labels)
        for group, rate in zip(self.optimizers[0].param_groups, self.full_rates, strict=True):
            group["lr"] = rate * self.rate_factor()
        regulariser = self.regulariser()
        with must_fit(**self.sizes(len(images))):
            gradients = partial(self.gradients, share=share, regulariser=regulariser)
            # A method's own loss and AdaRound's schedule may change with the step.
            if self.problem.replays and self.loss is None and not self.soft:
                found = self.replayed(gradients, images, labels)
            else:
                found = gradients(images, labels)
            sum_gradients_(self.parameters)
            with stage("student: optimizer"):
                for optimizer in self.optimizers:
                    optimizer.step()
                project_scales_(self.network)
                # `network` always has hard roundings, because it is evaluated between steps.
                for layer in self.soft:
                    layer.bake()
        self.steps_done += 1
        metrics: dict[str, Tensor] = {}
        if self.soft:
            metrics["decided"] = share_decided(self.soft)
        if regulariser is not None:
            metrics["regulariser"] = regulariser.detach()
        return metrics | total(found)

    def sizes(self, images: int) -> dict[str, int]:
        """Return the settings that determine the memory of a step on ``images``, for `must_fit`."""
        batches = {
            f"settings__distillation__{name}": getattr(self.config, name)
            for name in ("real_batch", "generated_batch")
        }
        largest = dict(sorted(batches.items(), key=lambda item: -item[1]))
        if self.loss is not None:  # it needs the whole batch
            return largest
        return {"images_at_once": -(-images // self.problem.parts(images)), **largest}

    def gradients(
        self, images: Tensor, labels: Tensor, *, share: float, regulariser: Tensor | None
    ) -> dict[str, Tensor]:
        """Run the forward and backward pass of ``share`` of the loss; return it as ``student``.

        Batches of large images are processed in parts, and the gradients are added up. This is
        possible because the divergence is a mean over images, and the student treats each image by
        itself.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        parts = self.problem.parts(len(images)) if self.loss is None else 1
        losses: list[Tensor] = []
        for own_images, own_labels in zip(
            images.tensor_split(parts), labels.tensor_split(parts), strict=True
        ):
            own = share if parts == 1 else share * len(own_images) / len(images)
            loss = objective = own * (self.loss or self.divergence)(own_images, own_labels)
            if regulariser is not None and not losses:
                assert self.config.rounding is not None
                objective = loss + share * self.config.rounding.weight * regulariser
            with stage("student: backward"):
                objective.backward()
            losses.append(loss.detach())
        return {"student": torch.stack(losses).sum() if parts > 1 else losses[0]}

    def regulariser(self) -> Tensor | None:
        """Return AdaRound's regulariser; None during the warm-up or without learned rounding."""
        rounding = self.config.rounding
        beta = None if rounding is None else rounding.beta(self.steps_done / self.config.steps)
        if beta is None:
            return None
        return torch.stack([layer.regulariser(beta) for layer in self.soft]).sum()

    def state_dict(self) -> dict[str, Any]:
        """Return weights, ranges, roundings, optimizers and the position in the schedule."""
        return {
            "network": self.network.state_dict(),
            "alphas": [layer.alpha.detach() for layer in self.soft],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        with torch.no_grad():
            for layer, alpha in zip(self.soft, state["alphas"], strict=True):
                layer.alpha.copy_(alpha)
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.steps_done = state["steps_done"]
