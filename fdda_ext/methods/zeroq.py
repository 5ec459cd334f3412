"""ZeroQ: a novel zero shot quantization framework (Cai et al., CVPR 2020).

ZeroQ uses no data and no training. It optimises images until each by itself has the means and
standard deviations that the teacher's batch normalisations (BN) have stored. The image itself gets
mean 0 and standard deviation 1::

    L = 1/N sum_n sum_l |m_nl - mu_l|^2 + |s_nl - sigma_l|^2  +  |m_n - 0|^2 + |s_n - 1|^2

The images then set the activation ranges. With ``average_bits`` they also choose the weight bits of
every layer. The sensitivity of layer i at k bits is the divergence of the outputs when only its
weights are quantized. Its sum over layers is minimised within the allowed size::

    Omega_i(k) = 1/N sum_n KL(softmax(T(x_n)) || softmax(T_i,k(x_n)))

If the setting distillation.steps is above 0, the student then learns from the teacher on these
images, labelled by the teacher ("ZeroQ + fine-tuning" in later papers).

Differences::

                       | authors' code                          | here
    -------------------+----------------------------------------+-----------------------------------
    initial pixels     | uniform noise                          | Gaussian noise, same deviation
    matched statistics | of convolution outputs in module order | of BN inputs, as intended
    mixed precision    | not published                          | written from the paper
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
    """Settings of ZeroQ's images and of mixed precision.

    Attributes:
        average_bits: Largest average number of bits of a weight. Layers get `candidate_bits` by
            their sensitivity. None for the bits of the quantization. bits.txt in the run folder
            lists the result.
        candidate_bits: Bits that a layer can get.
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
                "zeroq: expected average_bits at least the smallest of candidate_bits "
                f"({self.candidate_bits}), got {self.average_bits}"
            )


def with_images(running: LayerStatistics, channels: int) -> LayerStatistics:
    """Return ``running [1, C_l]`` with the image as first layer, of mean 0 and variance 1."""
    zeros = running.means[0].new_zeros((1, channels))
    return LayerStatistics([zeros, *running.means], [zeros + 1, *running.variances])


class ZeroQ(OptimisedImages):
    """Images that each match the running statistics."""

    summary = "no data: ranges from images that match the network's BN statistics"
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
        """Return Omega by layer and number of bits."""
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
        """Build a new student if ``layer_bits`` differ from the current bits."""
        if layer_bits != self.quantization.layer_bits:
            self.build_student(replace(self.quantization, layer_bits=layer_bits))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "layer_bits": self.quantization.layer_bits}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.set_bits(state["layer_bits"])
        super().load_state_dict(state)
