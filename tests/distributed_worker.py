"""What tests/test_distributed.py computes in one process, and in several: the same must come out.

Run as one of several processes, rank 0 writes what `everything` returns to the file that the first
argument names.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from test_fdda import CLASSES, problem, settings
from torch import Tensor, nn

from fdda_ext import distribution
from fdda_ext.engine import BatchSource, digest, evaluate
from fdda_ext.methods import build_method
from fdda_ext.ops import class_batch_stats
from fdda_ext.statistics import centres, compute_centres

ITERATIONS = 20


def losses(name: str, quantization: dict[str, Any] | None = None, **fdda: Any) -> dict[str, Any]:
    """The metrics of 20 iterations, and whether all processes ended with the same weights."""
    chosen = settings(
        {"steps": 12 if name == "fdda" else 20, "lr": 1e-4, "scale_lr": 1e-5, "generated_batch": 6},
        **{"warmup_iterations": 8, "range_iterations": 6, "misclassified_iterations": 10, **fdda},
    )
    method = build_method(name, problem(right=True, **(quantization or {})), chosen)
    metrics = [
        {k: float(v) for k, v in method.step(i).items()} for i in range(method.iterations)
    ]
    state = {k: v.contiguous() for k, v in method.student.state_dict().items()}
    own = digest(state, "")
    return {"metrics": metrics, "alike": distribution.from_first(lambda: own) == own}


def moments() -> dict[str, Any]:
    """Statistics of a batch with few and absent classes, and their gradients."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(7, 5, 3, 3, generator=random, dtype=torch.float64) * 2 + 100
    index = torch.tensor([0, 1, 1, 3, 0, 0, 3])
    weights = torch.randn(2, 4, 5, generator=random, dtype=torch.float64)
    own = distribution.shard(x).clone().requires_grad_()
    count, mean, variance = class_batch_stats(own, distribution.shard(index), 4)
    count, (mean,), (variance,) = distribution.pooled_moments(count, [mean], [variance])
    loss = (weights[0] * mean.square() + weights[1] * variance.square()).sum()
    (loss / distribution.world_size()).backward()
    grad = distribution.gather(own.grad, distribution.shares(7))
    return {
        "count": [int(n) for n in count],
        "mean": mean.tolist(),
        "variance": variance.tolist(),
        "grad": grad.tolist(),
    }


def centres_of_few_per_pass() -> str:
    """The bits of centres that take three passes."""
    task = problem(right=True)
    centres.CLASSES_PER_PASS = 2
    found = compute_centres(task.teacher, task.images, task.labels, CLASSES)
    centres.CLASSES_PER_PASS = 32
    again = compute_centres(task.teacher, task.images, task.labels, CLASSES)
    tensors = {}
    for name, result in (("few", found), ("all", again)):
        tensors[f"{name}.correct"] = result.correct
        for layer, (mean, variance) in enumerate(zip(*result.statistics, strict=True)):
            tensors[f"{name}.{layer}.mean"], tensors[f"{name}.{layer}.variance"] = mean, variance
    return digest(tensors, "")


def accuracy() -> list[float]:
    """Of a network that is right on some images, over more batches than processes, and fewer."""
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(5))
    source: Any = SimpleNamespace(labels=torch.arange(50) % 10, pixels=logits.__getitem__)
    source = type("Source", (), {**vars(source), "__len__": lambda self: 50})()
    source.normalise = Tensor.float
    result = []
    for batch_size in (7, 40):
        measured = evaluate(nn.Identity(), BatchSource(source, batch_size))
        result += [measured.top1, measured.top5, measured.count]
    return result


def everything() -> dict[str, Any]:
    """All results, as JSON can hold them."""
    return {
        "fdda, paper grid": losses("fdda", {"grid": "paper"}),
        "fdda, deploy grid": losses("fdda", ranges_from="calibration", classes_per_batch=2),
        "distill": losses("distill"),
        "moments": moments(),
        "centres": centres_of_few_per_pass(),
        "accuracy": accuracy(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distribution.joined():
        results = everything()
        alike = distribution.total_counts(
            *(int(r["alike"]) for r in results.values() if "alike" in r)
        )
        if distribution.is_first():
            Path(sys.argv[1]).write_text(json.dumps({**results, "alike": alike}))
