"""The label-conditional generator of GDFQ and FDDA, for any image size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distribution import pooled_moments, shard, world_size
from ..errors import UsageError
from ..ops import class_batch_stats

__all__ = ["ConditionalGenerator", "GeneratorConfig"]


@dataclass(frozen=True)
class GeneratorConfig:
    """Size of the generator.

    Attributes:
        latent_dim: Dimension of the Gaussian noise.
        channels: Feature maps of the first two stages; the last has half as many.
        hidden_eps: Added to the variance in the two conditional BN layers before a LeakyReLU. The
            authors' 0.8 scales the activations and is part of the published behaviour.
        class_maps: Give every class a learned first feature map, added to the noise's. Not in the
            paper, whose generator tells classes apart by the scales and shifts of its BN alone and
            needs thousands of iterations for that.
    """

    latent_dim: int = 100
    channels: int = 128
    hidden_eps: float = 0.8
    class_maps: bool = False

    def __post_init__(self) -> None:
        for name, least in (("latent_dim", 1), ("channels", 2)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"generator: expected {name} at least {least}, got {getattr(self, name)}"
                )
        if not self.hidden_eps > 0:
            raise UsageError(f"generator: expected hidden_eps above 0, got {self.hidden_eps}")


def normalise(x: Tensor, eps: float = 1e-5) -> Tensor:
    """``x [N, C, H, W]``, every channel with mean 0 and variance 1 over the whole batch."""
    if world_size() == 1:
        return F.batch_norm(x, None, None, training=True, eps=eps)
    one_class = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    count, mean, variance = class_batch_stats(x, one_class, 1)
    _, (mean,), (variance,) = pooled_moments(count, [mean], [variance])
    scale = (variance + eps).rsqrt()
    return ((x - mean[..., None, None]) * scale[..., None, None]).to(x.dtype)


class ConditionalBatchNorm(nn.Module):
    """Batch statistics of the whole batch, then a scale and a shift of each image's own class."""

    def __init__(self, channels: int, num_classes: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Embedding(num_classes, channels)
        self.shift = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        normalised = normalise(x, self.eps)
        scale = self.scale(labels)[:, :, None, None]
        shift = self.shift(labels)[:, :, None, None]
        return torch.addcmul(shift, normalised, scale)


class ConditionalGenerator(nn.Module):
    """G(z, y): images in the *normalised* input space of the teacher.

    Linear to a quarter of the image's size, twice (conditional BN, nearest x2, convolution 3x3),
    convolution to three channels, tanh, and a last batch normalisation without affine, which gives
    every colour zero mean and unit variance over the batch, as normalised images have. There are
    no running statistics: the generator always works in the way it is trained.

    Args:
        num_classes: Labels lie below it.
        image_size: Height and width of the images, at least 4, not necessarily a multiple of 4
            (a larger image is made and its border cut).
        config: Sizes.
    """

    def __init__(
        self, num_classes: int, image_size: int, config: GeneratorConfig | None = None
    ) -> None:
        super().__init__()
        if image_size < 4:
            raise UsageError(f"generator: expected image_size at least 4, got {image_size}")
        config = config or GeneratorConfig()
        self.num_classes = num_classes
        self.image_size = image_size
        self.latent_dim = config.latent_dim
        self.initial_size = -(-image_size // 4)
        channels, last = config.channels, config.channels // 2
        self.project = nn.Linear(config.latent_dim, channels * self.initial_size**2)
        self.class_maps: nn.Embedding | None = None
        if config.class_maps:
            self.class_maps = nn.Embedding(num_classes, self.project.out_features)
        self.norm_a = ConditionalBatchNorm(channels, num_classes, eps=1e-5)
        self.conv_b = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_b = ConditionalBatchNorm(channels, num_classes, eps=config.hidden_eps)
        self.conv_c = nn.Conv2d(channels, last, 3, padding=1)
        self.norm_c = ConditionalBatchNorm(last, num_classes, eps=config.hidden_eps)
        self.to_image = nn.Conv2d(last, 3, 3, padding=1)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Make images.

        Args:
            noise: Standard normal ``[N, latent_dim]``.
            labels: Classes, int64 ``[N]``.

        Returns:
            Images ``[N, 3, image_size, image_size]``.
        """
        x = self.project(noise)
        if self.class_maps is not None:
            x = x + self.class_maps(labels)
        x = x.unflatten(1, (-1, self.initial_size, self.initial_size))
        x = self.norm_a(x, labels)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.leaky_relu(self.norm_b(self.conv_b(x), labels), 0.2)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.leaky_relu(self.norm_c(self.conv_c(x), labels), 0.2)
        x = torch.tanh(self.to_image(x))
        border = (x.shape[-1] - self.image_size) // 2
        x = x[:, :, border : border + self.image_size, border : border + self.image_size]
        return normalise(x)

    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Make one image for every label ``[N]``, with noise drawn from ``generator``.

        Returns:
            Images ``[N, 3, image_size, image_size]``; of several processes, each makes its share.
        """
        noise = torch.randn(
            (labels.shape[0], self.latent_dim), generator=generator, device=labels.device
        )
        return self(shard(noise), shard(labels))
