"""Qimera: synthetic boundary supporting samples (Choi et al., NeurIPS 2021).

Qimera is GDFQ with images near the borders between classes. The generator's input is a
superposition of the embeddings of several classes, and the label is the same mixture (eq. 4 to 6)::

    g = sum_s lambda_s A norm(E[y_s] + z_s),   lambda = softmax(n),  n ~ N(0, I_S)
    q = sum_s lambda_s onehot(y_s)
    L_G = CE(T(G(g)), q) + 0.1 L_BNS

A is the disentanglement mapping. E starts from the rows of the teacher's classifier, in which
similar classes are close together. With probability p a batch is mixed; otherwise each image has a
single class.

Differences::

                       | paper | authors' code                                       | here
    -------------------+-------+-----------------------------------------------------+-------
    conditional scales |       | averaged over the S classes, although lambda        | summed
                       |       | already sums to 1; for large S, images lose         |
                       |       | contrast                                            |
    -------------------+-------+-----------------------------------------------------+-------
    A                  | on    | off                                                 | on
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import UsageError
from ..synthesis import SuperposedGenerator
from .alternating import AlternatingTraining
from .base import Problem
from .gdfq import GDFQ, GDFQConfig

if TYPE_CHECKING:
    from .settings import MethodSettings

__all__ = ["Qimera", "QimeraConfig"]


@dataclass(frozen=True)
class QimeraConfig(GDFQConfig):
    """Settings of GDFQ and of the superposition.

    Attributes:
        mixed_probability: Probability p that a batch has superposed classes.
        mixed_classes: Number S of classes in a superposition, drawn with replacement.
        embeddings: Initial class embeddings: weights of the "teacher"'s classifier, or "random".
        embedding_dim: Dimension D of random embeddings.
    """

    name = "qimera"

    mixed_probability: float = 0.4
    mixed_classes: int = 500
    embeddings: Literal["teacher", "random"] = "teacher"
    embedding_dim: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mixed_probability <= 1:
            raise UsageError(
                f"qimera: expected mixed_probability between 0 and 1, got {self.mixed_probability}"
            )
        for name in ("mixed_classes", "embedding_dim"):
            if getattr(self, name) < 1:
                raise UsageError(f"qimera: expected {name} at least 1, got {getattr(self, name)}")


class Qimera(GDFQ):
    """GDFQ with superposed class embeddings."""

    summary = "no data: GDFQ with images between classes, from superposed class embeddings"
    presets = "qimera"
    sections = ("qimera", "distillation")

    generator: SuperposedGenerator

    def __init__(self, problem: Problem, settings: MethodSettings) -> None:
        self.config: QimeraConfig = settings.qimera
        AlternatingTraining.__init__(self, problem, self.config, settings.distillation)

    @override
    def build_generator(self) -> SuperposedGenerator:
        problem = self.problem
        if self.config.embeddings == "teacher":
            embeddings = classifier_weight(problem.teacher, problem.num_classes).cpu()
        else:
            embeddings = torch.randn(problem.num_classes, self.config.embedding_dim)
        return SuperposedGenerator(
            problem.num_classes,
            problem.image_size,
            self.config.generator,
            embeddings,
            problem.channels,
        )

    @override
    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Generate images with soft labels ``[count, K]``, superposed or of single classes."""
        slots, device = self.config.mixed_classes, self.problem.device
        classes = self.draw_labels(count * slots).view(count, slots)
        weights = torch.randn((count, slots), generator=self.random, device=device).softmax(1)
        single = torch.zeros_like(weights)
        single[:, 0] = 1
        mixed = torch.rand((), generator=self.random, device=device) < self.config.mixed_probability
        width = self.generator.embedding.embedding_dim
        noise = torch.randn((count, slots, width), generator=self.random, device=device)
        latent, shares = self.generator.superpose(
            classes, torch.where(mixed, weights, single), noise
        )
        return self.generator(latent, shares), shares


def classifier_weight(network: nn.Module, num_classes: int) -> Tensor:
    """Return the weight ``[K, D]`` of the last layer that has an output for every class.

    Raises:
        UsageError: If there is no such layer.
    """
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for layer in reversed(layers):
        if layer.weight.shape[0] == num_classes:
            return layer.weight.detach().flatten(1)
    raise UsageError(
        "qimera: expected a network with a layer that has one output for every class, for the "
        f"initial embeddings, got {type(network).__name__} without it; set embeddings to random"
    )
