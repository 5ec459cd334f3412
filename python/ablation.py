"""Ablation of FDDA: single losses, noise, loss weights, images per class, first layer.

    python python/ablation.py                               the losses, twenty minutes on one core
    python python/ablation.py --groups all --budget full --jobs 8    everything, whole schedules
    python python/ablation.py --groups noise --budget full --preset paper --device cuda \\
        --model torchvision:resnet18 --data imagenet:PATH

Every row is FDDA with the preset, except for the change that it names. The program writes runs.csv
and ablation.csv, .md and .png below --out. The spread is the standard deviation over seeds;
differences are taken seed by seed. The same command continues after an interruption. It refuses a
folder whose runs have other options.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from common import (
    finished_runs,
    mean_and_spread,
    positive,
    sample_note,
    write_csv,
    write_table,
)

from fdda_ext.commands.train import parse_arguments
from fdda_ext.engine import run_command
from fdda_ext.visualization import COLOURS, new_figure

FULL = "full method"
NO_IMAGES = "0 images (GDFQ's losses)"
#: Arguments of fdda_ext.train, by group and row.
GROUPS = {
    "losses": {
        "without L_BNS": ["--settings.fdda.bns_weight=0"],
        "without L_C": ["--settings.fdda.centralised_weight=0"],
        "without L_D": ["--settings.fdda.distorted_weight=0"],
        "without L_C and L_D": [
            "--settings.fdda.centralised_weight=0",
            "--settings.fdda.distorted_weight=0",
        ],
        "without cross entropy": ["--settings.fdda.classification_weight=0"],
    },
    "noise": {
        f"noise {mean}, {variance}": [
            f"--settings.fdda.distortion.mean_std={mean}",
            f"--settings.fdda.distortion.variance_std={variance}",
        ]
        for mean, variance in ((0.0, 0.0), (0.1, 0.2), (0.5, 1.0), (1.0, 2.0))
    },
    "weights": {
        f"{name} of weight {value}": [f"--settings.fdda.{key}_weight={value}"]
        for name, key, values in (
            ("L_BNS", "bns", (0.2, 5.0)),
            ("L_C", "centralised", (0.1, 1.0)),
            ("L_D", "distorted", (0.1, 5.0)),
        )
        for value in values
    },
    "images": {
        NO_IMAGES: ["--method=gdfq"],
        **{f"{n} images per class": [f"--images_per_class={n}"] for n in (2, 4, 8)},
    },
    "layers": {
        f"class losses from {share} of the depth": [f"--settings.fdda.class_depth={share}"]
        for share in (0.0, 0.25, 0.75)
    },
}
SMOKE = ["--test_limit=71", "--schedule_share=0.003", "--settings.fdda.generator.channels=4"]
#: Arguments of fdda_ext.train, and seeds.
BUDGETS = {
    "smoke": (SMOKE, [0]),
    "short": (["--test_limit=2130", "--schedule_share=0.25"], [0, 1, 2]),
    "full": ([], [0, 1, 2]),
}


def constants_for_gdfq(preset: str) -> list[str]:
    """Return arguments that give GDFQ the schedule and the student step of FDDA's ``preset``."""
    settings = parse_arguments(["--method=fdda", f"--preset={preset}"])[0].settings
    fdda, student = asdict(settings.fdda), asdict(settings.distillation)
    student["generated_batch"] += student["real_batch"]  # all images are generated
    shared = ("batch", "lr", "lr_milestones", "warmup_iterations", "student_steps_per_iteration")
    values = {f"gdfq.{name}": fdda[name] for name in shared}
    values |= {f"distillation.{name}": value for name, value in student.items()}
    return [
        f"--settings.{name}={'null' if value is None else value}" for name, value in values.items()
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=[*GROUPS, "all"], default=["losses"])
    parser.add_argument("--model", default="glyphs_mobilenet")
    parser.add_argument("--data", default="glyphs")
    parser.add_argument("--bits", default="W3A3")
    parser.add_argument("--preset", default="short")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", choices=BUDGETS, default="short")
    parser.add_argument("--jobs", type=positive, default=1, help="number of runs at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    return parser.parse_args()


def draw(differences: dict[str, list[float]], folder: Path, title: str) -> None:
    """Plot differences to the full method: a dot for every run, a bar for the mean of a row."""
    figure = new_figure(6.8, 1.0 + 0.26 * len(differences))
    axes = figure.subplots()
    for place, values in enumerate(differences.values()):
        axes.barh(place, sum(values) / len(values), color=COLOURS[5], height=0.6)
        axes.plot(values, [place] * len(values), "o", markersize=4, color=COLOURS[0])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(differences)), list(differences), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("top-1 minus that of the full method, points (dots: seeds, bar: mean)")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    figure.savefig(folder / "ablation.png", dpi=150)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # the same order of sums on every machine
    groups = list(GROUPS) if "all" in options.groups else options.groups
    rows = {FULL: [], **{row: args for group in groups for row, args in GROUPS[group].items()}}
    if NO_IMAGES in rows:
        rows[NO_IMAGES] = [*rows[NO_IMAGES], *constants_for_gdfq(options.preset)]
    budget, seeds = BUDGETS[options.budget]
    folder = options.out / options.budget / f"{options.model.replace(':', '-')}-{options.bits}"
    shared = [f"--{n}={getattr(options, n)}" for n in ("model", "data", "bits", "preset", "device")]
    runs = {
        # Changes come last, since the last value of an option counts.
        folder / f"{row.replace('/', ' of ')}, seed {seed}": [
            *(*shared, f"--seed={seed}", "--baselines=[]", "--threads=1", *budget, *changes)
        ]
        for row, changes in rows.items()
        for seed in seeds
    }
    ends = iter(finished_runs(runs, options.jobs))
    summaries = {row: [next(ends) for _ in seeds] for row in rows}
    top1 = {row: [end["top1"] for end in found] for row, found in summaries.items()}
    differences = {
        row: [a - b for a, b in zip(values, top1[FULL], strict=True)]
        for row, values in top1.items()
        if row != FULL
    }
    lines = [(row, s, x) for row, xs in top1.items() for s, x in zip(seeds, xs, strict=True)]
    write_csv(folder / "runs.csv", ("row", "seed", "top-1 %"), lines)
    title = f"FDDA, {options.model}, {options.bits}"
    table = [
        (row, mean_and_spread(values), mean_and_spread(differences[row]) if row != FULL else "")
        for row, values in top1.items()
    ]
    header = ("", "top-1 %", "difference, points")
    note = sample_note(summaries[FULL][0]).strip()
    write_table(folder / "ablation", title, header, table, note)
    draw(differences, folder, title)


if __name__ == "__main__":
    run_command(main)
