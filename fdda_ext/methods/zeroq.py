"""ZeroQ: a novel zero shot quantization framework (Cai et al., CVPR 2020).

Without any data and without training: images are optimised until each of them, by itself, causes
the means and standard deviations that the teacher's batch normalisations have stored, and has mean
0 and deviation 1 itself::

    L = 1/N sum_n sum_l |m_nl - mu_l|^2 + |s_nl - sigma_l|^2  +  |m_n - 0|^2 + |s_n - 1|^2

They then set the activation ranges.

With the settings' distillation.steps above 0 the student then learns on the images, labelled by the
teacher ("ZeroQ + fine-tuning" of later papers).

The published code starts from uniform noise, here it is Gaussian of the same deviation; it takes
convolution outputs in module order where batch normalisations' inputs are meant, which are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from ..engine import stage
from ..statistics import LayerStatistics, image_alignment
from .base import Problem
from .optimised_images import OptimisedImages, OptimisedImagesConfig

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["ZeroQ", "ZeroQConfig", "with_images"]


@dataclass(frozen=True)
class ZeroQConfig(OptimisedImagesConfig):
    """ZeroQ's images."""

    name = "zeroq"


def with_images(running: LayerStatistics) -> LayerStatistics:
    """``running [1, C_l]`` with the image in front, as a layer of mean 0 and variance 1."""
    zeros = running.means[0].new_zeros((1, 3))
    return LayerStatistics([zeros, *running.means], [zeros + 1, *running.variances])


class ZeroQ(OptimisedImages):
    """Images that match the stored BN statistics one by one."""

    summary = "no data: images optimised to the network's BN statistics set the ranges"
    presets = "zeroq"
    labelled = False

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.zeroq
        super().__init__(problem, self.config, settings.distillation)
        self.targets = with_images(self.running)

    @override
    def image_loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        seen = self.teach(images)
        with stage("images: losses"):
            return {"images": image_alignment([images, *seen.inputs], self.targets).sum(1).mean()}
