"""ZeroQ: a novel zero shot quantization framework (Cai et al., CVPR 2020).

Without any data and without training: images are optimised until each of them, by itself, causes
the means and standard deviations that the teacher's batch normalisations have stored, and has mean
0 and deviation 1 itself::

    L = 1/N sum_n sum_l |m_nl - mu_l|^2 + |s_nl - sigma_l|^2  +  |m_n - 0|^2 + |s_n - 1|^2

They then set the activation ranges. With ``average_bits`` they also choose the bits of every
layer's weights: the sensitivity of layer i at k bits is the divergence of the outputs when its
weights alone are quantized, and the sum over layers is to be least within the size::

    Omega_i(k) = 1/N sum_n KL(softmax(T(x_n)) || softmax(T_i,k(x_n)))

With the settings' distillation.steps above 0 the student then learns on the images, labelled by the
teacher ("ZeroQ + fine-tuning" of later papers).

The published code starts from uniform noise, here it is Gaussian of the same deviation; it takes
convolution outputs in module order where batch normalisations' inputs are meant, which are taken.
Mixed precision was never published as code; it is written from the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from typing_extensions import override

from ..engine import stage
from ..errors import UsageError
from ..quantization import allocate_bits, bits_table
from ..statistics import LayerStatistics, image_alignment
from .base import Problem
from .optimised_images import OptimisedImages, OptimisedImagesConfig

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["ZeroQ", "ZeroQConfig", "with_images"]


@dataclass(frozen=True)
class ZeroQConfig(OptimisedImagesConfig):
    """ZeroQ's images, and its mixed precision.

    Attributes:
        average_bits: Of a weight, at most; layers then get `candidate_bits` by their sensitivity.
            None for the quantization's own bits. A run's bits.txt says what each layer got.
        candidate_bits: What a layer may get.
    """

    name = "zeroq"

    average_bits: float | None = None
    candidate_bits: list[int] = field(default_factory=lambda: [2, 4, 8])

    def __post_init__(self) -> None:
        if not self.candidate_bits or not all(2 <= bits <= 8 for bits in self.candidate_bits):
            raise UsageError(
                f"zeroq: expected candidate_bits between 2 and 8, got {self.candidate_bits}"
            )
        least = min(self.candidate_bits)
        if self.average_bits is not None and not least <= self.average_bits < math.inf:
            raise UsageError(
                "zeroq: expected average_bits at least the fewest of candidate_bits "
                f"({self.candidate_bits}), got {self.average_bits}"
            )


def with_images(running: LayerStatistics, channels: int) -> LayerStatistics:
    """``running [1, C_l]`` with the image in front, as a layer of mean 0 and variance 1."""
    zeros = running.means[0].new_zeros((1, channels))
    return LayerStatistics([zeros, *running.means], [zeros + 1, *running.variances])


class ZeroQ(OptimisedImages):
    """Images that match the stored BN statistics one by one."""

    summary = "no data: images optimised to the network's BN statistics set the ranges"
    presets = "zeroq"
    sections = ("zeroq", "distillation")
    labelled = False

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.zeroq
        super().__init__(problem, self.config, settings.distillation)
        self.targets = with_images(self.running, problem.channels)

    @override
    def image_loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        seen = self.teach(images)
        with stage("images: losses"):
            return {"images": image_alignment([images, *seen.inputs], self.targets).sum(1).mean()}

    @override
    def set_ranges(self) -> None:
        if self.config.average_bits is not None:
            sizes = {row.name: math.prod(row.weight_shape) for row in bits_table(self.student)}
            self.set_bits(allocate_bits(self.sensitivity(), sizes, self.config.average_bits))
        super().set_ranges()

    @torch.no_grad()
    def sensitivity(self) -> dict[str, dict[int, float]]:
        """Omega of every layer, by name, at every number of candidate bits."""
        images = self.images.contiguous(memory_format=torch.channels_last)
        batches = images.split(self.synthesis.batch)
        expected = [self.teach(batch).logits.log_softmax(1) for batch in batches]
        layers = [row.name for row in bits_table(self.student)]
        found: dict[str, dict[int, float]] = {name: {} for name in layers}
        for bits in self.config.candidate_bits:
            alike = replace(
                self.quantization, weight_bits=bits, first_last_bits=None, layer_bits={}
            )
            student = replace(self.problem, quantization=alike).student()
            for name in layers:
                layer: Any = student.get_submodule(name)
                weight = {f"{name}.weight": layer.weight_quantizer(layer.weight)}
                divergence = torch.zeros((), device=images.device)
                for batch, target in zip(batches, expected, strict=True):
                    with self.problem.autocast():
                        logits = functional_call(self.problem.teacher, weight, (batch,))
                    divergence += F.kl_div(
                        logits.float().log_softmax(1), target, reduction="sum", log_target=True
                    )
                found[name][bits] = float(divergence) / len(images)
        return found

    def set_bits(self, layer_bits: dict[str, int]) -> None:
        """Begin anew with a student whose layers have these bits."""
        if layer_bits != self.quantization.layer_bits:
            self.build_student(replace(self.quantization, layer_bits=layer_bits))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "layer_bits": self.quantization.layer_bits}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.set_bits(state["layer_bits"])
        super().load_state_dict(state)
