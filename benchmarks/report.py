"""Turn the JSON of ``make bench`` into docs/benchmarks.md.

python benchmarks/report.py benchmarks/out/cpu.json docs/benchmarks.md [COST.md ...]

Tables that benchmarks/inference_cost.py printed follow at the end.
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


COST = """\
## Load time and memory of inference

From a file to the first logits of one image, in a process of its own, and the memory that this took
beyond the imported libraries (`benchmarks/inference_cost.py`, median and range of five). A program
keeps the weights in the layouts of both algorithms, and times them when it first sees a batch size.

"""


def cell(peer: dict[str, float], ours: float) -> str:
    return f"{peer['median_us']:.0f} ± {peer['iqr_us']:.0f} ({peer['median_us'] / ours:.2f}x)"


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
            own = f"{ours:.0f} ± {times['fdda_ext']['iqr_us']:.0f}"
            lines.append(f"| {case} | {own} | " + " | ".join(cells) + " |")
        lines.append("")
    for benchmark in report["benchmarks"]:
        if "profile" in benchmark["extra_info"] and benchmark["group"].endswith("batch 16"):
            lines += profile(benchmark)
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
        if seconds < total / 100:
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
    page = render(json.loads(options.report.read_text()))
    if options.cost:
        page += "\n" + COST + "\n".join(table(path.read_text()) for path in options.cost)
    options.page.write_text(page)


if __name__ == "__main__":
    main()
