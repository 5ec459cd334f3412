"""Computations that tests/test_distributed.py runs with one rank and with several, to compare.

``distributed_worker.py RESULTS FOLDER [RANK]`` writes the result of `everything` to RESULTS, then
trains in FOLDER from its checkpoint on. If RANK is given, that rank kills itself during training.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from test_fdda import CLASSES, problem, settings
from torch import Tensor, nn

from fdda_ext import distribution
from fdda_ext.engine import BatchSource, RunFolder, digest, evaluate, train
from fdda_ext.errors import UsageError
from fdda_ext.methods import Method, build_method
from fdda_ext.ops import class_batch_stats
from fdda_ext.statistics import centres, compute_centres


def build(name: str, quantization: dict[str, Any], **fdda: Any) -> Method:
    """Build a method of 20 iterations.

    Learning rates are low, so that a different order of additions changes losses by less than 1e-5:
    Adam moves the generator's weights by about the learning rate, even if a gradient is tiny. The
    student still jumps when a value is rounded to another code.
    """
    student = {"lr": 1e-5, "scale_lr": 1e-6, "generated_batch": 6}
    phases = {"warmup_iterations": 8, "range_iterations": 6, "misclassified_iterations": 10}
    steps = 12 if name == "fdda" else 20
    chosen = settings({"steps": steps, **student}, **{"lr": 1e-4, **phases, **fdda})
    return build_method(name, problem(right=True, **quantization), chosen)


def weights(method: Method) -> Tensor:
    """Return all weights of the student as one vector."""
    return torch.cat([p.detach().flatten() for p in method.student.parameters()])


def training(name: str, quantization: dict[str, Any] | None = None, **fdda: Any) -> dict[str, Any]:
    """Run 20 iterations; return losses, ranges, and the change of the student's weights."""
    method = build(name, quantization or {}, **fdda)
    before = weights(method)
    metrics = [method.step(i) for i in range(method.iterations)]
    ranges = [b.flatten() for n, b in method.student.named_buffers() if n.endswith("high")]
    return {
        "losses": [{k: float(v) for k, v in values.items()} for values in metrics],
        "moved": (weights(method) - before).tolist(),
        "ranges": torch.cat(ranges).tolist(),
        "alike": alike({"weights": weights(method)}),
    }


def alike(tensors: dict[str, Tensor]) -> int:
    """Return how many ranks have the same bits as the first."""
    own = digest(tensors, "")
    (number,) = distribution.total_counts(int(distribution.from_first(lambda: own) == own))
    return number


def moments() -> dict[str, Any]:
    """Return statistics of a batch in which one class is absent, and their gradients."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(7, 5, 3, 3, generator=random, dtype=torch.float64) * 2 + 100
    index = torch.tensor([0, 1, 1, 3, 0, 0, 3])
    factors = torch.randn(2, 4, 5, generator=random, dtype=torch.float64)
    own = distribution.shard(x).clone().requires_grad_()
    own_count, *own_moments = class_batch_stats(own, distribution.shard(index), 4)
    count, (mean,), (variance,) = distribution.pooled_moments(
        own_count, own_moments[:1], own_moments[1:]
    )
    loss = (factors[0] * mean.square() + factors[1] * variance.square()).sum()
    (loss / distribution.world_size()).backward()
    assert own.grad is not None
    gradient = distribution.gather(own.grad, distribution.shares(7))
    tensors = {"count": count, "mean": mean, "variance": variance, "gradient": gradient}
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def centre_bits() -> list[str]:
    """Return digests of BNS centres, computed in three passes and in one (for several ranks)."""
    task = problem(right=True)
    bits = []
    for centres.CLASSES_PER_PASS in (2, 32):
        found = compute_centres(task.teacher, task.images, task.labels, CLASSES)
        tensors = {"correct": found.correct}
        for layer, (mean, variance) in enumerate(zip(*found.statistics, strict=True)):
            tensors |= {f"{layer}.mean": mean, f"{layer}.variance": variance}
        bits.append(digest(tensors, ""))
    return bits


class Logits:
    """A data set whose images are logits; some of them predict their label."""

    labels = torch.arange(50) % 10
    stored = torch.randn(50, 10, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return 50

    def pixels(self, index: int) -> Tensor:
        return self.stored[index]

    def normalise(self, pixels: Tensor) -> Tensor:
        return pixels


def accuracies() -> list[list[float]]:
    """Return accuracies over more batches than ranks, and over fewer."""
    measured = [evaluate(nn.Identity(), BatchSource(Logits(), size)) for size in (7, 40, 50)]
    return [[a.top1, a.top5, a.count] for a in measured]


def refusal() -> str:
    """Return the error of every rank when the first one raises a UsageError."""

    def refuse() -> None:
        raise UsageError("test: expected nothing, got something")

    try:
        distribution.from_first(refuse)
    except UsageError as error:
        message = str(error)
    assert distribution.total_counts(1) == [distribution.world_size()], "all ranks got here"
    if distribution.is_first():
        with distribution.alone():  # otherwise it would wait for the others
            assert distribution.total_counts(1) == [1]
    return message


def everything() -> dict[str, Any]:
    """Return all results."""
    return {
        "fdda, paper grid": training("fdda", {"grid": "paper"}),
        "fdda, deploy grid": training("fdda", ranges_from="calibration", classes_per_batch=2),
        "distill": training("distill"),
        "moments": moments(),
        "centres": centre_bits(),
        "accuracies": accuracies(),
        "refusal": refusal(),
    }


class Interrupted:
    """FDDA that kills its process, or raises KeyboardInterrupt, before an iteration."""

    part = ""

    def __init__(self, before: int | None = None, kill: bool = False) -> None:
        self.method = build("fdda", {"grid": "paper"})
        self.iterations = self.method.iterations
        self.state_dict, self.load_state_dict = self.method.state_dict, self.method.load_state_dict
        self.before, self.kill = before, kill

    def step(self, iteration: int) -> Any:
        if iteration == self.before:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return self.method.step(iteration)


def run(path: Path, trainable: Interrupted) -> Interrupted:
    """Train in the folder ``path``, with a checkpoint after every iteration."""
    distribution.from_first(lambda: RunFolder(path, "", resume=True).fingerprint)
    folder = RunFolder(path, "", resume=True)
    train(trainable, folder, description="fdda", checkpoint_seconds=0.0, log_every=1)
    return trainable


def main() -> None:
    torch.set_num_threads(1)
    results, folder, *killed = sys.argv[1:]
    with distribution.joined():
        found = everything()
        if distribution.is_first():
            Path(results).write_text(json.dumps(found))
        kill = killed == [str(distribution.rank())]
        end = run(Path(folder), Interrupted(7 if kill else None, kill))
        if distribution.is_first():
            Path(results).write_text(json.dumps({**found, "end": weights(end.method).tolist()}))


if __name__ == "__main__":
    from fdda_ext.engine import run_command

    run_command(main)
