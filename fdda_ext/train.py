"""``python -m fdda_ext.train``: take a trained network to a few bits.

Without arguments: FDDA to W4A4, first and last layer included, on the embedded glyphs with a small
residual network, and a table against the float network and three baselines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ActionConfigFile
from rich.console import Console
from rich.table import Table

from .data import calibration_set, load_dataset
from .engine import (
    Accuracy,
    BatchSource,
    Progress,
    RunFolder,
    build_parser,
    check_machine,
    count_outputs,
    cpu_state,
    digest,
    evaluate,
    parse_or_refuse,
    run_command,
    train,
    write_student,
)
from .errors import UsageError
from .methods import METHODS, MethodSettings, Problem, build_method
from .models import load_model
from .quantization import QuantizationConfig, bits_table, parse_bits, render_bits

__all__ = ["TrainConfig", "main", "parse_arguments", "run"]

_DESCRIPTION = """\
Quantize a trained network with almost no data.

examples:
  python -m fdda_ext.train                                      FDDA, W4A4, embedded data, minutes
  python -m fdda_ext.train --bits W3A3 --model glyphs_mobilenet
  python -m fdda_ext.train --method mse --baselines []          ranges only, nothing to compare with
  python -m fdda_ext.train --preset paper --data imagenet:PATH --model pytorchcv:resnet18
  python -m fdda_ext.train --out runs/a --resume                go on with a run that was stopped
  python -m fdda_ext.train --bits W5A5 --print_config > my.yaml, then --config my.yaml

