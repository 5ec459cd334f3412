"""Training of one network in several processes, with the result of a single process.

Every process (rank) holds the same weights, draws the random numbers of the global batch, and
computes on its share of the images:

* A loss is the sum of the ranks' *shares*. A mean over images is weighted by `share_of`, and a loss
  of global statistics is divided by `world_size`.
* Losses are not linear in batch statistics. So these are pooled before they are used:
  `pooled_moments`, with gradients, and `extremes`.
* `sum_gradients_` sums gradients in one flat all-reduce per optimizer step. DistributedDataParallel
  would overlap it with the backward pass, but expects one forward pass for it, and the generator
  has two. It also changes the names in checkpoints.
* Only the first rank writes files. It also decides what must be equal on all ranks, such as folder
  names (`from_first`).

Any number of processes can continue from a checkpoint. In a single process, these functions return
their inputs unchanged.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .errors import UsageError

__all__ = [
    "LostProcessError",
    "alone",
    "begin_alike",
    "extremes",
    "first_on_machine",
    "from_first",
    "gather",
    "is_first",
    "is_launched",
    "joined",
    "local_device",
    "own_slice",
    "pooled_moments",
    "rank",
    "shard",
    "share_of",
    "shares",
    "signature",
    "sum_gradients_",
    "total",
    "total_counts",
    "world_size",
]

T = TypeVar("T")
Batch = TypeVar("Batch", Tensor, Sequence[Any])

#: How long a process waits for one that hangs. One that ended is noticed at once. Listing files
#: or writing a report can take minutes.
_TIMEOUT = timedelta(minutes=30)

_alone: ContextVar[bool] = ContextVar("alone", default=False)

_GO_ON = "continue from the last checkpoint with --out and --resume, on any number of processes"


class LostProcessError(UsageError):
    """Another process of the run has ended or does not answer."""


# ---- processes ----------------------------------------------------------------------------------


def is_launched() -> bool:
    """Return whether torchrun or the like started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def world_size() -> int:
    """Return the number of processes that have joined, 1 if none."""
    together = dist.is_available() and dist.is_initialized() and not _alone.get()
    return dist.get_world_size() if together else 1


def rank() -> int:
    """Return the rank of this process, 0 for a single process."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Return whether this process shows progress and writes files."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Treat this process as a single one, for work of the first rank only."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def signature() -> str:
    """Return " (rank R of W)" for messages; empty for a single process."""
    if not is_launched():
        return ""
    return f" (rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']})"


def local_device(device: str) -> str:
    """Return this process's own device of the kind ``device``.

    Raises:
        UsageError: If this machine has fewer GPUs than processes, or ``device`` names one GPU.
    """
    kind = torch.device(device)
    if not is_launched() or kind.type != "cuda":
        return device
    if kind.index is not None:
        raise UsageError(
            f"distributed: expected device to be cpu or cuda with several processes, got {device}"
        )
    here, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if here >= gpus:
        raise UsageError(
            f"distributed: expected a GPU for every process of a machine, got {gpus} GPUs and "
            f"process number {here + 1}; lower --nproc-per-node"
        )
    return f"cuda:{here}"


@contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Join the other processes that torchrun started, and leave them at the end.

    NCCL carries tensors on GPUs, and gloo those on CPUs. After an error, this process exits without
    waiting for the others.

    Args:
        device: Kind of device of the tensors, "cpu" or "cuda".

    Raises:
        LostProcessError: If the processes cannot be joined.
        UsageError: See `local_device`.
    """
    if not is_launched():
        yield
        return
    own = torch.device(local_device(device))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    # These functions keep the group of their import as default argument. Imported later, as
    # optimizers do, they would keep gloo's threads running until the interpreter ends, where they
    # can abort it.
    importlib.import_module("torch.distributed.nn.functional")
    with _collective():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=_TIMEOUT
        )
    with _explained_sigterm():
        yield
        _barrier()
        dist.destroy_process_group()


@contextmanager
def _explained_sigterm() -> Iterator[None]:
    """Print the reason and exit on SIGTERM, which torchrun sends after a process was lost.

    A Python handler would run only after the operation that waits for the lost process. A thread
    reads the number of the signal from a pipe at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        while numbers := os.read(reader, 16):
            if signal.SIGTERM in numbers:
                reason = "ended by SIGTERM, as torchrun does after another process was lost"
                print(f"error{signature()}: distributed: {reason}; {_GO_ON}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(128 + signal.SIGTERM)
        os.close(reader)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        signal.signal(signal.SIGTERM, before)
        os.close(writer)


@contextmanager
def _collective() -> Iterator[None]:
    """Replace torch's error about a lost process by one sentence.

    Raises:
        LostProcessError: If another process does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        reason = " ".join(str(error).split()).rpartition("] ")[2].split(". ")[0][:200]
        raise LostProcessError(
            f"distributed: expected all {os.environ.get('WORLD_SIZE', world_size())} processes to "
            f"run to the end, got one that does not answer ({reason}); {_GO_ON}"
        ) from None


# ---- work of one rank for all -------------------------------------------------------------------


def _barrier() -> None:
    if world_size() > 1:
        with _collective():  # NCCL's barrier would need a GPU
            dist.all_reduce(torch.zeros(1))


def from_first(make: Callable[[], T]) -> T:
    """Call ``make`` on the first rank only, and return its result on every rank.

    Args:
        make: Function whose result JSON can hold.

    Returns:
        The result, equal on every rank.

    Raises:
        UsageError: On every rank, if ``make`` raises it.
        LostProcessError: If a process was lost.
    """
    if world_size() == 1:
        return make()
    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer = {"value": make()}
        except UsageError as error:
            answer = {"error": str(error)}
    text = torch.tensor(list(json.dumps(answer).encode()), dtype=torch.uint8)
    length = torch.tensor([text.numel()])
    with _collective():
        dist.broadcast(length, 0)
        text = text if is_first() else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(text, 0)
    answer = json.loads(bytes(text.tolist()))
    if "error" in answer:
        raise UsageError(answer["error"])
    value: T = answer["value"]
    return value


