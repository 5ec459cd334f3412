"""Top-1 and top-5 accuracy over a whole data set."""

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

#: Data sets up to this many bytes of images stay in memory between evaluations.
KEEP_BYTES = 1 << 30


def standard_error(percent: float, count: int, of: int) -> float:
    """How far a sample's accuracy typically is from that of all images, in points.

    It is ``100 * sqrt(p * (1 - p) / count * (of - count) / (of - 1))`` with ``p = percent / 100``:
    the binomial error of a share, and the correction for a sample that is drawn from ``of`` images
    without putting any back. It ignores that samples are stratified by class, which makes the error
    a little smaller.

    Args:
        percent: Share of the sample's images.
        count: Images of the sample.
        of: All images that it was drawn from.

    Returns:
        0 if all images were tested.
    """
    if not 0 < count < of:
        return 0.0
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / count * (of - count) / (of - 1))


def render_percent(percent: float, count: int, of: int) -> str:
    """``81.20``, and for a sample ``81.20 ± 0.39`` with its standard error."""
    text = f"{percent:.2f}"
    return f"{text} ± {standard_error(percent, count, of):.2f}" if 0 < count < of else text


@dataclass(frozen=True)
class Accuracy:
    """Percentages over ``count`` images.

    Attributes:
        top1: Share whose highest logit is the label's.
        top5: Share whose label is among the five highest logits (all logits when fewer).
        count: Number of images.
        of: Number of images that these are a sample of; 0 if they are no sample.
    """

    top1: float
    top5: float
    count: int
    of: int = 0

    @property
    def is_sample(self) -> bool:
        """Whether there are more images than were tested."""
        return self.count < self.of

    @property
    def standard_error(self) -> float:
        """Of `top1`, in points; 0 where all images were tested. See `standard_error`."""
        return standard_error(self.top1, self.count, self.of)

    def __str__(self) -> str:
        """Both percentages, with their standard errors if the images are a sample."""
        top1, top5 = (render_percent(x, self.count, self.of) for x in (self.top1, self.top5))
        text = f"top-1 {top1} %, top-5 {top5} %"
        if self.is_sample:
            return f"{text} (standard error; {self.count} of {self.of} images)"
        return f"{text}, {self.count} images"


class ImageSource(Protocol):
    """Images with labels, by number."""

    @property
    def labels(self) -> Tensor:
        """int64 ``[n]``."""
        ...

    def __len__(self) -> int: ...

    def pixels(self, index: int, /) -> Tensor:
        """Image ``[C, H, W]``, uint8, or float32 from 0 to 1."""
        ...

    def normalise(self, pixels: Tensor, /) -> Tensor:
        """float32 images for the network, on the device of ``pixels``."""
        ...


class _Pixels:
    """The images of a source for a loader; in place of a damaged one stands why it is damaged.

    An exception that crosses the border of a worker process comes back as a traceback.
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
    """Pixels and labels of the images that can be read, and what is wrong with the others."""
    readable = [item for item in items if not isinstance(item, str)]
    batch = list(default_collate(readable)) if readable else []
    return batch, [item for item in items if isinstance(item, str)]


class BatchSource:
    """Batches ``(pixels [B, C, H, W], labels [B])`` of a data set, any number of times.

    Pixels are what the data set stores, uint8 mostly: a quarter of what normalised images would
    take in memory and on the way to a GPU. `normalise` is done there. Small data sets are produced
    once and kept.

    Several processes have turns at the batches: each gets its own.

    Args:
        dataset: The images.
        batch_size: B, less for the last batch and where images were left out.
        workers: Processes that decode images; 0 for this one.
        max_unreadable: So many damaged files are left out, each named in a warning of the logger
            ``fdda_ext``; one more is an error.

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
        """float32 images for the network, on the device of ``pixels``."""
        return self.dataset.normalise(pixels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches.

        Raises:
            UsageError: If more files are damaged than may be.
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
                    raise UsageError(f"{message}{more}; --max_unreadable lets some be left out")
                _log.warning("%s; it is left out", message)
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
    """How many labels have the highest logit, and how many are among the five highest.

    Args:
        logits: ``[N, K]``.
        labels: int64 ``[N]``, on the same device.

    Raises:
        UsageError: If a label is not between 0 and K - 1.
    """
    least, largest = int(labels.min()), int(labels.max())
    if least < 0 or largest >= logits.shape[1]:
        raise UsageError(
            f"evaluate: expected labels between 0 and {logits.shape[1] - 1}, as the network gives "
            f"{logits.shape[1]} logits, got {least if least < 0 else largest}"
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
    """Accuracy of ``network`` in evaluation mode over all of ``batches``, those of all processes.

    Args:
        network: From images ``[B, C, H, W]`` to logits ``[B, K]``.
        batches: The data.
        device: Where the network is.
        label: Shown beside the progress bar, which appears when this is not empty.
        bar: Where to show it; None for a bar of its own.

    Raises:
        UsageError: If a label is not below K, images cannot be read, or the memory does not
            suffice for a batch.
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
    if unreadable > batches.max_unreadable:  # which no process saw alone
        raise UsageError(
            f"evaluate: expected at most {batches.max_unreadable} damaged images, "
            f"got {unreadable}; --max_unreadable lets more be left out"
        )
    if not count:
        raise UsageError(
            f"evaluate: expected some image that can be read, got {unreadable} that cannot"
        )
    whole = int(getattr(batches.dataset, "whole", 0))
    of = whole if whole > count else 0
    return Accuracy(100 * correct1 / count, 100 * correct5 / count, count, of)
