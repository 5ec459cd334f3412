"""Turn the JSON of ``make bench`` or of ``make gpu`` into a Markdown page of tables.

python benchmarks/report.py benchmarks/out/cpu.json OUT.md [COST.md ...]
python benchmarks/report.py benchmarks/results/gpu-DEVICE-COMMIT.json OUT.md

docs/benchmarks.md and docs/gpu.md contain these tables after their conclusions. COST.md is the
output of benchmarks/inference_cost.py. Its table is appended to the page.
"""

import argparse
import json
from pathlib import Path
from typing import Any

INTRODUCTION = """\
# Benchmarks

Made by `make bench` and `benchmarks/report.py`. Times are medians in microseconds ± the
interquartile range. "x" is the peer's median over ours: above 1, we are faster. All peers of a row
were timed interleaved in one run, after a check that they compute the same result. The process
keeps freed memory, because page faults would otherwise take most of the time.

"copy" is the floor: `copy_` of the bytes that the operation must at least read and write. Its "x"
is above 1 where we are faster than that, because we write outputs of 16 MiB and more past the
caches.

"16 elements" measures the overhead of a call. An operator on LibTorch's stable ABI cannot have a
C++ autograd node, so its gradient is a Python `autograd.Function`. The column "plain Function"
shows the overhead of such a function (one multiplication forward, nothing backward).

"program" runs whole networks at 224x224 from float images to logits, with all layers at W4A4. The
eight-bit peers are OpenVINO with NNCF and ONNX Runtime (QDQ), if they are installed.
"""


GPU_INTRODUCTION = """\
# Benchmarks on a GPU

Made by `make gpu` and `benchmarks/report.py`. Times are medians of a call in microseconds ± the
interquartile range, including the work on the GPU. In brackets is the sum of the times of its
kernels, without the gaps between them. "x" is the peer's kernel time over ours.

The host, here a virtual machine whose speed varied, limits a call of a single operator. The time in
brackets is what such a call costs in a CUDA graph or in a longer queue. Every call gets the same
inputs, which mostly stay in the L2 cache, for all peers alike. All peers of a row were timed
interleaved in one run, after a check that they compute the same result.

"copy" is the floor: `copy_` of the bytes that the operation must at least read and write. "tile 3"
is `int4_conv2d` with the fourth candidate tile of `csrc/cuda/int4_conv2d_plan.cuh` for such a
layer, instead of the chosen one.
"""


COST = """\
## Load time and memory of inference

The time from a file to the first logits of one image in a new process, and the peak memory beyond
that of the imported libraries (`benchmarks/inference_cost.py`, median and range of five). A program
keeps the weights in the layouts of both algorithms, and times both when a batch size is new.

"""


def times_more(theirs: float, ours: float) -> str:
    """Return the ratio of two times, or "-" if the clock was too coarse to measure ours."""
    return f"{theirs / ours:.2f}x" if ours else "-"


def cell(peer: dict[str, float], ours: float) -> str:
    return f"{host_time(peer)} ({times_more(peer['median_us'], ours)})"


def render(report: dict[str, Any]) -> str:
    """Return the Markdown page of a pytest-benchmark report."""
    machine = report["machine_info"]
    lines = [
        INTRODUCTION,
        f"{report['datetime'][:10]}. Machine: {machine.get('gpu') or machine['cpu']['brand_raw']}; "
        f"torch {machine['torch']}; "
        f"Python {machine['python_version']}; {machine['fdda_ext']['isa']}, "
        f"{machine['fdda_ext']['threads']} threads"
        + "".join(f"; {name} {number}" for name, number in machine["peers"].items())
        + ".",
        "",
    ]
    families: dict[str, list[dict[str, Any]]] = {}
    for benchmark in report["benchmarks"]:
        families.setdefault(benchmark["group"].partition(",")[0], []).append(benchmark)
    for family, benchmarks in families.items():
        measured = [
            {k: v for k, v in b["extra_info"].items() if isinstance(v, dict)} for b in benchmarks
        ]
        peers = list(dict.fromkeys(name for m in measured for name in m if name != "fdda_ext"))
        lines += [f"## {family}", "", "| case | fdda_ext | " + " | ".join(peers) + " |"]
        lines.append("|---" * (len(peers) + 2) + "|")
        for benchmark, times in zip(benchmarks, measured, strict=True):
            ours = times["fdda_ext"]["median_us"]
            cells = [cell(times[name], ours) if name in times else "" for name in peers]
            case = benchmark["group"].partition(", ")[2]
            own = host_time(times["fdda_ext"])
            lines.append(f"| {case} | {own} | " + " | ".join(cells) + " |")
        lines.append("")
    for benchmark in report["benchmarks"]:
        if "profile" in benchmark["extra_info"] and benchmark["group"].endswith("batch 16"):
            lines += profile(benchmark)
    return "\n".join(lines)


