"""Rehearse a run on ImageNet without ImageNet: draw a synthetic data set of the same form, train
ResNet-18 on it briefly, run FDDA with the published settings but few iterations, export, evaluate.

    python python/rehearse_imagenet.py --out runs/rehearsal

Every stage is a command that a user of ImageNet would type. The program prints it, and writes its
time and peak memory to rehearsal.json and rehearsal.md in the folder. It skips finished stages.
The accuracy means nothing: training takes minutes, and the validation images have typefaces that
the network has not seen.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from fdda_ext.engine import format_duration

#: The phases of the published schedule, as shares of --iterations.
SCHEDULE = {
    "settings.fdda.warmup_iterations": 1 / 4,
    "settings.fdda.range_iterations": 1 / 8,
    "settings.fdda.misclassified_iterations": 1 / 8,
    "settings.distillation.steps": 3 / 4,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all files")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--per-class", type=int, default=3, help="training images of each class")
    parser.add_argument("--val-per-class", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4, help="epochs of the float network")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of the float network")
    parser.add_argument("--config", default="imagenet/resnet18-w4a4-f4l4", help="preset of FDDA")
    parser.add_argument("--model", default="torchvision:resnet18")
    parser.add_argument("--iterations", type=int, default=32, help="iterations of FDDA, all phases")
    parser.add_argument("--train-args", default="", help="more arguments for fdda_ext.train")
    return parser.parse_args()


def stages(options: argparse.Namespace) -> dict[str, tuple[list[str], Path]]:
    """Return the commands in order, each with a file or folder that it creates."""
    out, folder = options.out, f"folder:{options.out / 'data'}"
    data = folder.replace("folder:", "imagenet:") if options.classes == 1000 else folder
    weights = out / "float" / f"{options.model.replace(':', '-')}.safetensors"
    schedule = [f"--{key}={max(int(options.iterations * x), 1)}" for key, x in SCHEDULE.items()]
    return {
        "draw": (
            [
                *("fdda_ext.data.synthetic", "--out", str(out / "data")),
                *("--classes", str(options.classes), "--per-class", str(options.per_class)),
                *("--val-per-class", str(options.val_per_class)),
            ],
            out / "data" / "val",
        ),
        "pretrain": (
            [
                *("fdda_ext.pretrain", "--data", folder),
                *("--model", options.model, "--out", str(out / "float"), "--batch", "16"),
                *("--epochs", str(options.epochs), "--lr", str(options.lr)),
            ],
            weights,
        ),
        "FDDA": (
            [
                *("fdda_ext.train", "--config", options.config, "--data", data),
                *("--model", options.model, "--weights", str(weights), "--out", str(out / "run")),
                # The deploy grid allows export. Scales are learned.
                *("--quantization.grid=deploy", "--settings.distillation.frozen_scales=false"),
                *schedule,
                *shlex.split(options.train_args),
            ],
            out / "run" / "summary.json",
        ),
        "export": (
            ["fdda_ext.export", "--run", str(out / "run")],
            out / "run" / "model.int4.safetensors",
        ),
        "evaluate": (
            [
                *("fdda_ext.evaluate", "--run", str(out / "run" / "model.int4.safetensors")),
                *("--data", data),
            ],
            out / "evaluated.txt",
        ),
    }


def run(command: list[str], log: Path) -> dict[str, float]:
    """Run a command; return its seconds and the peak memory of its process, in MiB."""
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{log.read_text()}\nfailed with status {process.returncode}; see {log}")
    return {"seconds": time.monotonic() - begin, "peak_mib": usage.ru_maxrss / 1024}


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "rehearsal.json"
    measured = json.loads(record.read_text()) if record.exists() else {}
    for name, (command, result) in stages(options).items():
        print("$ python -m", shlex.join(command), flush=True)
        if name not in measured or not result.exists():
            measured[name] = run(command, log := options.out / f"{name}.log")
            if name == "evaluate":
                result.write_text(log.read_text())
            record.write_text(json.dumps(measured, indent=2) + "\n")
        print("\n".join((options.out / f"{name}.log").read_text().splitlines()[-12:]), flush=True)
    lines = ["| stage | time | peak memory, MiB |", "| --- | ---: | ---: |"]
    for name, m in measured.items():
        lines.append(f"| {name} | {format_duration(m['seconds'])} | {m['peak_mib']:.0f} |")
    table = "\n".join(lines) + "\n"
    (options.out / "rehearsal.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
