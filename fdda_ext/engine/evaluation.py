"""Top-1 and top-5 accuracy over a data set."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from ..distribution import rank, total_counts, world_size
from ..errors import UnreadableImageError, UsageError
from .memory import must_fit, parts_of
from .progress import ProgressBar, progress_bar

__all__ = [
    "Accuracy",
    "BatchSource",
    "count_correct",
    "evaluate",
    "render_percent",
    "standard_error",
]

_log = logging.getLogger("fdda_ext")

#: Data sets with up to this many bytes of images stay in memory between evaluations.
KEEP_BYTES = 1 << 30


def standard_error(percent: float, count: int, of: int) -> float:
    """Return the standard error of a sample's accuracy, in percentage points.

    It is ``100 * sqrt(p * (1 - p) / count * (of - count) / (of - 1))`` with ``p = percent / 100``:
    the binomial error, corrected for sampling from ``of`` images without replacement.
    Stratification by class, which makes the error a little smaller, is ignored.

    Args:
        percent: Accuracy on the sample, in per cent.
        count: Number of images in the sample.
        of: Number of images that it was drawn from.

    Returns:
        The standard error; 0 if all images were tested.
    """
    if not 0 < count < of:
        return 0.0
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / count * (of - count) / (of - 1))


def render_percent(percent: float, count: int, of: int) -> str:
    """Format a percentage, with its standard error for a sample: ``81.20``, ``81.20 ± 0.39``."""
    text = f"{percent:.2f}"
    return f"{text} ± {standard_error(percent, count, of):.2f}" if 0 < count < of else text


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over ``count`` images, in per cent.

    Attributes:
        top1: Share of images whose label has the highest logit.
        top5: Share of images whose label is among the five highest logits (all if there are fewer).
        count: Number of images.
        of: Number of images that these are a sample of; 0 if they are no sample.
    """

    top1: float
    top5: float
    count: int
    of: int = 0

    @property
    def is_sample(self) -> bool:
        """Whether only a sample of the images was tested."""
        return self.count < self.of

    @property
    def standard_error(self) -> float:
        """Standard error of `top1`, in percentage points; 0 if all images were tested."""
        return standard_error(self.top1, self.count, self.of)

    def __str__(self) -> str:
        """Format both percentages, with standard errors for a sample."""
        top1, top5 = (render_percent(x, self.count, self.of) for x in (self.top1, self.top5))
        text = f"top-1 {top1} %, top-5 {top5} %"
        if self.is_sample:
            return f"{text} (standard error; {self.count} of {self.of} images)"
        return f"{text}, {self.count} images"


class ImageSource(Protocol):
    """Labelled images, accessed by index."""

    @property
    def labels(self) -> Tensor:
        """Labels of all images, int64 ``[n]``."""
        ...

    def __len__(self) -> int: ...

    def pixels(self, index: int, /) -> Tensor:
        """Return one image ``[C, H, W]``, uint8, or float32 from 0 to 1."""
        ...

    def normalise(self, pixels: Tensor, /) -> Tensor:
        """Return float32 images for the network, on the device of ``pixels``."""
        ...


