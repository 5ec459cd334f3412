"""The label-conditional generator of GDFQ and FDDA, for any image size."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distribution import pooled_moments, shard
from ..errors import UsageError
from ..image_size import ImageSize, height_and_width
from ..ops import class_batch_stats

__all__ = ["ConditionalGenerator", "GeneratorConfig", "SuperposedGenerator"]

#: Largest height and width of a class's feature map. For 224x224 images, the generator's first maps
#: are 56x56. A thousand such maps of 32 channels take 400 MB, and the optimizer's state twice that.
_LARGEST_MAP = 8


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of the generator.

    Attributes:
        latent_dim: Dimension of the Gaussian noise.
        channels: Feature maps of the first two stages; the last stage has half as many.
        hidden_eps: Added to the variance in the two conditional BN layers before a LeakyReLU. The
            authors' 0.8 scales the activations and is part of the published behaviour.
        class_maps: Whether each class has a learned feature map, added to the first one. It has at
            most 8x8 positions and is enlarged as needed. The paper's generator has none: it
            separates classes only by the scales and shifts of BN, which takes thousands of
            iterations to learn.
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


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation with a scale and a shift for each class."""

    def __init__(self, channels: int, num_classes: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Embedding(num_classes, channels)
        self.shift = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor, batches: Tensor, num_batches: int) -> Tensor:
        """Normalise ``x [N, C, H, W]`` separately for each batch; ``batches [N]`` numbers them."""
        scale, shift = _normalisation(x, batches, num_batches, self.eps)
        own_scale, own_shift = _rows(self.scale, labels), _rows(self.shift, labels)
        return _scale_and_shift(x, scale * own_scale, shift * own_scale + own_shift)


def _rows(table: nn.Embedding, labels: Tensor) -> Tensor:
    """Rows of classes ``[N]``, or their mixtures for shares of classes ``[N, K]``."""
    return labels.to(table.weight) @ table.weight if labels.dim() == 2 else table(labels)


def _normalisation(
    x: Tensor, batches: Tensor, num_batches: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift ``[N, C]`` that give each batch mean 0 and variance 1."""
    count, mean, variance = class_batch_stats(x, batches, num_batches)
    _, (mean,), (variance,) = pooled_moments(count, [mean], [variance])
    scale = (variance + eps).rsqrt()
    return scale[batches], (-mean * scale)[batches]


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x [N, C, H, W]`` times ``scale`` plus ``shift``, both float32 ``[N, C]``."""
    scale, shift = scale[:, :, None, None].to(x.dtype), shift[:, :, None, None].to(x.dtype)
    return torch.addcmul(shift, x, scale)


class UpsampledConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by two and a 3x3 convolution, without the larger image.

    Taps that read the same pixel are added first. Each of the four positions in a 2x2 square of the
    result is then a 2x2 convolution of the small image, with 4 products instead of 9. The result is
    equal except for the order of additions.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C_in, H, W]`` to ``[N, C_out, 2H, 2W]``, channels_last."""
        kernel = _two_taps(_two_taps(self.weight, 3), 3)  # [2, 2, C_out, C_in, 2, 2]
        kernel = kernel.flatten(0, 2).contiguous(memory_format=torch.channels_last)
        assert self.bias is not None
        y = F.conv2d(F.pad(x, (1, 1, 1, 1)), kernel, self.bias.repeat(4))
        result: Tensor = _Interleave.apply(y)
        return result


def _two_taps(weight: Tensor, dim: int) -> Tensor:
    """Two 2-tap kernels of a 3-tap kernel on an upsampled line, in a new dimension 0."""
    a, b, c = weight.unbind(dim)
    return torch.stack([torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)])


class _Interleave(torch.autograd.Function):
    """Join the results of four convolutions ``[N, (2, 2, C), H + 1, W + 1]`` to one image.

    The result for row p and column q of a square is read p rows and q columns further on.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        batch, channels, height, width = y.shape
        channels, height, width = channels // 4, height - 1, width - 1
        ctx.size = (batch, height + 1, width + 1, 2, 2, channels)
        quarters = y.permute(0, 2, 3, 1).unflatten(3, (2, 2, channels))
        x = y.new_empty((batch, height, 2, width, 2, channels))
        for p, q in itertools.product(range(2), range(2)):
            x[:, :, p, :, q] = quarters[:, p : p + height, q : q + width, p, q]
        return x.view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        batch, rows, columns, _, _, channels = ctx.size
        height, width = rows - 1, columns - 1
        grad = grad.permute(0, 2, 3, 1).reshape(batch, height, 2, width, 2, channels)
        quarters = grad.new_zeros(ctx.size)
        for p, q in itertools.product(range(2), range(2)):
            quarters[:, p : p + height, q : q + width, p, q] = grad[:, :, p, :, q]
        return quarters.flatten(3).permute(0, 3, 1, 2)


