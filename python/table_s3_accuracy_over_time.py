"""Table S3: accuracy after 1/7, 3/7, 5/7 and 7/7 of equal budgets, and which method is ahead when.

    python python/table_s3_accuracy_over_time.py                     fdda and distill, ten minutes
    python python/table_s3_accuracy_over_time.py --methods fdda gdfq --bits W4A4 --budget full
    python python/table_s3_accuracy_over_time.py --preset paper --seconds 36000 --device cuda \\
        --model torchvision:resnet18 --data imagenet:PATH

fdda_ext.compare gives every method a schedule of about the same training time, which does not
include evaluations. Sevenths refer to the time of each run, since other processes may slow down a
single run. Between two measurements the accuracy is interpolated linearly; before the first it is
unknown. The program writes curve.csv with all measurements, table.csv and .md, and curve.png below
--out. The same command continues after an interruption.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from common import mean_and_spread, one, sample_note, write_csv, write_table

from fdda_ext.commands.compare import Setting, main as compare
from fdda_ext.engine import run_command
from fdda_ext.errors import UsageError
from fdda_ext.methods import Method, method_class
from fdda_ext.visualization import COLOURS, MARKERS, new_figure

#: For fdda_ext.compare: budget and seeds. For fdda_ext.train: arguments.
BUDGETS = {
    "smoke": ("--student_images=128", "0", ["--test_limit=71", "--evaluate_every=1"]),
    "short": ("--budget=60", "0,1,2", ["--test_limit=2130", "--evaluate_every=20"]),
    "full": ("--budget=600", "0,1,2", ["--evaluate_limit=2000", "--evaluate_every=25"]),
}
PARTS = (1, 3, 5, 7)
#: If two curves cross more often, only the number of crossings is given.
_MOST_TURNS = 3

Curve = tuple[np.ndarray, np.ndarray]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["fdda", "distill"])
    parser.add_argument("--model", type=one, default="glyphs_resnet")
    parser.add_argument("--data", default="glyphs")
    parser.add_argument("--bits", type=one, default="W3A3")
    parser.add_argument("--preset", default="short", help="preset of every method")
    parser.add_argument("--budget", choices=BUDGETS, default="short", help="time and test images")
    parser.add_argument("--seconds", type=float, help="training time of a run, overrides --budget")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/table_s3"))
    options = parser.parse_args()
    for method in options.methods:
        if method_class(method.partition("+")[0]).step is Method.step:
            raise UsageError(f"table_s3: expected methods that train step by step, got {method}")
    return options


def curves(folder: Path, options: argparse.Namespace) -> dict[str, list[Curve]]:
    """Return the curves of every method, one per seed: sevenths of the time, top-1 in %."""
    limit, seeds, arguments = BUDGETS[options.budget]
    if options.seconds is not None:
        limit = f"--budget={options.seconds}"
    compare(
        [
            *(f"--methods={','.join(options.methods)}", f"--models={options.model}", limit),
            *(f"--bits={options.bits}", f"--seeds={seeds}", f"--preset={options.preset}"),
            *(f"--out={folder}", "--", f"--data={options.data}", f"--device={options.device}"),
            *arguments,
        ]
    )
    runs = folder / Setting(options.model, options.bits, "same", 1).name
    measured = {}
    for method, seed in itertools.product(options.methods, seeds.split(",")):
        run = runs / f"{method}-seed{seed}"
        end = json.loads((run / "summary.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        points = [line for line in lines if "top1" in line]
        last = end["iterations"] - 1  # its measurement is the run's result
        points = [p for p in points if p["iteration"] < last] + [{**end, "iteration": last}]
        measured[method, seed] = [(p["iteration"], p["seconds"], p["top1"]) for p in points]
    found: dict[str, list[Curve]] = {}
    rows = []
    for (method, seed), points in measured.items():
        iterations, seconds, top1 = np.array(points).T
        # The clock may be too coarse for a short run. Then use iterations instead of seconds.
        spent = seconds if seconds[-1] else iterations + 1
        sevenths = 7 * spent / spent[-1]
        found.setdefault(method, []).append((sevenths, top1))
        columns = zip(seconds, sevenths, top1, strict=True)
        rows += [(method, seed, s, f"{x:.3f}", a) for s, x, a in columns]
    write_csv(folder / "curve.csv", ("method", "seed", "seconds", "sevenths", "top-1 %"), rows)
    return found


def at(curve: Curve, part: float) -> float:
    """Return the top-1 after ``part`` sevenths, or NaN before the first measurement."""
    return float(np.interp(part, *curve, left=np.nan))


def crossings(first: str, second: str, found: dict[str, list[Curve]]) -> str:
    """Describe when the mean of one method overtakes that of the other."""
    grid = np.linspace(0, 7, 701)
    means = [np.mean([[at(c, x) for x in grid] for c in found[m]], 0) for m in (first, second)]
    lead = means[0] - means[1]
    known = ~np.isnan(lead) & (lead != 0)
    places, signs = grid[known], np.sign(lead[known])
    if not len(signs):
        return f"{first} and {second} are equal in all measurements."
    turns = np.nonzero(np.diff(signs))[0]
    ahead = [(first, second) if sign > 0 else (second, first) for sign in signs[[0, *(turns + 1)]]]
    if len(turns) > _MOST_TURNS:
        return (
            f"{first} and {second} cross {len(turns)} times between {places[turns[0] + 1]:.2f} "
            f"and {places[turns[-1] + 1]:.2f} sevenths; "
            f"{ahead[-1][0]} ends ahead of {ahead[-1][1]}."
        )
    text = f"{ahead[0][0]} is ahead of {ahead[0][1]} at first"
    for turn, (leader, other) in zip(turns, ahead[1:], strict=True):
        text += f"; {leader} overtakes {other} after {places[turn + 1]:.2f} sevenths"
    return f"{text}." if len(turns) else text.replace(" at first", " throughout.")


def draw(found: dict[str, list[Curve]], folder: Path, options: argparse.Namespace) -> None:
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    for i, (method, runs) in enumerate(found.items()):
        for seed, (x, y) in enumerate(runs):
            style = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "markersize": 3.5}
            axes.plot(x, y, linewidth=1.2, alpha=0.8, label=None if seed else method, **style)
    axes.set(xlabel="sevenths of a run's time", ylabel="top-1, %", xlim=(0, 7.1))
    axes.set_title(f"{options.model} on {options.data}, {options.bits}", fontsize=10)
    axes.grid(color="#E5E5E5")
    axes.legend(frameon=False)
    figure.savefig(folder / "curve.png", dpi=150)


def main() -> None:
    options = parse()
    folder = options.out / options.budget
    found = curves(folder, options)
    draw(found, folder, options)
    rows = []
    for method, runs in found.items():
        cells = [[at(curve, part) for curve in runs] for part in PARTS]
        rows.append([method, *("" if np.isnan(c).any() else mean_and_spread(c) for c in cells)])
    note = " ".join(crossings(a, b, found) for a, b in itertools.combinations(found, 2))
    summary = next(folder.glob("*/*/summary.json"), None)
    note += sample_note(json.loads(summary.read_text())) if summary else ""
    title = f"Top-1 % over training time, {options.model}, {options.bits}"
    header = ("method", *(f"{part}/7 of the budget" for part in PARTS))
    write_table(folder / "table", title, header, rows, note)


if __name__ == "__main__":
    run_command(main)
