"""Build, test, sanitize, train and measure on a machine with a GPU (``make gpu``).

Writes one JSON file after every step. Uses the Python that runs this program; its torch must have
CUDA. Downloads nothing. Steps run at the same time, except the benchmarks, which run last.
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
#: Files of the tests that run on CUDA. The "sanitized" tests of the first file run every kernel.
TESTS = [
    "tests/test_cuda.py",
    "tests/test_fake_quantize.py",
    "tests/test_class_batch_stats.py",
    "tests/test_class_stats_loss.py",
]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
#: The tests of a sanitizer are split over two processes, since it slows them down a hundredfold.
HALVES = {"int4": "sanitized and int4", "others": "sanitized and not int4"}
#: Each of these methods runs with a hundredth of its schedule.
METHODS = """
    fdda distill minmax mse lapq bitsplit adaquant brecq qdrop gdfq qimera zaq zeroq dsg di adi
"""
#: The most important first, since the time may run out.
BENCHMARKS = [
    "benchmarks/bench_int4_conv2d.py",
    "benchmarks/bench_fdda_iteration.py",
    "benchmarks/bench_class_stats_loss.py",
    "benchmarks/bench_program.py",
    "benchmarks/bench_fake_quantize.py",
    "benchmarks/bench_class_batch_stats.py",
]


#: Process groups of the running steps.
RUNNING: set[int] = set()


def end(number: int, frame: object) -> None:
    """Handle a signal: kill all running steps and exit at once."""
    for group in list(RUNNING):
        os.killpg(group, signal.SIGKILL)
    os._exit(128 + number)


def without_paths(text: str) -> str:
    """Replace the machine's paths, so that the report can be published."""
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
    """A command, its limit in seconds, and the variables that it adds to the environment."""

    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, deadline: float) -> dict[str, object]:
        """Run until the end or the limit; return status, seconds and the end of the output."""
        start = time.monotonic()
        limit = min(self.limit, deadline - start)
        if limit <= 0:
            print(f"[-2] {' '.join(self.command)} (no time left)", flush=True)
            command = without_paths(" ".join(self.command))
            return {"command": command, "status": -2, "seconds": 0, "output": ""}
        try:
            # Its own process group, so that its child processes end with it.
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
    """Return the tests of operators and programs, with and without the sanitizers."""
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
    """Return a short run of every method, and a run of FDDA's whole short preset."""
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
        "--seconds", type=float, default=3600, help="time limit; half is kept for the benchmarks"
    )
    parser.add_argument("--skip", nargs="+", default=[], help="skip steps with these prefixes")
    parser.add_argument("--commit", help="hash of the commit, if there is no git repository")
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
        log = path.with_suffix(".log")  # remains if this program is interrupted
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
