"""Functions that the programs of this folder share."""

import argparse
import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fdda_ext.commands.compare import main as compare
from fdda_ext.commands.train import main as train, parse_arguments
from fdda_ext.engine import RunFolder, format_duration, standard_error


def finished_run(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Start, resume or only read the run in ``folder``, and return its summary.

    Raises:
        UsageError: If the folder holds a run with another configuration.
    """
    arguments = ["--no-report", f"--out={folder}", *arguments]
    begun = (folder / "config.yaml").exists()
    if begun:
        RunFolder(folder, parse_arguments(arguments)[1], resume=True)
    if not RunFolder.is_finished(folder):
        train([*arguments[:2], "--resume"] if begun else arguments)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def finished_runs(runs: Mapping[Path, Sequence[str]], jobs: int) -> list[dict[str, Any]]:
    """Call `finished_run` for every run, with ``jobs`` processes at the same time."""
    if jobs == 1:
        return [finished_run(*run) for run in runs.items()]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        return list(pool.map(finished_run, runs.keys(), runs.values()))


def positive(value: str) -> int:
    """Parse a positive integer, for argparse."""
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {value}")
    return int(value)


def one(value: str) -> str:
    """Refuse a list with commas, for argparse."""
    if "," in value:
        raise argparse.ArgumentTypeError(f"expected a single value, got {value}")
    return value


def mean_and_spread(values: Sequence[float]) -> str:
    """Format the mean and, if there are several values, the standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def sample_note(summary: Mapping[str, Any]) -> str:
    """Return the standard error of an accuracy over a sample, or "" if all images were tested."""
    top1, images, of = (float(summary.get(name) or 0) for name in ("top1", "images", "of"))
    if images >= of:
        return ""
    return (
        f" Tested on {images:.0f} of {of:.0f} images; the standard error of one accuracy is "
        f"{standard_error(top1, int(images), int(of)):.2f} points."
    )


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def mean_and_spread_of_durations(seconds: Sequence[float]) -> str:
    """Format mean and standard deviation of durations, each in a suitable unit."""
    spread = f" ± {format_duration(statistics.stdev(seconds))}" if len(seconds) > 1 else ""
    return f"{format_duration(statistics.mean(seconds))}{spread}"


def write_table(
    stem: Path, title: str, header: Sequence[str], rows: Sequence[Sequence[object]], note: str = ""
) -> None:
    """Write a table as .csv and .md, and print it."""
    write_csv(stem.with_suffix(".csv"), header, rows)
    write_markdown(stem, title, header, rows, note)


def write_markdown(
    stem: Path, title: str, header: Sequence[str], rows: Sequence[Sequence[object]], note: str = ""
) -> None:
    """Write a table as .md and print it; all columns except the first hold numbers."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    lines.insert(1, "|---" + "|---:" * (len(header) - 1) + "|")
    text = "\n".join([f"### {title}", "", *lines, *(["", note] if note else [])]) + "\n"
    stem.with_suffix(".md").write_text(text)
    print(text)


#: Published training cost on ImageNet, and who published it.
PUBLISHED_COST = {
    "fdda": "7 GPU hours, ResNet-18 (supplement)",
    "gdfq": "over 10 h, ResNet-18, V100 (authors of GENIE)",
    "di": "6 min for 84 images, V100 (authors' code)",
    "zeroq": "30 s, ResNet-50, 8 V100 (authors)",
    "brecq": "20 min, ResNet-18, GTX 1080 Ti (authors)",
}
#: For fdda_ext.compare: schedule share and seeds. For fdda_ext.train: arguments.
COST_BUDGETS = {
    "smoke": (["--share=0.01"], "0", ["--test_limit=71"]),
    "short": ([], "0", ["--test_limit=2130"]),
    "full": ([], "0,1,2", []),
}


def cost_table(description: str | None, name: str, methods: Sequence[str]) -> None:
    """Measure training cost and accuracy of every method, for tables S1 and S2."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(methods))
    parser.add_argument("--model", type=one, default="glyphs_resnet")
    parser.add_argument("--data", default="glyphs")
    parser.add_argument("--bits", type=one, default="W4A4")
    parser.add_argument("--images-per-class", type=int, default=1)
    parser.add_argument("--preset", default="short", help="preset of every method")
    parser.add_argument(
        "--budget", choices=COST_BUDGETS, default="short", help="numbers of seeds and test images"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    options = parser.parse_args()
    limit, seeds, arguments = COST_BUDGETS[options.budget]
    folder = options.out / options.budget
    compare(
        [
            *(f"--methods={','.join(options.methods)}", f"--models={options.model}"),
            *(f"--bits={options.bits}", f"--preset={options.preset}", f"--seeds={seeds}"),
            *(f"--images_per_class={options.images_per_class}", f"--out={folder}", *limit, "--"),
            *(f"--data={options.data}", f"--device={options.device}", *arguments),
        ]
    )
    with (folder / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    rows, numbers = [], []
    for method in options.methods:
        runs = [line for line in lines if line["name"] == method]
        seconds = [float(run["seconds"]) for run in runs]
        before = (method, PUBLISHED_COST.get(method, "not known"))
        after = (
            mean_and_spread([float(run["top1"]) for run in runs]),
            runs[0]["real_images"],
            runs[0]["synthetic_images"],
            max(int(run["peak_memory"]) for run in runs),
        )
        rows.append((*before, mean_and_spread_of_durations(seconds), *after))
        numbers.append((*before, statistics.mean(seconds), *after))
    title = f"Training cost, {options.model} on {options.data}, {options.bits}, {options.device}"
    header = ["method", "published", "here", "top-1 %", "real images", "synthetic images", "MiB"]
    float_top1 = float(lines[0]["float_top1"])
    note = f"Float network: {float_top1:.2f} %, {lines[0]['images']} test images, preset "
    note += f"{options.preset}.{sample_note(lines[0])}"
    write_markdown(folder / name, title, header, rows, note)
    header[2] = "seconds here"
    write_csv(folder / f"{name}.csv", header, numbers)
