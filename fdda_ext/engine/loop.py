"""The training loop: progress, metrics, checkpoints, a time limit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..distribution import from_first, is_first
from ..errors import UsageError
from .checkpoint import load_state, save_state
from .memory import release_freed_memory
from .progress import ProgressBar, progress_bar
from .run_folder import RunFolder

__all__ = ["Evaluation", "Progress", "Trainable", "train"]

#: Measures what is being trained, shows how far it is, and names what it found.
Evaluation = Callable[[ProgressBar], Mapping[str, float]]

#: Of the time that checkpoints may take: those of ImageNet's generator have half a gigabyte.
_SAVING_SHARE = 0.02


class Trainable(Protocol):
    """What the loop asks of a method. Everything that decides the next step is in its state."""

    iterations: int

    @property
    def part(self) -> str:
        """What it is at, in a word or two for the progress bar; may be empty."""
        ...

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
        lines = folder.metrics.read_text(errors="replace").splitlines()
        kept = []
        for line in lines:
            try:
                if json.loads(line)["iteration"] < iterations:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # the line that the kill cut short
                continue
        folder.metrics.write_text("".join(line + "\n" for line in kept))


def _restore(
    trainable: Trainable, folder: RunFolder, device: torch.device | str
) -> tuple[int, float]:
    """Take back the checkpoint; returns the iterations done and the seconds they took."""
    state = load_state(folder.checkpoint, device)
    folder.check_fingerprint(state.get("config"))
    try:
        trainable.load_state_dict(state["trainable"])
        done, seconds = int(state["iterations"]), float(state["seconds"])
        if not 0 <= done <= trainable.iterations:
            raise ValueError(f"{done} iterations of {trainable.iterations}")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"run: expected {folder.checkpoint} to hold the state of this run, got {reason}"
        ) from None
    return done, seconds


def train(
    trainable: Trainable,
    folder: RunFolder,
    *,
    description: str,
    max_seconds: float | None = None,
    checkpoint_seconds: float = 20.0,
    log_every: int = 10,
    evaluation: Evaluation | None = None,
    evaluate_every: int | None = None,
    device: torch.device | str = "cpu",
) -> Progress:
    """Run ``trainable`` from the folder's checkpoint, if there is one, to its end.

    Of several processes, all read the checkpoint and take the steps; the first writes.

    Args:
        trainable: What to train, freshly built; its state is replaced by the checkpoint's.
        folder: Where metrics and checkpoints go.
        description: Shown beside the progress bar.
        max_seconds: Stop after the first iteration that ends later than this, resumptions counted
            together; the state is then stored, so that a later call goes on.
        checkpoint_seconds: Least time between two checkpoints; more where the writing of one would
            take more than a fiftieth of it.
        log_every: Metrics of every so manyth iteration are kept (reading them waits for a GPU).
        evaluation: What to measure meanwhile. It must not change what is trained; its time does
            not count as training.
        evaluate_every: Iterations between two of them; None for never.
        device: Where a checkpoint's tensors are put.

    Returns:
        Iterations and seconds; fewer iterations than ``trainable.iterations`` after a time-out.

    Raises:
        UsageError: If the checkpoint is not this run's, or a metric is no longer finite.
        LostProcessError: If another process of the run has ended.
    """
    with folder.lock() if is_first() else nullcontext():
        return _train(
            trainable,
            folder,
            description,
            max_seconds,
            checkpoint_seconds,
            log_every,
            evaluation if evaluate_every else None,
            evaluate_every or 1,
            device,
        )


def _train(
    trainable: Trainable,
    folder: RunFolder,
    description: str,
    max_seconds: float | None,
    checkpoint_seconds: float,
    log_every: int,
    evaluation: Evaluation | None,
    evaluate_every: int,
    device: torch.device | str,
) -> Progress:
    done, seconds_before = 0, 0.0
    release_freed_memory()  # what building the method left in pieces
    if from_first(folder.checkpoint.exists):
        done, seconds_before = _restore(trainable, folder, device)
    if is_first():
        _truncate_metrics(folder, done)
    start = saved = time.monotonic()
    evaluating = saving = 0.0

    def elapsed() -> float:
        return seconds_before + time.monotonic() - start - evaluating

    def save() -> None:
        if not is_first():
            return
        state = {
            "config": folder.fingerprint,
            "trainable": trainable.state_dict(),
            "iterations": done,
            "seconds": elapsed(),
        }
        save_state(folder.checkpoint, state)

    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar())
        if is_first():
            writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=done)
            stack.enter_context(writer)
            metrics_file = stack.enter_context(folder.metrics.open("a"))

        def note(values: Mapping[str, float]) -> None:
            if not is_first():
                return
            line = {"iteration": done, "seconds": round(elapsed(), 3), **values}
            metrics_file.write(json.dumps(line) + "\n")
            metrics_file.flush()
            for name, value in values.items():
                writer.add_scalar(name, value, done)

        task = bar.add_task(description, total=trainable.iterations, completed=done, shown="")
        while done < trainable.iterations:
            # Also how a process notices, before it waits for ever on a GPU, that another is lost.
            if from_first(lambda: max_seconds is not None and elapsed() >= max_seconds):
                break
            metrics = trainable.step(done)
            if done % log_every == 0 or done + 1 == trainable.iterations:
                values = {name: float(value) for name, value in metrics.items()}
                for name, value in values.items():
                    if not math.isfinite(value):
                        raise UsageError(
                            f"{description}: expected a finite loss, got {value} for {name} in "
                            f"iteration {done}; lower the learning rates"
                        )
                note(values)
                latest = list(values.items())[-1:]  # one, so that the bar fits a narrow terminal
                shown = [f"{name} {value:.3g}" for name, value in latest]
                bar.update(task, shown=" ".join([trainable.part, *shown]).strip())
            if evaluation is not None and (done + 1) % evaluate_every == 0:
                begin = time.monotonic()
                measured = evaluation(bar)
                evaluating += time.monotonic() - begin
                note(measured)
            done += 1
            bar.update(task, completed=done)
            if time.monotonic() - saved >= max(checkpoint_seconds, saving / _SAVING_SHARE):
                begin = time.monotonic()
                save()
                saved = time.monotonic()
                saving = saved - begin
    save()
    return Progress(done, elapsed())
