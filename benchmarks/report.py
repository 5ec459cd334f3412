"""Turn the JSON of ``make bench`` or of ``make gpu`` into a Markdown page of tables.

python benchmarks/report.py benchmarks/out/cpu.json OUT.md [COST.md ...]
python benchmarks/report.py benchmarks/results/gpu-DEVICE-COMMIT.json OUT.md

docs/benchmarks.md and docs/gpu.md hold these tables, with their conclusions in front. Tables that
benchmarks/inference_cost.py printed follow at the end.
"""

import argparse
import json
from pathlib import Path
from typing import Any

INTRODUCTION = """\
# Benchmarks

Made by `make bench` and `benchmarks/report.py`. Medians in microseconds ± the interquartile range;
"x" is the peer's median over ours, so above 1 we are faster. All peers of a line took turns in one
run, after a check that they compute the same, on a heap that keeps freed memory, as page faults
would drown the work otherwise. "copy" moves the bytes that the operation must at least read and
write, with `copy_`: it is the floor, and its "x" tells how near we are to it. Above 1, we beat it:
outputs from 16 MiB on are stored past the caches.

"16 elements" measures the way to the kernel and back. An operator on LibTorch's stable ABI cannot
bring a C++ autograd node, so its gradient is a Python `autograd.Function`, whose own cost is the
column "plain Function" (one multiplication forward, nothing backward).

"program" runs whole networks at 224x224, W4A4 with all layers at 4 bits, from float images to
logits; the eight-bit peers, OpenVINO with NNCF and ONNX Runtime (QDQ), are measured where they are
installed.
"""


GPU_INTRODUCTION = """\
# Benchmarks on a GPU

Made by `make gpu` and `benchmarks/report.py`. Microseconds: the median of a call ± the
interquartile range, up to the end of its work, and in brackets the sum of its kernels' times on the
device, without the gaps between them; "x" is the peer's kernel time over ours. A call of a single
operator is bound by the host, which launches it, here a virtual machine whose speed varied; what
counts then is the bracket, as in a CUDA graph or a longer queue. Inputs are the same from call to
call and mostly stay in the second-level cache, for all peers alike. All peers of a line took turns
in one run, after a check that they compute the same. "copy" moves the bytes that the operation must
at least read and write, with `copy_`: it is the floor. "tile 3" is `int4_conv2d` made to take the
fourth of `csrc/cuda/int4_conv2d_plan.cuh`'s tiles for such a layer, beside the one that it chooses.
"""


COST = """\
## Load time and memory of inference

From a file to the first logits of one image, in a process of its own, and the memory that this took
beyond the imported libraries (`benchmarks/inference_cost.py`, median and range of five). A program
keeps the weights in the layouts of both algorithms, and times them when it first sees a batch size.

"""


def times_more(theirs: float, ours: float) -> str:
    """A ratio of times, or nothing where the clock was too coarse to see ours."""
    return f"{theirs / ours:.2f}x" if ours else "-"


def cell(peer: dict[str, float], ours: float) -> str:
    return f"{host_time(peer)} ({times_more(peer['median_us'], ours)})"


def render(report: dict[str, Any]) -> str:
    """The Markdown page of one pytest-benchmark report."""
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
    """The Markdown page of one report of ``make gpu``."""
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
    """A table of where a program's time goes, and how far each step is from its floor."""
    info = benchmark["extra_info"]
    lines = [
        f"## Steps of {benchmark['group']}",
        "",
        f"The floor of a layer is its products over {info['peak_gops']:.0f} GOP/s, which the "
        "product kernel reaches on a large matrix; Winograd's algorithm has 2.25 times fewer. What "
        "takes less than a hundredth of the whole is left out.",
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
    """The lines of a Markdown table in what a program printed."""
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
