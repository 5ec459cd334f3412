"""Kill training runs at random moments, resume them, and compare with an uninterrupted run.

Moments are uniform over the length of a whole run: imports, evaluations, training, and the writing
of checkpoints (one after every iteration) and results. Student, generator, BNS centres and losses
must be bit-identical to those of the uninterrupted run.

    python python/kill_and_resume.py --kills 20
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors import safe_open

#: Arguments of fdda_ext.train, for a few seconds of training on the embedded data.
ARGUMENTS = [
    "--threads=1",
    "--test_limit=71",
    "--baselines=[]",
    "--settings.distillation.steps=24",
    "--settings.fdda.warmup_iterations=4",
    "--settings.fdda.generator.channels=4",
    "--settings.fdda.batch=8",
]
_PROGRAM = """
import functools, sys
from fdda_ext import quantizing
from fdda_ext.commands import train as command
from fdda_ext.engine import run_command
quantizing.train = functools.partial(quantizing.train, checkpoint_seconds=0.0, log_every=1)
run_command(lambda: command.main(sys.argv[1:]))
"""


def start(folder: Path) -> subprocess.Popen[str]:
    """Start or resume the run in ``folder``."""
    begun = (folder / "config.yaml").exists()
    arguments = ["--threads=1", "--resume"] if begun else ARGUMENTS
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments, "--no-report", f"--out={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: Path) -> None:
    """Complete the run in ``folder``."""
    process = start(folder)
    _, message = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run in {folder} ended with status {process.returncode}: {message}")


def content(folder: Path) -> dict[str, Any]:
    """Return all results of a run except times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == "checkpoint.safetensors":
            continue
        with safe_open(str(path), framework="np") as file:
            for name in file.keys():
                found[f"{path.name} {name}"] = file.get_tensor(name).tobytes()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    summary.pop("peak_memory")  # this covers only the last process
    for item in (*lines, summary):
        item.pop("seconds")
    return {**found, "metrics": lines, "summary": summary}


def compare(folder: Path, expected: dict[str, Any]) -> None:
    """Exit with a message unless the results of the run in ``folder`` are ``expected``."""
    found = content(folder)
    others = [name for name in expected | found if expected.get(name) != found.get(name)]
    if others:
        raise SystemExit(
            f"the run in {folder} differs from the uninterrupted run in {', '.join(others)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, folder = Path(name) / "whole", Path(name) / "killed"
        begin = time.monotonic()
        finish(whole)
        length = time.monotonic() - begin
        expected = content(whole)
        kills = 0
        while kills < options.kills:
            process = start(folder)
            begin = time.monotonic()
            try:
                process.communicate(timeout=moments.uniform(0, length))
                # The run ended before the kill: the machine is faster now. Otherwise there might
                # be no more kills.
                length = min(length, time.monotonic() - begin)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                metrics = folder / "metrics.jsonl"
                done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
                print(f"kill {kills}: after {done} of {len(expected['metrics'])} iterations")
            finish(folder)
            compare(folder, expected)
            shutil.rmtree(folder)
    print(f"{kills} kills: every resumed run is bit-identical to the uninterrupted run")


if __name__ == "__main__":
    main()