class ConditionalGenerator(nn.Module):
    """Generator G(z, y) of images in the *normalised* input space of the teacher.

    It consists of a linear layer to a quarter of height and width, conditional BN, two stages
    (nearest upsampling by 2, 3x3 convolution, conditional BN, LeakyReLU), a 3x3 convolution to the
    image's channels, tanh, and batch normalisation without affine parameters. The last gives every
    channel mean 0 and variance 1 over the batch, as normalised images have. There are no running
    statistics: the generator always works as in training.

    Args:
        num_classes: Number of classes, K.
        image_size: Height and width of the images, at least 4. If they are not multiples of 4, a
            larger image is made and cropped.
        config: Settings; None for the defaults.
        image_channels: Number of channels of the images, C.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: ImageSize,
        config: GeneratorConfig | None = None,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        self.height, self.width = height_and_width(image_size)
        if min(self.height, self.width) < 4:
            raise UsageError(f"generator: expected image_size at least 4, got {image_size}")
        config = config or GeneratorConfig()
        self.num_classes = num_classes
        self.latent_dim = config.latent_dim
        self.initial_size = (-(-self.height // 4), -(-self.width // 4))
        channels, last = config.channels, config.channels // 2
        self.project = nn.Linear(config.latent_dim, channels * math.prod(self.initial_size))
        self.class_maps: nn.Embedding | None = None
        if config.class_maps:
            height, width = (min(side, _LARGEST_MAP) for side in self.initial_size)
            self.map_size = (height, width)
            self.class_maps = nn.Embedding(num_classes, channels * height * width)
        self.norm_a = ConditionalBatchNorm(channels, num_classes, eps=1e-5)
        self.conv_b = UpsampledConv2d(channels, channels)
        self.norm_b = ConditionalBatchNorm(channels, num_classes, eps=config.hidden_eps)
        self.conv_c = UpsampledConv2d(channels, last)
        self.norm_c = ConditionalBatchNorm(last, num_classes, eps=config.hidden_eps)
        self.to_image = nn.Conv2d(last, image_channels, 3, padding=1)

    def forward(self, noise: Tensor, labels: Tensor, num_batches: int = 1) -> Tensor:
        """Make images.

        Args:
            noise: Standard normal noise ``[N, latent_dim]``.
            labels: Classes, int64 ``[N]``, or shares of all classes, float ``[N, K]``.
            num_batches: Number of batches in this pass, N / num_batches images each. Each is
                normalised by itself.

        Returns:
            Images ``[N, C, H, W]``, float32.
        """
        count = labels.shape[0]
        batches = torch.arange(num_batches, device=labels.device)
        batches = batches.repeat_interleave(count // num_batches, output_size=count)
        x = self.project(noise)
        if self.class_maps is not None:
            x = x + self._class_maps(labels)
        x = x.unflatten(1, (-1, *self.initial_size))
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.norm_a(x, labels, batches, num_batches)
        x = F.leaky_relu(self.norm_b(self.conv_b(x), labels, batches, num_batches), 0.2, True)
        x = F.leaky_relu(self.norm_c(self.conv_c(x), labels, batches, num_batches), 0.2, True)
        x = torch.tanh(self.to_image(x).float())
        top, left = (x.shape[2] - self.height) // 2, (x.shape[3] - self.width) // 2
        x = x[:, :, top : top + self.height, left : left + self.width]
        return _scale_and_shift(x, *_normalisation(x, batches, num_batches, eps=1e-5))

    def _class_maps(self, labels: Tensor) -> Tensor:
        """Feature maps of ``labels``, flat, ``[N, channels * height * width]``."""
        assert self.class_maps is not None
        maps = _rows(self.class_maps, labels)
        if self.map_size == self.initial_size:
            return maps
        maps = maps.unflatten(1, (-1, *self.map_size))
        maps = F.interpolate(maps, self.initial_size, mode="bilinear", align_corners=False)
        return maps.flatten(1)

    def sample(self, labels: Tensor, generator: torch.Generator, num_batches: int = 1) -> Tensor:
        """Make one image for every label ``[N]``, with noise from ``generator``.

        Returns:
            Images ``[N, C, H, W]``. Each of several ranks makes its share of every batch.
        """
        return self(*self.inputs(labels, generator, num_batches), num_batches)

    def inputs(
        self, labels: Tensor, generator: torch.Generator, num_batches: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Return the arguments that `sample` passes to `forward`: this rank's noise and labels."""
        noise = torch.randn(
            (labels.shape[0], self.latent_dim), generator=generator, device=labels.device
        )
        noise, labels = (
            torch.cat([shard(batch) for batch in x.chunk(num_batches)]) for x in (noise, labels)
        )
        return noise, labels


class SuperposedGenerator(ConditionalGenerator):
    """Generator whose input is a superposition of class embeddings (Qimera, NeurIPS 2021).

    Images from the embeddings of several classes lie between these classes, where a quantized
    network makes mistakes.

    Args:
        num_classes: Number of classes, K.
        image_size: See `ConditionalGenerator`.
        config: See `ConditionalGenerator`; ``latent_dim`` is the width of mapped embeddings.
        embeddings: Initial values of the trainable class embeddings, ``[K, D]``.
        image_channels: See `ConditionalGenerator`.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: ImageSize,
        config: GeneratorConfig,
        embeddings: Tensor,
        image_channels: int = 3,
    ) -> None:
        super().__init__(num_classes, image_size, config, image_channels)
        self.embedding = nn.Embedding.from_pretrained(embeddings.float().clone(), freeze=False)
        #: The disentanglement mapping, A.
        self.disentangle = nn.Linear(embeddings.shape[1], config.latent_dim)

    def superpose(self, classes: Tensor, weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``sum_s w_s A norm(E[c_s] + z_s)`` and the share of every class in it.

        Args:
            classes: Classes c, int64 ``[N, S]``.
            weights: Weights w, float ``[N, S]``; each row sums to 1.
            noise: Standard normal noise z, ``[N, S, D]``.

        Returns:
            Input of the generator ``[N, latent_dim]``, and its soft labels ``[N, K]``.
        """
        embedded = self.embedding(classes) + noise
        mapped = self.disentangle(F.layer_norm(embedded, embedded.shape[-1:]))
        shares = weights.new_zeros((classes.shape[0], self.num_classes))
        shares = shares.scatter_add(1, classes, weights)
        return (weights.unsqueeze(2) * mapped).sum(1), shares
