"""``make gpu``: build on a machine with a GPU, test, sanitize, train, measure; one JSON of it all.

Uses the Python that runs it, whose torch must have CUDA. Nothing is downloaded. What does not
depend on each other runs at once, but for the benchmarks, which come last and alone. The JSON is
written after every step, so that little is lost if the whole is cut short.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider"]
#: Every test that runs on CUDA. Those of the first file named "sanitized" reach every kernel.
TESTS = [
    "tests/test_cuda.py",
    "tests/test_fake_quantize.py",
    "tests/test_class_batch_stats.py",
    "tests/test_class_stats_loss.py",
]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
#: A sanitizer's tests go to two processes, as it slows them down a hundredfold.
HALVES = {"int4": "sanitized and int4", "others": "sanitized and not int4"}
#: A hundredth of the schedule of every method.
METHODS = """
    fdda distill minmax mse lapq bitsplit adaquant brecq qdrop gdfq qimera zaq zeroq dsg di adi
"""
#: What matters most first, in case the time ends.
BENCHMARKS = [
    "benchmarks/bench_int4_conv2d.py",
    "benchmarks/bench_fdda_iteration.py",
    "benchmarks/bench_class_stats_loss.py",
    "benchmarks/bench_program.py",
    "benchmarks/bench_fake_quantize.py",
    "benchmarks/bench_class_batch_stats.py",
]


#: Process groups of the steps that are under way.
RUNNING: set[int] = set()


def end(number: int, frame: object) -> None:
    """On a signal: end what was started, too, and leave at once."""
    for group in list(RUNNING):
        os.killpg(group, signal.SIGKILL)
    os._exit(128 + number)


def without_paths(text: str) -> str:
    """For a report to be published: nothing of where things are on the machine."""
    for path, name in (
        (PYTHON, "python3"),
        (str(ROOT), "."),
        (tempfile.gettempdir(), "TMP"),
        (sys.prefix, "PREFIX"),
    ):
        text = text.replace(path, name)
    return text


@dataclass(frozen=True)
class Step:
    """A command, its limit in seconds, what it adds to the environment."""

    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, deadline: float) -> dict[str, object]:
        """To its end or its limit; status, seconds and the end of the output."""
        start = time.monotonic()
        limit = min(self.limit, deadline - start)
        if limit <= 0:
            print(f"[-2] {' '.join(self.command)} (no time left)", flush=True)
            command = without_paths(" ".join(self.command))
            return {"command": command, "status": -2, "seconds": 0, "output": ""}
        try:
            # A group of its own, so that what it started ends with it.
            process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**os.environ, **self.environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except FileNotFoundError as error:
            print(f"[127] {error}", flush=True)
            return {"command": self.command[0], "status": 127, "seconds": 0, "output": str(error)}
        RUNNING.add(process.pid)
        try:
            output, _ = process.communicate(timeout=limit)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            status = -1
        finally:
            RUNNING.discard(process.pid)
        seconds = round(time.monotonic() - start, 1)
        output = without_paths(output)
        print(f"[{status}] {' '.join(self.command)} ({seconds} s)", flush=True)
        if status:
            print(output[-1500:], flush=True)
        command = without_paths(" ".join(self.command))
        return {"command": command, "status": status, "seconds": seconds, "output": output[-4000:]}


def tests() -> dict[str, Step]:
    """Operators and programs, the same under the sanitizers, and every method."""
    required = {"FDDA_REQUIRE_CUDA": "1", "OMP_NUM_THREADS": "2"}
    steps = {
        f"tests {file}": Step([*PYTEST, "--maxfail=25", file, "-k", "cuda"], 400, required)
        for file in TESTS
    }
    for tool in TOOLS:
        for half, chosen in HALVES.items():
            steps[f"{tool} {half}"] = Step(
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
                + [*PYTEST, "--maxfail=3", TESTS[0], "-k", chosen],
                600,
                {**required, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
    return steps


def runs(folder: str) -> dict[str, Step]:
    """All methods briefly, each in a process of its own, and FDDA's short preset whole."""
    train = [PYTHON, "-m", "fdda_ext.train", "--device=cuda", "--no-report"]
    steps = {"train": Step([*train, f"--out={folder}/whole"], 300)}
    for method in METHODS.split():
        compare = [
            PYTHON,
            "-m",
            "fdda_ext.compare",
            f"--methods={method}",
            f"--out={folder}/{method}",
        ]
        compare += ["--models=glyphs_resnet", "--bits=W3A3", "--seeds=0", "--share=0.01"]
        steps[f"method {method}"] = Step([*compare, "--", "--device=cuda", "--test_limit=71"], 200)
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="for all of it; half are kept for benchmarks"
    )
    parser.add_argument("--skip", nargs="+", default=[], help="steps whose name begins so")
    parser.add_argument("--commit", help="what git would say, where there is no repository")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_report: expected torch to reach a CUDA device, got none", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_properties("cuda")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = options.commit or git.stdout.strip() or "unknown"
    steps: dict[str, dict[str, object]] = {}
    measurements: dict[str, object] = {}
    report = {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "steps": steps,
        "measurements": measurements,
    }
    path = options.out / f"gpu-{device.name.replace(' ', '-').lower()}-{commit[:8]}.json"

    def run(chosen: dict[str, Step], share: float = 1, at_once: int = 1) -> None:
        deadline = start + share * options.seconds
        chosen = {n: step for n, step in chosen.items() if not n.startswith(tuple(options.skip))}
        with ThreadPoolExecutor(at_once) as pool:
            futures = {pool.submit(step.run, deadline): name for name, step in chosen.items()}
            for done in as_completed(futures):
                steps[futures[done]] = done.result()
                path.write_text(json.dumps(report, indent=1) + "\n")

    architecture = {"FDDA_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{device.major}.{device.minor}"}
    build = [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"]
    run({"build": Step(build, 900, architecture)}, 0.5)
    with tempfile.TemporaryDirectory() as folder:
        run({**tests(), **runs(folder)}, 0.5, at_once=max(2, (os.cpu_count() or 2) - 1))
        log = path.with_suffix(".log")  # stays if this is cut short
        log.unlink(missing_ok=True)
        environment = {"FDDA_BENCH_DEVICE": "cuda", "FDDA_BENCH_LOG": str(log)}
        run({"benchmarks": Step([*PYTEST, *BENCHMARKS], 1800, environment)})
        if log.exists():
            for line in log.read_text().splitlines():
                measured = json.loads(line)
                measurements[measured.pop("group")] = measured
            log.unlink()
    path.write_text(json.dumps(report, indent=1) + "\n")
    failed = [name for name, result in steps.items() if result["status"]]
    print(f"{path}: {'failed: ' + ', '.join(failed) if failed else 'all passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
