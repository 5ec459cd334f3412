"""Measure estimated and real memory of methods, size of a checkpoint, and time of an iteration.

    python python/memory.py --model timm:tf_efficientnet_lite0 --image-size 224 --classes 1000

Weights and images are random, which does not affect memory. Running statistics come from some of
the images, so that activations do not overflow. Every method runs in its own process, with a
shortened schedule.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import positive, write_table

from fdda_ext.commands.train import parse_arguments
from fdda_ext.data import Augmentation
from fdda_ext.engine import keep_freed_memory, peak_memory, release_freed_memory, save_state
from fdda_ext.methods import Problem, build_method, estimate_memory
from fdda_ext.models import open_model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=positive, default=224)
    parser.add_argument("--classes", type=positive, default=1000)
    parser.add_argument("--methods", default="fdda,distill", help="names, separated by commas")
    parser.add_argument("--preset", default="short")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--iterations", type=positive, default=4, help="iterations per method")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), help="folder of the table")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def build_problem(options: argparse.Namespace, arguments: list[str]) -> Problem:
    """Build a problem with random weights and one random image per class.

    One label is chosen such that the teacher classifies an image correctly.
    """
    config, _ = parse_arguments(arguments)
    size, device = options.image_size, torch.device(options.device)
    torch.manual_seed(0)
    teacher = open_model(options.model, weights="none", num_classes=options.classes).network
    teacher = teacher.to(device, memory_format=torch.channels_last).requires_grad_(False)
    images = torch.empty(
        (options.classes, 3, size, size), device=device, memory_format=torch.channels_last
    )
    for image in images:
        image.normal_()
    for module in teacher.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # plain mean over batches
    with torch.no_grad():
        teacher.train()(images[:8])
        answer = int(teacher.eval()(images[:1]).argmax())
    labels = torch.arange(options.classes, device=device)
    labels[0], labels[answer] = answer, 0
    return Problem(
        teacher, options.classes, images, labels, Augmentation(), config.quantization, seed=0
    )


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Measure one method: GB, checkpoint in MB, and seconds."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    name = options.methods
    arguments = [f"--method={name}", f"--preset={options.preset}"]
    problem = build_problem(options, arguments)
    settings = parse_arguments(arguments)[0].settings
    begin = time.perf_counter()
    estimate = estimate_memory(name, problem, settings)
    estimating = time.perf_counter() - begin
    step = settings.distillation
    config = getattr(settings, name, None)
    warmup = getattr(config, "warmup_iterations", 0)
    together = getattr(config, "student_steps_per_iteration", 1)
    share = min(options.iterations / max(warmup + step.steps / together, 1), 1.0)
    method = build_method(name, problem, settings.scaled(share))
    release_freed_memory()
    seconds = []
    for iteration in range(method.iterations):
        begin = time.perf_counter()
        method.step(iteration)
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        seconds.append(time.perf_counter() - begin)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        peak = peak_memory(problem.device)
        save_state(path, method.state_dict())
        checkpoint = path.stat().st_size
    return {
        "estimate": math.nan if estimate is None else estimate.total / 1e9,
        "peak": peak * 2**20 / 1e9,
        "checkpoint": checkpoint / 1e6,
        "seconds": sum(seconds) / max(len(seconds), 1),
        "estimating": estimating,
    }


def main() -> None:
    options = parse()
    if options.one:
        print(json.dumps(measure(options)))
        return
    rows = []
    for name in options.methods.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", f"--methods={name}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            [
                name,
                *(f"{found[key]:.2f}" for key in ("estimate", "peak")),
                f"{found['checkpoint']:.0f}",
                f"{found['seconds']:.3g}",
                f"{found['estimating']:.3g}",
            ]
        )
    options.out.mkdir(parents=True, exist_ok=True)
    write_table(
        options.out / "memory",
        f"{options.model}, {options.classes} classes, {options.image_size}x{options.image_size}",
        ["method", "estimate GB", "peak GB", "checkpoint MB", "s per iteration", "estimated in s"],
        rows,
    )


if __name__ == "__main__":
    main()