def device_cell(peer: dict[str, float], ours: dict[str, float]) -> str:
    ratio = times_more(peer["device_us"], ours["device_us"])
    return f"{host_time(peer)} ({peer['device_us']:.1f}, {ratio})"


def host_time(peer: dict[str, float]) -> str:
    return f"{peer['median_us']:.0f} ± {peer['iqr_us']:.0f}"


def render_gpu(report: dict[str, Any]) -> str:
    """Return the Markdown page of a report of ``make gpu``."""
    lines = [
        GPU_INTRODUCTION,
        f"{report['date']}. Machine: {report['device']}; torch {report['torch']}; CUDA "
        f"{report['cuda']}; Python {report['python']}; commit {report['commit'][:8]}.",
        "",
    ]
    families: dict[str, dict[str, dict[str, Any]]] = {}
    for group, info in report["measurements"].items():
        family, _, case = group.partition(", ")
        times = {name: peer for name, peer in info.items() if isinstance(peer, dict)}
        families.setdefault(family, {})[case] = times
    for family, cases in families.items():
        peers = list(dict.fromkeys(n for times in cases.values() for n in times if n != "fdda_ext"))
        lines += [f"## {family}", "", "| case | fdda_ext | " + " | ".join(peers) + " |"]
        lines.append("|---" * (len(peers) + 2) + "|")
        for case, times in cases.items():
            own = times["fdda_ext"]
            cells = [device_cell(times[name], own) if name in times else "" for name in peers]
            ours = f"{host_time(own)} ({own['device_us']:.1f})"
            lines.append(f"| {case} | {ours} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def profile(benchmark: dict[str, Any]) -> list[str]:
    """Return a table of a program's instructions: time, and ratio of the time to the floor."""
    info = benchmark["extra_info"]
    lines = [
        f"## Steps of {benchmark['group']}",
        "",
        f"The floor of a layer is its operations over {info['peak_gops']:.0f} GOP/s, which the "
        "matrix kernel reaches on a large matrix. Winograd's algorithm needs 2.25 times fewer "
        "products. The table leaves out instructions that take less than 1 % of the time.",
        "",
        "| step | by | microseconds | GOP/s | over the floor |",
        "|---|---|---|---|---|",
    ]
    total = sum(seconds for *_, seconds in info["profile"])
    for name, algorithm, products, seconds in info["profile"]:
        if seconds <= total / 100:
            continue
        rate = f"{2 * products / seconds / 1e9:.0f}" if products else ""
        share = 2.25 if algorithm == "winograd" else 1
        floor = 2 * products / share / info["peak_gops"] / 1e9
        over = f"{seconds / floor:.2f}x" if products and "groups" not in algorithm else ""
        lines.append(f"| {name} | {algorithm} | {seconds * 1e6:.0f} | {rate} | {over} |")
    return [*lines, f"| all | | {total * 1e6:.0f} | | |", ""]


def table(text: str) -> str:
    """Return the lines of the Markdown table in a program's output."""
    return "".join(f"{line}\n" for line in text.splitlines() if line.startswith("|"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("cost", type=Path, nargs="*")
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    page = render_gpu(report) if "measurements" in report else render(report)
    if options.cost:
        page += "\n" + COST + "\n".join(table(path.read_text()) for path in options.cost)
    options.page.write_text(page)


if __name__ == "__main__":
    main()
