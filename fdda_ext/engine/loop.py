"""The training loop: progress, metrics, checkpoints, a time limit."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as ProgressBar,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from .checkpoint import load_state, save_state
from .run_folder import RunFolder

__all__ = ["Progress", "Trainable", "train"]


class Trainable(Protocol):
    """What the loop asks of a method. Everything that decides the next step is in its state."""

    iterations: int

    def step(self, iteration: int) -> Mapping[str, Tensor]:
        """Do iteration ``iteration`` and name its scalar metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that must be stored for the next step to come out the same."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far a training came.

    Attributes:
        iterations: Iterations done.
        seconds: Time spent in them, over all resumptions.
    """

    iterations: int
    seconds: float


def _truncate_metrics(folder: RunFolder, iterations: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint."""
    if folder.metrics.exists():
        lines = folder.metrics.read_text().splitlines()
        kept = []
        for line in lines:
            try:
                if json.loads(line)["iteration"] < iterations:
                    kept.append(line)
            except (ValueError, KeyError):  # the line that the kill cut short
                continue
        folder.metrics.write_text("".join(line + "\n" for line in kept))


def train(
    trainable: Trainable,
    folder: RunFolder,
    *,
    description: str,
    max_seconds: float | None = None,
    checkpoint_seconds: float = 20.0,
    log_every: int = 10,
    device: torch.device | str = "cpu",
) -> Progress:
    """Run ``trainable`` from the folder's checkpoint, if there is one, to its end.

    Args:
        trainable: What to train, freshly built; its state is replaced by the checkpoint's.
        folder: Where metrics and checkpoints go.
        description: Shown beside the progress bar.
        max_seconds: Stop after the first iteration that ends later than this, resumptions counted
            together; the state is then stored, so that a later call goes on.
        checkpoint_seconds: Least time between two checkpoints.
        log_every: Metrics of every so manyth iteration are kept (reading them waits for a GPU).
        device: Where a checkpoint's tensors are put.

    Returns:
        Iterations and seconds; fewer iterations than ``trainable.iterations`` after a time-out.
    """
    done, seconds_before = 0, 0.0
    if folder.checkpoint.exists():
        state = load_state(folder.checkpoint, device)
        trainable.load_state_dict(state["trainable"])
        done, seconds_before = state["iterations"], state["seconds"]
    _truncate_metrics(folder, done)
    start = saved = time.monotonic()

    def elapsed() -> float:
        return seconds_before + time.monotonic() - start

    def save() -> None:
        state = {
            "trainable": trainable.state_dict(),
            "iterations": done,
            "seconds": elapsed(),
        }
        save_state(folder.checkpoint, state)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=done)
    with writer, folder.metrics.open("a") as metrics_file, ProgressBar(*columns) as bar:
        task = bar.add_task(description, total=trainable.iterations, completed=done, shown="")
        while done < trainable.iterations:
            if max_seconds is not None and elapsed() >= max_seconds:
                break
            metrics = trainable.step(done)
            if done % log_every == 0 or done + 1 == trainable.iterations:
                values = {name: float(value) for name, value in metrics.items()}
                line = {"iteration": done, "seconds": round(elapsed(), 3), **values}
                metrics_file.write(json.dumps(line) + "\n")
                metrics_file.flush()
                for name, value in values.items():
                    writer.add_scalar(name, value, done)
                latest = list(values.items())[-1:]  # one, so that the bar fits a narrow terminal
                bar.update(task, shown="".join(f"{n} {v:.3g}" for n, v in latest))
            done += 1
            bar.update(task, completed=done)
            if time.monotonic() - saved >= checkpoint_seconds:
                save()
                saved = time.monotonic()
    save()
    return Progress(done, elapsed())
