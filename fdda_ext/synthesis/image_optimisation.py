"""Images made from noise by gradient steps on their pixels, for any loss.

ZeroQ, DSG and DeepInversion share this part: Adam, a rule for its learning rate, and random shifts
and mirroring of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import UsageError

__all__ = ["ImageOptimisation", "ImageOptimisationConfig", "shift_and_mirror"]

#: Smallest learning rate of "plateau" (ZeroQ's code).
_LEAST_RATE = 1e-4


@dataclass(frozen=True)
class ImageOptimisationConfig:
    """Settings of optimised images; the defaults are ZeroQ's.

    Attributes:
        images: Number of images in the whole run.
        batch: Largest number of images in a batch.
        steps: Steps for each batch.
        coarse_steps: Number of first steps that see the images at half resolution. Then Adam and
            its learning rate start again.
        start_std: Standard deviation of the initial Gaussian pixels.
        lr: Learning rate of Adam.
        betas: Betas of Adam.
        schedule: Rule for the learning rate. "plateau" divides it by 10, down to 1e-4, if the loss
            has not fallen for `patience` steps. "cosine" lets it rise for `warmup_steps`, then fall
            to 0.
        patience: For "plateau", steps without a lower loss.
        warmup_steps: For "cosine", steps with a rising rate, at each resolution.
        jitter: Largest shift of the batch in each step, in pixels along each axis; half of it at
            half resolution.
        mirror: Whether each step mirrors the batch with probability 1/2, if that keeps the classes.
        clip: Whether pixels are clamped to the values that an image can have, if these are known.
        keep_best: Whether the result is the batch with the least loss, not the last one.
    """

    images: int = 64
    batch: int = 64
    steps: int = 500
    coarse_steps: int = 0
    start_std: float = 0.0136
    lr: float = 0.5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    schedule: Literal["plateau", "cosine"] = "plateau"
    patience: int = 100
    warmup_steps: int = 0
    jitter: int = 0
    mirror: bool = False
    clip: bool = False
    keep_best: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            *(("images", 1), ("batch", 1), ("steps", 1), ("patience", 1)),
            *(("warmup_steps", 0), ("jitter", 0)),
        ):
            if getattr(self, name) < least:
                raise UsageError(
                    f"synthesis: expected {name} at least {least}, got {getattr(self, name)}"
                )
        if not 0 <= self.coarse_steps < self.steps:
            raise UsageError(
                f"synthesis: expected coarse_steps at least 0 and below steps ({self.steps}), "
                f"got {self.coarse_steps}"
            )
        for name in ("start_std", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(
                    f"synthesis: expected {name} above 0 and finite, got {getattr(self, name)}"
                )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(
                "synthesis: expected betas to be two numbers at least 0 and below 1, "
                f"got {self.betas}"
            )

    def scaled(self, share: float) -> ImageOptimisationConfig:
        """Return settings for the same images with ``share`` of the steps."""
        steps = max(round(self.steps * share), 1)
        return replace(
            self,
            steps=steps,
            coarse_steps=min(round(self.coarse_steps * share), steps - 1),
            patience=max(round(self.patience * share), 1),
            warmup_steps=round(self.warmup_steps * share),
        )


class ImageOptimisation:
    """Optimisation of one batch: `show` it to a network, then take a `step` on the loss.

    Args:
        config: Settings.
        count: Number of images in the batch, N.
        image_shape: Channels, height and width.
        random: Source of the initial pixels and of all shifts and mirroring.
        pixel_range: Smallest and largest value of each channel, ``[C, 1, 1]`` each; None if
            unknown.
        may_mirror: Whether mirroring keeps the classes.
    """

    def __init__(
        self,
        config: ImageOptimisationConfig,
        count: int,
        image_shape: Sequence[int],
        random: torch.Generator,
        pixel_range: tuple[Tensor, Tensor] | None = None,
        may_mirror: bool = False,
    ) -> None:
        self.config = config
        self.random = random
        self.pixel_range = pixel_range if config.clip else None
        self.mirror = config.mirror and may_mirror
        self.steps_done = 0
        shape = (count, *image_shape)
        noise = torch.randn(shape, generator=random, device=random.device)
        #: Pixels ``[N, C, H, W]``.
        self.pixels = (noise * config.start_std).requires_grad_()
        self._clip()
        self._begin_resolution()

    def _begin_resolution(self) -> None:
        config = self.config
        first, second = config.betas
        self.optimizer = torch.optim.Adam([self.pixels], lr=config.lr, betas=(first, second))
        self.plateau = ReduceLROnPlateau(
            self.optimizer, patience=config.patience, min_lr=_LEAST_RATE
        )
        self.best = self.pixels.detach().clone()
        self.best_loss = torch.full((), math.inf, device=self.pixels.device)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.steps_done == self.config.steps

    @property
    def result(self) -> Tensor:
        """The images ``[N, C, H, W]``."""
        return self.best if self.config.keep_best else self.pixels.detach()

    def show(self) -> Tensor:
        """Return the batch that the network sees in the next step, with its autograd graph."""
        if self.steps_done == self.config.coarse_steps:
            self._begin_resolution()
        images, jitter = self.pixels, self.config.jitter
        if self.steps_done < self.config.coarse_steps:
            images, jitter = F.avg_pool2d(images, 2), jitter // 2
        if jitter or self.mirror:
            images = shift_and_mirror(images, jitter, self.mirror, self.random)
        return images.contiguous(memory_format=torch.channels_last)

    def step(self, loss: Tensor) -> None:
        """Take a step on ``loss``, a scalar computed from the result of `show`."""
        # Not backward(), which would change the gradients of a student that the loss depends on.
        (self.pixels.grad,) = torch.autograd.grad(loss, self.pixels)
        loss = loss.detach()
        if self.config.keep_best:
            better = loss < self.best_loss
            self.best = torch.where(better, self.pixels.detach(), self.best)
            self.best_loss = torch.where(better, loss, self.best_loss)
        if self.config.schedule == "cosine":
            self.optimizer.param_groups[0]["lr"] = self._cosine_rate()
        self.optimizer.step()
        if self.config.schedule == "plateau":
            self.plateau.step(float(loss))
        self._clip()
        self.steps_done += 1

    def _cosine_rate(self) -> float:
        coarse, config = self.config.coarse_steps, self.config
        begin, end = (0, coarse) if self.steps_done < coarse else (coarse, config.steps)
        done, steps, warmup = self.steps_done - begin, end - begin, config.warmup_steps
        if done < warmup:
            return config.lr * (done + 1) / warmup
        return config.lr * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (steps - warmup)))

    @torch.no_grad()
    def _clip(self) -> None:
        if self.pixel_range is not None:
            self.pixels.clamp_(*self.pixel_range)

    def state_dict(self) -> dict[str, Any]:
        """Return pixels, optimizer, best batch and number of steps done."""
        return {
            "pixels": self.pixels.detach(),
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "best": self.best,
            "best_loss": self.best_loss,
            "steps_done": self.steps_done,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.pixels.copy_(state["pixels"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        self.best, self.best_loss = state["best"].clone(), state["best_loss"].clone()
        self.steps_done = state["steps_done"]


def shift_and_mirror(images: Tensor, jitter: int, mirror: bool, random: torch.Generator) -> Tensor:
    """Roll ``images [N, C, H, W]`` by a common random shift, at most ``jitter`` pixels per axis.

    With ``mirror``, also mirror them with probability 1/2. Index tensors need no wait for a device.
    """
    height, width = images.shape[2:]
    offset = torch.randint(-jitter, jitter + 1, (2, 1), generator=random, device=images.device)
    rows = (torch.arange(height, device=images.device) + offset[0]) % height
    columns = (torch.arange(width, device=images.device) + offset[1]) % width
    if mirror:
        tails = torch.rand((), generator=random, device=images.device) < 0.5
        columns = torch.where(tails, columns.flip(0), columns)
    return images.index_select(2, rows).index_select(3, columns)
