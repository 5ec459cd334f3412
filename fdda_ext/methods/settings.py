"""All settings of the methods, one section each; a preset is a file of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UsageError
from ..statistics import Distortion
from ..synthesis import GeneratorConfig
from .distillation import DistillationConfig

__all__ = ["FDDAConfig", "MethodSettings"]


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


@dataclass(frozen=True)
class MethodSettings:
    """One section for each mechanism.

    Attributes:
        distillation: The student step.
        fdda: The generator of FDDA.
    """

    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    fdda: FDDAConfig = field(default_factory=FDDAConfig)
