"""Table: top-1 of the embedded networks at W4A4 and W3A3, all layers, over three seeds.

    python python/table_glyphs.py               every run (three quarters of an hour), the table
    python python/table_glyphs.py --models glyphs_resnet --bits W4A4

Finished runs are kept in --out and not repeated, so the program can be stopped at any time.
"""

import argparse
import json
import statistics
from pathlib import Path

from fdda_ext.data import load_dataset
from fdda_ext.engine import BatchSource, evaluate, run_command
from fdda_ext.models import load_model
from fdda_ext.train import main as train

METHODS = ("minmax", "mse", "distill", "fdda")


def accuracies(folder: Path) -> dict[str, float]:
    """Top-1 by method of one run and its baselines."""
    places = {name: folder / "baselines" / name for name in METHODS[:-1]} | {"fdda": folder}
    return {
        name: json.loads((path / "summary.json").read_text())["top1"]
        for name, path in places.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["glyphs_resnet", "glyphs_mobilenet"])
    parser.add_argument("--bits", nargs="+", default=["W4A4", "W3A3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/table_glyphs"))
    options = parser.parse_args()
    test = BatchSource(load_dataset("glyphs", "test"))
    lines = ["| network | bits | float | " + " | ".join(METHODS) + " |", "|---" * 7 + "|"]
    for model in options.models:
        top1 = evaluate(load_model(model), test).top1
        for bits in options.bits:
            runs = []
            for seed in options.seeds:
                folder = options.out / f"{model}-{bits}-seed{seed}"
                if not (folder / "summary.json").exists():
                    command = ["--out", str(folder), "--threads", "1"]
                    if (folder / "config.yaml").exists():
                        command.append("--resume")
                    else:
                        command += ["--model", model, "--bits", bits, "--seed", str(seed)]
                    train(command)
                runs.append(accuracies(folder))
            cells = []
            for name in METHODS:
                values = [run[name] for run in runs]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
            lines.append(f"| {model} | {bits} | {top1:.2f} | " + " | ".join(cells) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