A preset sets every constant of the method; --config FILE overrides it; arguments override both.
"""


@dataclass
class TrainConfig:
    """What to quantize, how, and where the result goes.

    Attributes:
        method: fdda, distill (the same without generated images), minmax or mse (ranges only).
        model: glyphs_resnet, glyphs_mobilenet, torchvision:NAME, timm:NAME or pytorchcv:NAME.
        weights: "default" for the trained weights that come with the model, a file (safetensors,
            or a torch file of plain tensors), or "none" for random ones, drawn by `seed`.
        data: glyphs, digits, folder:PATH or imagenet:PATH.
        image_size: Height and width; None for the data set's own.
        images_per_class: Calibration images of each class.
        quantization: Bits, grid and ranges of every tensor.
        settings: Constants of the methods.
        baselines: Methods to run first, for the table.
        seed: Of everything random: same seed and machine, same result.
        out: Run folder; None for a new one below runs/.
        resume: Go on with the run in `out`.
        max_time: Stop training after so many minutes; --resume goes on later.
        device: cpu or cuda.
        threads: CPU threads; None leaves torch's choice.
        split: Where accuracy is measured: "test", or "validation" while settings are chosen.
        test_limit: Evaluate on so many images of it only; None for all.
    """

    method: str = "fdda"
    model: str = "glyphs_resnet"
    weights: str = "default"
    data: str = "glyphs"
    image_size: int | None = None
    images_per_class: int = 1
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    settings: MethodSettings = field(default_factory=MethodSettings)
    baselines: list[str] = field(default_factory=lambda: ["minmax", "mse", "distill"])
    seed: int = 0
    out: str | None = None
    resume: bool = False
    max_time: float | None = None
    device: str = "cpu"
    threads: int | None = None
    split: Literal["test", "validation"] = "test"
    test_limit: int | None = None

    def __post_init__(self) -> None:
        check_machine("train", seed=self.seed, threads=self.threads, device=self.device)
        for name, least in (("max_time", 0), ("test_limit", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UsageError(f"train: expected {name} at least {least}, got {value}")
        if self.out == "":
            raise UsageError("train: expected out to be a folder, got an empty name")
        # The method is a row of its own.
        self.baselines = [name for name in dict.fromkeys(self.baselines) if name != self.method]


#: Where a run is, how long and whether it goes on: not part of what it computes.
_NOT_STORED = ("out", "resume", "max_time", "threads")


#: Options that stand for others.
_EXPANDED = ("preset", "config", "bits")


def _expand(arguments: Sequence[str]) -> list[str]:
    """Put --config first, as all others override it, and --bits in full."""
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, text = argument.partition("=")
        value = text if equals else next(rest, None) if name in ("--config", "--bits") else None
        if name == "--config" and value is not None:
            files.append(f"--config={value}")
        elif name == "--bits" and value is not None:
            weight_bits, activation_bits = parse_bits(value)
            others.append(f"--quantization.weight_bits={weight_bits}")
            others.append(f"--quantization.activation_bits={activation_bits}")
        else:
            others.append(argument)
    return files + others


def preset_path(name: str) -> Path:
    """The file of a shipped preset.

    Raises:
        UsageError: If there is no such preset.
    """
    folder = Path(str(files("fdda_ext") / "presets"))
    path = folder / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise UsageError(f"train: expected preset to be one of {names}, got {name}")
    return path


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[TrainConfig, str]:
    """Resolve preset, configuration file and command line, in this order.

    Returns:
        The configuration, and the part of it that decides the result, as YAML.
    """
    arguments = _expand(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="short", nargs="?")  # the second parser complains
    first.add_argument("--out", nargs="?")
    first.add_argument("--resume", action="store_true")
    chosen, _ = first.parse_known_args(arguments)
    defaults = preset_path(chosen.preset or "short")
    if chosen.resume:
        if chosen.out is None:
            raise UsageError("train: expected --out with --resume, the run to go on with, got none")
        if chosen.preset != "short":
            raise UsageError(
                "train: expected no --preset with --resume, a run keeps its settings, "
                f"got {chosen.preset}"
            )
        defaults = Path(chosen.out) / "config.yaml"
        if not defaults.is_file():
            raise UsageError(f"train: expected --out to hold a run to resume, got {chosen.out}")

    parser = build_parser("fdda_ext.train", _DESCRIPTION, default_config_files=[str(defaults)])
    parser.add_argument("--preset", default="short", help="short (minutes, embedded data) or paper")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of settings")
    parser.add_argument("--bits", help="W4A4 and the like, short for the two quantization.*_bits")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_class_arguments(TrainConfig, as_group=False, skip={"resume"})
    namespace = parse_or_refuse(parser, arguments)
    stored = namespace.clone()
    for name in (*_NOT_STORED, *_EXPANDED):
        stored.pop(name, None)
    text = parser.dump(stored, skip_unset=False, skip_validation=True)
    instance = parser.instantiate(namespace).as_dict()
    for name in _EXPANDED:
        instance.pop(name)
    return TrainConfig(**instance), text


@dataclass(frozen=True)
class Row:
    """One line of the final table.

    Attributes:
        name: "float" or a method.
        top1: Per cent of the images.
        top5: Likewise.
        images: How many were tested.
        seconds: Training time, over all resumptions.
        iterations: Done.
        planned: Iterations of the whole training; fewer were done if time ran out.
    """

    name: str
    top1: float
    top5: float
    images: int
    seconds: float = 0.0
    iterations: int = 0
    planned: int = 0

    @property
    def finished(self) -> bool:
        """Whether no training was cut short."""
        return self.iterations == self.planned


def _row(name: str, accuracy: Accuracy, progress: Progress, planned: int) -> Row:
    return Row(
        name,
        accuracy.top1,
        accuracy.top5,
        accuracy.count,
        progress.seconds,
        progress.iterations,
        planned,
    )


def _train_one(
    name: str,
    problem: Problem,
    config: TrainConfig,
    folder: RunFolder,
    test: BatchSource,
    max_seconds: float | None,
) -> Row:
    """Train and evaluate one method in ``folder``, or read there what it ended with before."""
    summary = folder.summary()
    if summary is not None:
        try:
            return Row(**summary)
        except TypeError as error:
            raise UsageError(
                f"train: expected {folder.path / 'summary.json'} as a run writes it, got {error}"
            ) from None
    method = build_method(name, problem, config.settings)
    progress = Progress(0, 0.0)
    if method.iterations:
        progress = train(
            method, folder, description=name, max_seconds=max_seconds, device=problem.device
        )
    accuracy = evaluate(method.student, test, device=problem.device, label=f"{name}: testing")
    row = _row(name, accuracy, progress, method.iterations)
    recipe = {
        "model": config.model,
        "num_classes": problem.num_classes,
        "image_size": problem.image_size,
        "data": config.data,
        "method": name,
        "quantization": asdict(method.quantization),
    }
    write_student(folder.path / "student.safetensors", method.student, recipe)
    (folder.path / "bits.txt").write_text(render_bits(bits_table(method.student)) + "\n")
    method.save_artifacts(folder.path)
    if row.finished:
        folder.finish(asdict(row))
    return row


def render_rows(rows: list[Row], bits: str, split: str = "test") -> Table:
    """The final table."""
    table = Table(
        title=f"top-1 over {rows[0].images} {split} images, {bits}, last step of training"
    )
    for column in ("", "top-1 %", "top-5 %", "drop", "training s"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        name = row.name if row.finished else f"{row.name} ({row.iterations} of {row.planned})"
        table.add_row(
            name,
            f"{row.top1:.2f}",
            f"{row.top5:.2f}",
            f"{rows[0].top1 - row.top1:.2f}",
            f"{row.seconds:.0f}" if row.planned else "",
        )
    return table


def _new_folder(config: TrainConfig) -> Path:
    """The first free of runs/NAME, runs/NAME-2, ..."""
    q = config.quantization
    model = config.model.replace(":", "-")
    base = f"{config.method}-{model}-w{q.weight_bits}a{q.activation_bits}-seed{config.seed}"
    candidate, number = Path("runs") / base, 1
    while candidate.exists():
        number += 1
        candidate = Path("runs") / f"{base}-{number}"
    return candidate


def build_problem(config: TrainConfig) -> Problem:
    """Load the network and the calibration images.

    Raises:
        UsageError: If they do not fit each other.
    """
    device = torch.device(config.device)
    images, labels = calibration_set(
        config.data, config.images_per_class, seed=config.seed, image_size=config.image_size
    )
    dataset = load_dataset(config.data, "calibration", image_size=config.image_size)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # for weights "none"
        teacher = load_model(config.model, weights=config.weights, num_classes=dataset.num_classes)
    teacher.to(device).eval().requires_grad_(False)
    outputs = count_outputs(teacher, images[:1].to(device), "train")
    if outputs != dataset.num_classes:
        raise UsageError(
            f"train: expected model to have the data's {dataset.num_classes} classes, got {outputs}"
        )
    return Problem(
        teacher,
        dataset.num_classes,
        images.to(device),
        labels.to(device),
        dataset.augmentation,
        config.quantization,
        config.seed,
    )


def run(config: TrainConfig, stored_config: str, console: Console | None = None) -> list[Row]:
    """Train ``config.method`` and its baselines; print and store the table.

    Args:
        config: What to do.
        stored_config: What the run folder keeps of it, see `parse_arguments`.
        console: Where to print.

    Returns:
        The rows: float, the baselines, the method.
    """
    console = console or Console()
    for name in (*config.baselines, config.method):
        if name not in METHODS:
            build_method(name, None, config.settings)  # type: ignore[arg-type]  # raises
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    problem = build_problem(config)
    path = Path(config.out) if config.out else _new_folder(config)
    inputs = digest({"images": problem.images.cpu(), **cpu_state(problem.teacher)}, stored_config)
    folder = RunFolder(path, stored_config, resume=config.resume, inputs=inputs)
    q = config.quantization
    bits = f"W{q.weight_bits}A{q.activation_bits}, first and last layer " + (
        f"{q.first_last_bits} bits" if q.first_last_bits else "included"
    )
    console.print(f"{config.model} on {config.data}: {bits}; results in {path}", highlight=False)

    test = BatchSource(
        load_dataset(
            config.data, config.split, image_size=config.image_size, limit=config.test_limit
        )
    )
    accuracy = evaluate(problem.teacher, test, device=problem.device, label="float: testing")
    rows = [_row("float", accuracy, Progress(0, 0.0), 0)]
    if accuracy.top1 < 2 * 100 / problem.num_classes:
        console.print(
            f"[yellow]warning: the float network is near chance ({accuracy.top1:.2f} %); check its "
            "weights, the normalisation and the order of the classes"
        )
    left = None if config.max_time is None else 60 * config.max_time
    for name in (*config.baselines, config.method):
        is_main = name == config.method
        here = (
            folder
            if is_main
            else RunFolder(path / "baselines" / name, stored_config, resume=True, inputs=inputs)
        )
        row = _train_one(name, problem, config, here, test, left)
        rows.append(row)
        if left is not None:
            left = max(left - row.seconds, 0.0)
    table = render_rows(rows, bits, config.split)
    console.print(table)
    with (path / "table.txt").open("w") as file:
        Console(file=file, width=100).print(table)
    if not all(row.finished for row in rows):
        console.print(f"stopped by --max-time; go on with --out {path} --resume", highlight=False)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    config, text = parse_arguments(arguments)
    run(config, text)


if __name__ == "__main__":
    run_command(main)
