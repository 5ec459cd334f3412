"""The training loop, with progress, metrics, checkpoints and a time limit."""

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
from .duration import Stopwatch
from .interrupt import held_interrupt
from .memory import release_freed_memory
from .progress import ProgressBar, progress_bar
from .run_folder import RunFolder

__all__ = ["Evaluation", "Progress", "Trainable", "train"]

#: Measures what is being trained, shows its progress, and returns named results.
Evaluation = Callable[[ProgressBar], Mapping[str, float]]

#: The share of the time that checkpoints may take. Some have half a gigabyte.
_SAVING_SHARE = 0.02
#: The longest time between two checkpoints, in seconds. A write during which the disk hangs or the
#: machine sleeps must not delay the next one by days.
_LONGEST_INTERVAL = 1800.0


class Trainable(Protocol):
    """What the loop requires of a method."""

    iterations: int

    @property
    def part(self) -> str:
        """The current part of the work in a word, for the progress bar. May be empty."""
        ...

    def step(self, iteration: int) -> Mapping[str, Tensor]:
        """Run iteration ``iteration`` and return named scalar metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides the next step."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Progress:
    """The progress of a run's training.

    Attributes:
        iterations: Iterations done.
        seconds: Time spent in them, over all resumptions.
        interrupted: Whether Ctrl-C ended the training.
    """

    iterations: int
    seconds: float
    interrupted: bool = False


def _truncate_metrics(folder: RunFolder, iterations: int) -> None:
    """Remove the lines that a killed run wrote after its last checkpoint."""
    if folder.metrics.exists():
        lines = folder.metrics.read_text(errors="replace").splitlines()
        kept = []
        for line in lines:
            try:
                if json.loads(line)["iteration"] < iterations:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # a line that the kill cut short
                continue
        folder.metrics.write_text("".join(line + "\n" for line in kept))


def _restore(
    trainable: Trainable, folder: RunFolder, device: torch.device | str
) -> tuple[int, float]:
    """Load the checkpoint. Return the iterations done and the seconds they took."""
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
    folder: RunFolder | None,
    *,
    description: str,
    max_seconds: float | None = None,
    checkpoint_seconds: float = 20.0,
    log_every: int = 10,
    evaluation: Evaluation | None = None,
    evaluate_every: int | None = None,
    device: torch.device | str = "cpu",
    show: bool = True,
) -> Progress:
    """Train to the end, from the folder's checkpoint if there is one.

    All ranks read the checkpoint and take the steps. Only the first rank writes.

    The first Ctrl-C ends the loop after the current iteration, like a time-out. A second one raises
    KeyboardInterrupt.

    Args:
        trainable: Method to train, freshly built. A checkpoint replaces its state.
        folder: Folder for metrics and checkpoints; None writes nothing.
        description: Text beside the progress bar.
        max_seconds: Time limit in seconds, over all resumptions. Training stops after the first
            iteration that ends later, and stores its state.
        checkpoint_seconds: Shortest time between two checkpoints, in seconds; 0 for one after every
            iteration. It grows up to half an hour if writing takes more than a fiftieth of it.
        log_every: Interval of the iterations whose metrics are kept. Reading them waits for a GPU.
        evaluation: Measurement during training, which must not change what is trained. Its time
            does not count.
        evaluate_every: Iterations between two evaluations; None for never.
        device: Device for the tensors of a checkpoint.
        show: Whether to show a progress bar.

    Returns:
        Iterations and seconds. After a time-out or Ctrl-C, these are fewer than
        ``trainable.iterations``.

    Raises:
        UsageError: If the checkpoint is of another run, or a metric is not finite.
        LostProcessError: If another process of the run has ended.
    """
    locked = folder.lock() if folder is not None and is_first() else nullcontext()
    with locked, held_interrupt() as interrupted:
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
            show,
            interrupted,
        )


def _train(
    trainable: Trainable,
    folder: RunFolder | None,
    description: str,
    max_seconds: float | None,
    checkpoint_seconds: float,
    log_every: int,
    evaluation: Evaluation | None,
    evaluate_every: int,
    device: torch.device | str,
    show: bool,
    interrupted: Callable[[], bool],
) -> Progress:
    done, seconds_before = 0, 0.0
    release_freed_memory()  # building the method has fragmented it
    if folder is not None and from_first(folder.checkpoint.exists):
        done, seconds_before = _restore(trainable, folder, device)
    #: The folder if this process writes to it, else None.
    own = folder if is_first() else None
    if own is not None:
        _truncate_metrics(own, done)
    watch = Stopwatch(seconds_before)
    saved, saving = time.monotonic(), 0.0

    def save() -> None:
        if own is None:
            return
        state = {
            "config": own.fingerprint,
            "trainable": trainable.state_dict(),
            "iterations": done,
            "seconds": watch.seconds,
        }
        save_state(own.checkpoint, state)

    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(shown=show))
        if own is not None:
            writer = SummaryWriter(str(own.path / "tensorboard"), purge_step=done)
            stack.enter_context(writer)
            metrics_file = stack.enter_context(own.metrics.open("a"))

        def note(values: Mapping[str, float]) -> None:
            if own is None:
                return
            line = {"iteration": done, "seconds": watch.seconds, **values}
            metrics_file.write(json.dumps(line) + "\n")
            metrics_file.flush()
            for name, value in values.items():
                writer.add_scalar(name, value, done)

        task = bar.add_task(description, total=trainable.iterations, completed=done, shown="")
        while done < trainable.iterations:
            # This also notices a lost process, for which a GPU would wait forever.
            if from_first(
                lambda: interrupted() or (max_seconds is not None and watch.seconds >= max_seconds)
            ):
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
                latest = list(values.items())[-1:]  # only one, to fit a narrow terminal
                shown = [f"{name} {value:.3g}" for name, value in latest]
                bar.update(task, shown=" ".join([trainable.part, *shown]).strip())
            if evaluation is not None and (done + 1) % evaluate_every == 0:
                watch.pause()
                measured = evaluation(bar)
                watch.resume()
                note(measured)
            done += 1
            bar.update(task, completed=done)
            enough = min(saving / _SAVING_SHARE, _LONGEST_INTERVAL) if checkpoint_seconds else 0.0
            if time.monotonic() - saved >= max(checkpoint_seconds, enough):
                begin = time.monotonic()
                save()
                saved = time.monotonic()
                saving = saved - begin
    save()
    return Progress(done, watch.seconds, from_first(interrupted))