@contextmanager
def first_on_machine() -> Iterator[None]:
    """Let the first process of each machine go ahead, to fill caches."""
    ahead = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not ahead:
        _barrier()
    yield
    if ahead:
        _barrier()


def begin_alike(state: Any) -> None:
    """Copy the first rank's values to all tensors in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        if state.numel() and world_size() > 1:
            values = state.detach().contiguous()
            with _collective():
                dist.broadcast(values, 0)
            state.detach().copy_(values)
    elif isinstance(state, dict):
        for item in state.values():
            begin_alike(item)
    elif isinstance(state, (list, tuple)):
        for item in state:
            begin_alike(item)


# ---- the shares of a batch ----------------------------------------------------------------------


def shares(count: int) -> list[int]:
    """Return the part of ``count`` that each rank gets. The first ranks may get one more."""
    ranks = world_size()
    return [count // ranks + (r < count % ranks) for r in range(ranks)]


def own_slice(count: int) -> slice:
    """Return the slice of ``count`` items that this rank gets. It may be empty."""
    sizes = shares(count)
    begin = sum(sizes[: rank()])
    return slice(begin, begin + sizes[rank()])


def shard(batch: Batch) -> Batch:
    """Return this rank's part of ``batch [N, *]``.

    Raises:
        UsageError: If there are fewer items than ranks.
    """
    if len(batch) < world_size():
        raise UsageError(
            f"distributed: expected a batch of at least one image for each of the {world_size()} "
            f"processes, got {len(batch)}; raise the batch size, or start fewer processes"
        )
    return batch[own_slice(len(batch))]


def share_of(count: int) -> float:
    """Return the weight of this rank's mean in the mean over all ``count`` images."""
    return shares(count)[rank()] / count


def gather(part: Tensor, sizes: Sequence[int]) -> Tensor:
    """Concatenate the parts ``[sizes[r], *]`` of all ranks r, without gradients."""
    if world_size() == 1:
        return part
    kind = part.dtype
    values = part.detach().to(torch.uint8) if kind == torch.bool else part.detach()
    padded = values.new_zeros((max(sizes), *part.shape[1:]))
    padded[: part.shape[0]] = values
    return torch.cat([p[:size] for p, size in zip(_all(padded), sizes, strict=True)]).to(kind)


# ---- sums over the ranks ------------------------------------------------------------------------


def _all(x: Tensor) -> Tensor:
    """Return ``x`` of every rank, ``[W, *]``."""
    result = x.new_empty((world_size(), *x.shape))
    with _collective():
        dist.all_gather(list(result.unbind()), x.contiguous())
    return result


def _add_up_(x: Tensor) -> Tensor:
    with _collective():
        dist.all_reduce(x)
    return x


class _Everyones(torch.autograd.Function):
    """`_all` with gradients, which are summed over the ranks."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _all(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return _add_up_(grad.clone(memory_format=torch.contiguous_format))[rank()]


def pooled_moments(
    count: Tensor, means: Sequence[Tensor], variances: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute statistics of the global batch from those of the ranks, in one exchange.

    Chan, Golub and LeVeque (The American Statistician 37, 1983), for any number of parts::

        n = sum_r n_r,  mean = sum_r (n_r / n) mean_r,
        variance = sum_r (n_r / n) (variance_r + (mean_r - mean)^2)

    Args:
        count: Values per class on this rank, ``[K]``, up to a constant factor per layer.
        means: Means of L layers, ``[K, C_l]`` each; 0 where the count is 0.
        variances: Biased variances, in the same form.

    Returns:
        Count, means and variances of the global batch, with gradients.
    """
    if world_size() == 1:
        return count, list(means), list(variances)
    sizes = [mean.numel() for mean in means]
    own = [t.flatten() for t in (count.to(means[0].dtype), *means, *variances)]
    every = _Everyones.apply(torch.cat(own))
    counts, *parts = every.split([count.numel(), *sizes, *sizes], dim=1)
    count = counts.sum(0)
    weights = (counts / count.clamp(min=1)).unsqueeze(2)  # [W, K, 1]
    pooled_means, pooled_variances = [], []
    for layer, mean in enumerate(means):
        shape = (-1, *mean.shape)
        mean_r, variance_r = parts[layer].view(shape), parts[len(means) + layer].view(shape)
        pooled = (weights * mean_r).sum(0)
        pooled_means.append(pooled)
        pooled_variances.append((weights * (variance_r + (mean_r - pooled).square())).sum(0))
    return count, pooled_means, pooled_variances


@torch.no_grad()
def extremes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least ``low`` and the largest ``high`` of all ranks."""
    if world_size() == 1:
        return low, high
    ends = torch.stack([-low, high])
    with _collective():
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return -ends[0], ends[1]


@torch.no_grad()
def sum_gradients_(parameters: Iterable[Tensor]) -> None:
    """Sum gradients over the ranks. The same ``parameters`` must have one on every rank."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = _add_up_(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def total_counts(*counts: int) -> list[int]:
    """Sum integers over the ranks, on the CPU."""
    return [int(n) for n in _add_up_(torch.tensor(counts))] if world_size() > 1 else list(counts)


@torch.no_grad()
def total(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum scalar tensors over the ranks, without gradients."""
    values = {name: part.detach() for name, part in parts.items()}
    if world_size() == 1:
        return values
    return dict(zip(values, _add_up_(torch.stack(list(values.values()))).unbind(), strict=True))
