"""Top-1 and top-5 accuracy over a whole data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import UsageError

__all__ = ["Accuracy", "BatchSource", "count_outputs", "evaluate"]

#: Data sets up to this many bytes of images stay in memory between evaluations.
KEEP_BYTES = 1 << 30


@dataclass(frozen=True)
class Accuracy:
    """Percentages over ``count`` images.

    Attributes:
        top1: Share whose highest logit is the label's.
        top5: Share whose label is among the five highest logits (all logits when fewer).
        count: Number of images.
    """

    top1: float
    top5: float
    count: int


class ImageSource(Protocol):
    """Images with labels, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """Image ``[3, H, W]`` and label."""
        ...


class BatchSource:
    """Batches ``(images [B, 3, H, W], labels [B])`` of a data set, any number of times.

    Small data sets are produced once and kept.
    """

    def __init__(self, dataset: ImageSource, batch_size: int = 250, workers: int = 0):
        self._loader = DataLoader(cast(Any, dataset), batch_size=batch_size, num_workers=workers)
        self._size = len(dataset)
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        if self._size == 0:
            raise UsageError("evaluate: expected dataset to hold at least one image, got none")

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Tensor, Tensor]] | None = []
        for images, labels in self._loader:
            if kept is not None:
                kept.append((images, labels))
                if images[0].nbytes * self._size > KEEP_BYTES:
                    kept = None
            yield images, labels
        self._kept = kept


@torch.no_grad()
def count_outputs(network: nn.Module, images: Tensor, command: str) -> int:
    """How many logits ``network`` gives for ``images [N, 3, H, W]``.

    Raises:
        UsageError: If it cannot take images of this size, or gives other things than logits.
    """
    try:
        logits = network.eval()(images)
        if not isinstance(logits, Tensor):
            raise TypeError(f"it gives {type(logits).__name__} instead of logits")
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{command}: expected image_size that the model can take, "
            f"got {images.shape[-1]} ({reason})"
        ) from None
    return int(logits.shape[-1])


@torch.no_grad()
def evaluate(
    network: nn.Module, batches: BatchSource, *, device: torch.device | str = "cpu", label: str = ""
) -> Accuracy:
    """Accuracy of ``network`` in evaluation mode over all of ``batches``.

    Args:
        network: From images ``[B, 3, H, W]`` to logits ``[B, K]``.
        batches: The data.
        device: Where the network is.
        label: Shown beside the progress bar, which appears when this is not empty.

    Raises:
        UsageError: If a label is not below K.
    """
    network.eval()
    correct1 = correct5 = count = 0
    source = track(batches, description=label, transient=True) if label else batches
    for images, labels in source:
        logits = network(images.to(device)).cpu()
        if int(labels.max()) >= logits.shape[1]:
            raise UsageError(
                f"evaluate: expected labels below the network's {logits.shape[1]} classes, "
                f"got {int(labels.max())}"
            )
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        correct1 += int(best[:, 0].sum())
        correct5 += int(best.any(1).sum())
        count += labels.shape[0]
    return Accuracy(100 * correct1 / count, 100 * correct5 / count, count)
