"""DSG: diversifying sample generation (Zhang et al., CVPR 2021; journal: Qin et al., TPAMI 2023).

ZeroQ's images all have the same statistics and all fit all layers alike. DSG gives them room: the
alignment with the statistics of layer l counts beyond a margin only, and that of image n counts
twice in a layer of its own::

    L = 1/N sum_n sum_l (1 + [l = n mod L]) l_nl
    l_nl = |max(|m_nl - mu_l| - delta_l, 0)|^2 + |max(|s_nl - sigma_l| - gamma_l, 0)|^2

delta and gamma are quantiles, over images and channels, of the same deviations in images of
Gaussian noise. The image's own mean and deviation are ZeroQ's terms, without a margin.

The journal version adds, as options here:

* ``priors``: ``2 CE(T(x), y) + 0.01 TV(x) + 0.01 mean |x|`` with random labels;
* ``spatial``: let G be the Gram matrix of the images, each of length 1, with eigenvalues a and
  eigenvectors u, and H, b, v the same of fresh Gaussian noise; then, over L::

      1e-4 mean_k (a_k - b_k)^2 + sum_k w_k (1 - |<u_k, v_k>|),   w: b between 0 and 1

Departures from the published code: an image's own layer counts twice, as in the paper, not four
times and in the first 20 layers alone; eigenvectors, whose sign is arbitrary, are compared by
magnitude and drawn together, where the code's absolute value of the sum pushes them apart. Its
margins were never published; they are measured here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from ..engine import stage
from ..errors import UsageError
from ..statistics import deviations, image_alignment, total_variation
from ..synthesis import ImageOptimisationConfig
from .base import Problem
from .optimised_images import OptimisedImages, OptimisedImagesConfig
from .zeroq import with_images

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["DSG", "DSGConfig", "gram_distance"]


@dataclass(frozen=True)
class DSGConfig(OptimisedImagesConfig):
    """DSG's images. The rate is that of its code.

    Attributes:
        quantile: Which one of the noise images' deviations is the margin.
        noise_images: Images of Gaussian noise that the margins are measured on.
        own_layer_weight: What an image's own layer counts on top; 0 for no enhancement.
        priors: Class, smoothness and length of the images (journal version).
        spatial: Eigen-structure of the batch's Gram matrix (journal version).
    """

    name = "dsg"

    synthesis: ImageOptimisationConfig = field(
        default_factory=lambda: ImageOptimisationConfig(images=40, batch=40, lr=0.9, patience=260)
    )
    quantile: float = 0.9
    noise_images: int = 1024
    own_layer_weight: float = 1.0
    priors: bool = False
    spatial: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.quantile <= 1:
            raise UsageError(f"dsg: expected quantile between 0 and 1, got {self.quantile}")
        if self.noise_images < 1:
            raise UsageError(f"dsg: expected noise_images at least 1, got {self.noise_images}")
        self.check_not_negative("own_layer_weight")


class DSG(OptimisedImages):
    """Images with room around the stored BN statistics."""

    summary = "no data: ZeroQ with margins around the statistics and a layer of each image's own"
    presets = "dsg"
    sections = ("dsg", "distillation")

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.dsg
        super().__init__(problem, self.config, settings.distillation)
        self.labelled = self.config.priors
        self.targets = with_images(self.running, problem.channels)
        #: delta_l and gamma_l, ``[1 + L, 2]``; those of the image are 0.
        self.margins = self.noise_margins()

    @torch.no_grad()
    def noise_margins(self) -> Tensor:
        """Quantiles of the deviations in images of noise."""
        found: list[list[Tensor]] = [[] for _ in self.running.means]
        random, left = self.problem.random(), self.config.noise_images
        while left > 0:
            count = min(left, self.synthesis.batch)
            seen = self.teach(self.noise(count, random))
            for layer, deviation in zip(found, deviations(seen.inputs, self.running), strict=True):
                layer.append(deviation.abs())
            left -= count
        margins = [torch.zeros(2, device=self.problem.device)]
        for layer in found:
            of_layer = torch.cat(layer, 1).flatten(1)  # [2, images * C_l]
            margins.append(of_layer.quantile(self.config.quantile, dim=1))
        return torch.stack(margins)

    def noise(self, count: int, random: torch.Generator) -> Tensor:
        """Standard normal images ``[count, C, H, W]``."""
        shape = (count, *self.images.shape[1:])
        noise = torch.randn(shape, generator=random, device=self.problem.device)
        return noise.contiguous(memory_format=torch.channels_last)

    @override
    def image_loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        config, layers = self.config, len(self.running.means)
        seen = self.teach(images)
        with stage("images: losses"):
            alignment = image_alignment([images, *seen.inputs], self.targets, self.margins)
            numbers = torch.arange(len(labels), device=labels.device) + len(self.images)
            own = alignment.gather(1, 1 + (numbers % layers)[:, None]).squeeze(1)
            losses = {"alignment": (alignment.sum(1) + config.own_layer_weight * own).mean()}
            if config.priors:
                losses["priors"] = (
                    2 * F.cross_entropy(seen.logits, labels)
                    + 0.01 * total_variation(images)
                    + 0.01 * images.flatten(1).norm(dim=1).mean()
                )
            if config.spatial:
                noise = self.noise(len(labels), self.random)
                losses["spatial"] = gram_distance(images, noise) / layers
        return {"images": torch.stack([*losses.values()]).sum(), **losses}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "margins": self.margins}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.margins = state["margins"]


def gram_distance(images: Tensor, noise: Tensor) -> Tensor:
    """The spatial term of ``images`` against ``noise``, both ``[N, C, H, W]``; a scalar."""
    values, vectors = _gram_eigen(images)
    noise_values, noise_vectors = _gram_eigen(noise)
    reach = (noise_values[-1] - noise_values[0]).clamp(min=1e-12)
    weights = (noise_values - noise_values[0]) / reach
    cosines = (vectors * noise_vectors).sum(0).abs()
    return 1e-4 * F.mse_loss(values, noise_values) + (weights * (1 - cosines)).sum()


def _gram_eigen(images: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[N]``, rising, and eigenvectors ``[N, N]`` in columns."""
    rows = F.normalize(images.float().flatten(1))
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    return values, vectors
