"""``make gpu``: build on a machine with a GPU, test, sanitize, measure; one JSON with all of it.

Uses the Python that runs it, whose torch must have CUDA. Nothing is downloaded.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
#: Every test that runs on CUDA. Those of the first file named "sanitized" reach every kernel.
TESTS = [
    "tests/test_cuda.py",
    "tests/test_fake_quantize.py",
    "tests/test_class_batch_stats.py",
    "tests/test_class_stats_loss.py",
]
#: For one tool of compute-sanitizer: some cases are as large as the device, to reach every tile.
SANITIZER_SECONDS = 450


def call(command: list[str], seconds: int, **environment: str) -> dict[str, object]:
    """Run a command to its end or its time limit; keep its status and the end of its output."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        status, output = -1, raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    except FileNotFoundError as error:
        status, output = 127, str(error)
    print(f"[{status}] {' '.join(command)}\n{output[-1500:]}", flush=True)
    return {
        "command": " ".join(command[-6:]),
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "output": output[-3000:],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print("gpu_report: expected torch to reach a CUDA device, got none", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    head = call(["git", "rev-parse", "HEAD"], 30)
    commit = str(head["output"]).strip() if head["status"] == 0 else "unknown"
    report: dict[str, object] = {
        "device": name,
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit,
    }
    report["build"] = call(
        [python, "setup.py", "--quiet", "build_ext", "--inplace"],
        500,
        FDDA_CUDA="1",
        TORCH_CUDA_ARCH_LIST=f"{major}.{minor}",
    )
    tests = [python, "-m", "pytest", "-q", "--maxfail=25", "-p", "no:cacheprovider"]
    report["tests"] = call([*tests, *TESTS, "-k", "cuda"], 500, FDDA_REQUIRE_CUDA="1")
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        report[tool] = call(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            + [*tests, TESTS[0], "-k", "sanitized"],
            SANITIZER_SECONDS,
            FDDA_REQUIRE_CUDA="1",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
    measured = out / "benchmark.json"
    measurements: dict[str, object] = {}
    report["measurements"] = measurements
    programs = "benchmarks/bench_program.py"
    for name, chosen in (
        ("benchmarks", ["benchmarks", f"--ignore={programs}"]),
        ("programs", [programs]),
    ):
        report[name] = call(
            [python, "-m", "pytest", "-q", *chosen, f"--benchmark-json={measured}"],
            600,
            FDDA_BENCH_DEVICE="cuda",
        )
        if measured.exists():
            rows = json.loads(measured.read_text())["benchmarks"]
            measurements |= {b["group"]: b["extra_info"] for b in rows}
            measured.unlink()
    path = out / f"gpu-{name.replace(' ', '-').lower()}-{commit[:8]}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    steps = {key: v for key, v in report.items() if isinstance(v, dict) and "status" in v}
    failed = [key for key, value in steps.items() if value["status"]]
    print(f"{path}: {'failed: ' + ', '.join(failed) if failed else 'all passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