class _Pixels:
    """The images of a source, with error messages in the place of damaged images.

    An exception from a worker process would arrive as a traceback.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            return self.source.pixels(index), int(self.source.labels[index])
        except UnreadableImageError as error:
            return str(error)


def _collate(items: list[Any]) -> tuple[list[Tensor], list[str]]:
    """Return pixels and labels of readable images, and error messages of the others."""
    readable = [item for item in items if not isinstance(item, str)]
    batch = list(default_collate(readable)) if readable else []
    return batch, [item for item in items if isinstance(item, str)]


class BatchSource:
    """Batches ``(pixels [B, C, H, W], labels [B])`` of a data set, for any number of passes.

    Pixels are the stored values, mostly uint8, which take a quarter of the memory and transfer time
    of normalised images. `normalise` is for use on the GPU. Small data sets are decoded once and
    kept. Each rank gets its own batches.

    Args:
        dataset: The images.
        batch_size: B. The last batch and batches with damaged images are smaller.
        workers: Number of processes that decode images; 0 for this process.
        max_unreadable: Number of damaged files to skip, each with a warning of the logger
            ``fdda_ext``. One more is an error.

    Raises:
        UsageError: If the data set is empty.
    """

    def __init__(
        self,
        dataset: ImageSource,
        batch_size: int = 250,
        workers: int = 0,
        max_unreadable: int = 0,
    ) -> None:
        if len(dataset) == 0:
            raise UsageError("evaluate: expected dataset to hold at least one image, got none")
        self.dataset = dataset
        self.batch_size = batch_size
        self.max_unreadable = max_unreadable
        self.unreadable = 0
        indices = range(len(dataset))
        batches = [indices[i : i + batch_size] for i in indices[::batch_size]]
        self._loader = DataLoader(
            cast(Any, _Pixels(dataset)),
            batch_sampler=cast(Any, batches[rank() :: world_size()]),
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
        )
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return float32 images for the network, on the device of ``pixels``."""
        return self.dataset.normalise(pixels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches.

        Raises:
            UsageError: If more files than ``max_unreadable`` are damaged.
        """
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Tensor, Tensor]] | None = []
        self.unreadable = 0
        for batch, damaged in self._loader:
            for message in damaged:
                self.unreadable += 1
                if self.unreadable > self.max_unreadable:
                    more = f", after {self.unreadable - 1} others" if self.unreadable > 1 else ""
                    raise UsageError(f"{message}{more}; raise --max_unreadable to skip it")
                _log.warning("%s; it is skipped", message)
            if not batch:
                continue
            pixels, labels = batch
            if kept is not None:
                kept.append((pixels, labels))
                if pixels[0].nbytes * len(self.dataset) > KEEP_BYTES:
                    kept = None
            yield pixels, labels
        self._kept = kept


def count_correct(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """Count the labels with the highest logit, and those among the five highest.

    Args:
        logits: Logits ``[N, K]``.
        labels: Labels, int64 ``[N]``, on the same device.

    Raises:
        UsageError: If a label is not between 0 and K - 1.
    """
    least, largest = int(labels.min()), int(labels.max())
    if least < 0 or largest >= logits.shape[1]:
        raise UsageError(
            f"evaluate: expected labels between 0 and {logits.shape[1] - 1}, because the network "
            f"gives {logits.shape[1]} logits, got {least if least < 0 else largest}"
        )
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return int(best[:, 0].sum()), int(best.any(1).sum())


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: BatchSource,
    *,
    device: torch.device | str = "cpu",
    label: str = "",
    bar: ProgressBar | None = None,
) -> Accuracy:
    """Measure the accuracy of ``network`` in evaluation mode over ``batches`` of all ranks.

    Args:
        network: Module from images ``[B, C, H, W]`` to logits ``[B, K]``.
        batches: The data.
        device: Device of the network.
        label: Text beside the progress bar; empty for no new bar.
        bar: Existing bar to use; None for a new one.

    Raises:
        UsageError: If a label is outside 0 to K - 1, images cannot be read, or a batch does not
            fit in memory.
    """
    network.eval()
    correct1 = correct5 = count = 0
    own = progress_bar(transient=True) if label and bar is None else None
    shown = own or bar
    with own or nullcontext():
        task = shown.add_task(label, total=len(batches.dataset), shown="") if shown else None
        for pixels, labels in batches:
            with must_fit(test_batch=min(batches.batch_size, len(batches.dataset))):
                images = batches.normalise(pixels.to(device, non_blocking=True))
                parts = parts_of(len(images), images[0, 0].numel(), images.device)
                logits = torch.cat([network(part).cpu() for part in images.tensor_split(parts)])
            among = count_correct(logits, labels)
            correct1, correct5 = correct1 + among[0], correct5 + among[1]
            count += labels.shape[0]
            if shown is not None and task is not None:
                done = min(count * world_size(), len(batches.dataset))
                shown.update(task, completed=done, shown=f"top-1 {100 * correct1 / count:.2f} %")
        if shown is not None and task is not None:
            shown.remove_task(task)
    correct1, correct5, count, unreadable = total_counts(
        correct1, correct5, count, batches.unreadable
    )
    if unreadable > batches.max_unreadable:  # no rank has seen so many alone
        raise UsageError(
            f"evaluate: expected at most {batches.max_unreadable} damaged images, "
            f"got {unreadable}; raise --max_unreadable to skip them"
        )
    if not count:
        raise UsageError(
            f"evaluate: expected at least one readable image, got {unreadable} damaged ones"
        )
    whole = int(getattr(batches.dataset, "whole", 0))
    of = whole if whole > count else 0
    return Accuracy(100 * correct1 / count, 100 * correct5 / count, count, of)
