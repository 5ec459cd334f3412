"""DSG: diversifying sample generation (Zhang et al., CVPR 2021; journal: Qin et al., TPAMI 2023).

ZeroQ's images all have the same statistics, and all match all layers equally well. DSG makes them
more diverse: the distance from the running statistics of layer l counts only beyond a margin, and
for image n it counts twice in one layer of its own::

    L = 1/N sum_n sum_l (1 + [l = n mod L]) l_nl
    l_nl = |max(|m_nl - mu_l| - delta_l, 0)|^2 + |max(|s_nl - sigma_l| - gamma_l, 0)|^2

delta and gamma are quantiles, over images and channels, of the same deviations in images of
Gaussian noise. The mean and standard deviation of the image itself count as in ZeroQ, without a
margin.

The journal version adds two terms, which are options here:

* ``priors``: ``2 CE(T(x), y) + 0.01 TV(x) + 0.01 mean |x|`` with random labels.
* ``spatial``: Let G be the Gram matrix of the images, each scaled to length 1, with eigenvalues a
  and eigenvectors u. H, b and v are the same for new Gaussian noise. The term, divided by L, is::

      1e-4 mean_k (a_k - b_k)^2 + sum_k w_k (1 - |<u_k, v_k>|),   w: b between 0 and 1

Differences::

                               | paper        | authors' code             | here
    ---------------------------+--------------+---------------------------+---------------------
    own layer                  | counts twice | counts four times, among  | counts twice
                               |              | the first 20 layers only  |
    ---------------------------+--------------+---------------------------+---------------------
    u and v, of arbitrary sign |              | the absolute value of the | magnitudes of the
                               |              | sum pushes them apart     | cosines pull them
                               |              |                           | together
    ---------------------------+--------------+---------------------------+---------------------
    margins                    | quantiles    | not published             | measured
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
    """Settings of DSG. The default learning rate is that of its code.

    Attributes:
        quantile: Quantile of the noise images' deviations that serves as margin.
        noise_images: Images of Gaussian noise for the margins.
        own_layer_weight: Additional weight of an image's own layer; 0 for none.
        priors: Whether to add class, smoothness and length of the images (journal version).
        spatial: Whether to add eigenvalues and eigenvectors of the Gram matrix (journal version).
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
    """Images that match the running statistics up to a margin."""

    summary = "no data: ZeroQ with margins around the statistics and a preferred layer per image"
    presets = "dsg"
    sections = ("dsg", "distillation")

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config = settings.dsg
        super().__init__(problem, self.config, settings.distillation)
        self.labelled = self.config.priors
        self.targets = with_images(self.running, problem.channels)
        #: delta_l and gamma_l, ``[1 + L, 2]``; 0 for the image itself.
        self.margins = self.noise_margins()

    @torch.no_grad()
    def noise_margins(self) -> Tensor:
        """Return quantiles of the deviations in images of noise."""
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
        """Draw standard normal images ``[count, C, H, W]``."""
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
    """Return the spatial term, a scalar, of ``images`` and ``noise``, both ``[N, C, H, W]``."""
    values, vectors = _gram_eigen(images)
    noise_values, noise_vectors = _gram_eigen(noise)
    reach = (noise_values[-1] - noise_values[0]).clamp(min=1e-12)
    weights = (noise_values - noise_values[0]) / reach
    cosines = (vectors * noise_vectors).sum(0).abs()
    return 1e-4 * F.mse_loss(values, noise_values) + (weights * (1 - cosines)).sum()


def _gram_eigen(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues ``[N]`` and eigenvectors ``[N, N]`` in columns."""
    rows = F.normalize(images.float().flatten(1))
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    return values, vectors
