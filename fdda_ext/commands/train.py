"""``python -m fdda_ext.train``: take a trained network to a few bits.

Without arguments: FDDA to W4A4, first and last layer included, on the embedded glyphs with a small
residual network, and a table against the float network and three baselines.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from jsonargparse import ActionConfigFile, ActionYesNo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import quantizing
from ..data import (
    ImageDataset,
    calibration_set,
    choose_preprocessing,
    load_dataset,
    takes_preprocessing,
)
from ..distribution import (
    alone,
    first_on_machine,
    from_first,
    is_first,
    joined,
    signature,
    world_size,
)
from ..engine import (
    Accuracy,
    BatchSource,
    Profile,
    Progress,
    ProgressBar,
    RunFolder,
    build_parser,
    check_machine,
    count_outputs,
    cpu_state,
    decode_workers,
    diagnose,
    digest,
    doubt_margin,
    evaluate,
    format_duration,
    input_channels,
    instantiate_or_refuse,
    keep_freed_memory,
    must_fit,
    parse_or_refuse,
    peak_memory,
    profile,
    render_percent,
    with_underscores,
    write_student,
)
from ..errors import UsageError
from ..image_size import parse_image_size
from ..methods import (
    METHODS,
    Method,
    MethodSettings,
    Problem,
    build_method,
    check_memory,
    method_class,
    why_unused,
)
from ..models import TrainedNetwork, open_model
from ..preprocessing import Preprocessing, PreprocessingConfig
from ..quantization import QuantizationConfig, bits_table, parse_bits, render_bits
from ..quantizing import check_problem, run_method
from ..visualization import write_report

__all__ = [
    "REPORT_IMAGES",
    "TrainConfig",
    "build_problem",
    "inputs_digest",
    "main",
    "parse_arguments",
    "report",
    "run",
    "test_batches",
    "without_unused",
]

_log = logging.getLogger("fdda_ext")

_DESCRIPTION = """\
Quantize a trained network with almost no data.

examples:
  python -m fdda_ext.train                                      FDDA, W4A4, embedded data, minutes
  python -m fdda_ext.train --bits W3A3 --model glyphs_mobilenet
  python -m fdda_ext.train --method mse --baselines []          ranges only, nothing to compare with
  python -m fdda_ext.train --config imagenet/resnet18-w4a4-f4l4 --data imagenet:PATH
  python -m fdda_ext.train --out runs/a --resume                go on with a run that was stopped
  torchrun --nproc-per-node 8 -m fdda_ext.train --device cuda ...    eight GPUs; batches are shared
  python -m fdda_ext.train --bits W5A5 --print_config > my.yaml, then --config my.yaml

A preset sets every constant of the method; --config FILE overrides it, and may name it (preset:
paper); arguments override both. The settings of the paper are shipped as
--config imagenet/NETWORK-BITS with NETWORK resnet18, mobilenetv1, mobilenetv2 or regnetx600mf,
and BITS w4a4-f4l4, w4a4-f8l8, w5a5-f5l5 or w5a5-f8l8.
"""


@dataclass
class TrainConfig:
    """What to quantize, how, and where the result goes.

    Attributes:
        method: fdda; distill (the same without generated images); minmax, mse (ranges only); lapq,
            bitsplit, adaquant, brecq, qdrop; without real images gdfq, qimera, zaq, zeroq, dsg, di,
            adi, noise.
        model: glyphs_resnet, glyphs_mobilenet, torchvision:NAME, timm:NAME, pytorchcv:NAME, or
            module:NAME.CLASS for your own, which is called with num_classes.
        weights: "default" for the trained weights that come with the model, torchvision's name of
            others, a file (safetensors, or a torch file as training scripts write it) of this or
            another library, FILE#NAME to take one of several sets in it (model.pt#state_dict_ema),
            MODEL=FILE to say which network a file is of, order=FILE to go by the order of its
            tensors, or "none" for random ones, drawn by `seed`.
        data: glyphs, digits, folder:PATH, shards:PATH, imagenet:PATH, imagenet (PATH from the
            environment variable IMAGENET), or a set of torchvision's by name, such as cifar10:PATH.
        download: Fetch a set of torchvision's to PATH if it is not there.
        image_size: A number, or HEIGHTxWIDTH; None for the data set's own, or what the weights
            want.
        preprocessing: How images from files are prepared, other than the weights want.
        images_per_class: Calibration images of each class.
        quantization: Bits, grid and ranges of every tensor.
        settings: Constants of the methods.
        schedule_share: Run every schedule in this share of its iterations, phases and milestones
            with it.
        baselines: Methods to run first, for the table; None for minmax, mse and, if the method has
            a student step, distill, which is this step on the calibration images.
        seed: Of everything random: same seed and machine, same result.
        out: Run folder; None for a new one below runs/.
        resume: Go on with the run in `out`.
        max_time: Stop after so many minutes of training; --resume goes on later.
        device: cpu or cuda.
        threads: CPU threads; None leaves torch's choice.
        precision: Of the float network and the generator while training: float32, or bfloat16
            (autocast; statistics, losses and the quantized network stay in float32). None for
            bfloat16 on a GPU and float32 on a CPU.
        cuda_graphs: On a GPU, replay the steps of fdda's generator and of the student as CUDA
            graphs: the same arithmetic in fewer launches, but the memory of both steps at once.
        images_at_once: So many images at most pass a network together in training. It changes
            memory, and of the result the order of sums. None for all on a GPU and, on a CPU, for
            16 of 224x224 or as many as have their pixels.
        profile: Instead of training, run the whole schedule in this many iterations of the method
            after a few unmeasured ones, and write where their time goes: profile.txt, and
            trace.json for chrome://tracing or Perfetto.
        split: Where accuracy is measured: "test", or "validation" while settings are chosen.
        test_limit: Evaluate on so many images of it only, a sample in which every class has its
            share, the same for every seed; None for all.
        test_batch: Images evaluated together.
        evaluate_every: Measure accuracy every so many iterations of training, for metrics.jsonl
            (the paper's epoch has 200); None for the end only.
        evaluate_limit: On so many images, a sample like that of `test_limit`; None for those of the
            end.
        keep_best: Keep the student that was best in these measurements as best.safetensors. The
            table still has the last one: a choice on the test split flatters.
        exportable: Refuse a network that could not be exported to an integer program, before any
            time is spent. False trains it nevertheless.
        report: Write report.html at the end, see fdda_ext.visualize.
        workers: Processes that decode images; None for one per core, at most 8, where a GPU waits
            for images from files, and otherwise the main process alone.
        max_unreadable: So many damaged image files are left out, each named; one more is an error.
    """

    method: str = "fdda"
    model: str = "glyphs_resnet"
    weights: str = "default"
    data: str = "glyphs"
    download: bool = False
    image_size: int | tuple[int, int] | str | None = None
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    images_per_class: int = 1
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    settings: MethodSettings = field(default_factory=MethodSettings)
    schedule_share: float = 1.0
    baselines: list[str] | None = None
    seed: int = 0
    out: str | None = None
    resume: bool = False
    max_time: float | None = None
    device: str = "cpu"
    threads: int | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    cuda_graphs: bool = True
    images_at_once: int | None = None
    profile: int | None = None
    split: Literal["test", "validation"] = "test"
    test_limit: int | None = None
    test_batch: int = 250
    evaluate_every: int | None = None
    evaluate_limit: int | None = None
    keep_best: bool = False
    exportable: bool = True
    report: bool = True
    workers: int | None = None
    max_unreadable: int = 0

    def __post_init__(self) -> None:
        check_machine("train", seed=self.seed, threads=self.threads, device=self.device)
        for name, least in (
            ("max_time", 0),
            ("images_at_once", 1),
            ("profile", 1),
            ("test_limit", 1),
            ("test_batch", 1),
            ("evaluate_every", 1),
            ("evaluate_limit", 1),
            ("workers", 0),
            ("max_unreadable", 0),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UsageError(f"train: expected {name} at least {least}, got {value}")
        if self.image_size is not None:
            self.image_size = parse_image_size(self.image_size, "train")
        if not 0 < self.schedule_share < math.inf:
            raise UsageError(
                f"train: expected schedule_share above 0 and finite, got {self.schedule_share}"
            )
        for name in ("keep_best", "evaluate_limit"):
            if getattr(self, name) and self.evaluate_every is None:
                raise UsageError(f"train: expected evaluate_every with {name}, got none")
        if self.preprocessing.given and not takes_preprocessing(self.data):
            raise UsageError(
                f"train: expected preprocessing with images from files only, got data {self.data}"
            )
        if self.out == "":
            raise UsageError("train: expected out to be a folder, got an empty name")
        if self.baselines is None:
            kind = METHODS.get(self.method)
            trains = kind is not None and kind.distils and self.settings.distillation.steps > 0
            self.baselines = ["minmax", "mse", *(["distill"] if trains else [])]
        # The method is a row of its own.
        self.baselines = [name for name in dict.fromkeys(self.baselines) if name != self.method]

    @property
    def rows(self) -> list[str]:
        """All methods to run, in order: the baselines, then the method."""
        return [*(self.baselines or []), self.method]

    @property
    def scheduled(self) -> MethodSettings:
        """`settings` with every schedule in its share."""
        share = self.schedule_share
        return self.settings if share == 1 else self.settings.scaled(share)


#: Where a run is, how long and whether it goes on, how fast: not part of what it computes.
_NOT_STORED = (
    *("out", "resume", "max_time", "threads", "profile", "workers", "test_batch"),
    *("max_unreadable", "report", "cuda_graphs", "exportable", "download"),
)
#: Options that stand for others.
_EXPANDED = ("preset", "config", "bits")
#: Options without a value.
_FLAGS = ("resume", "keep_best", "report", "download", "no_report", "print_config", "help")
#: Images that a report compares float and quantized network on.
REPORT_IMAGES = 1000
#: Shipped configuration files.
_PRESETS = Path(str(files("fdda_ext") / "presets"))


def _expand(arguments: Sequence[str]) -> list[str]:
    """Put --config first, as all others override it, and --bits in full."""
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, text = argument.partition("=")
        value = text if equals else next(rest, None) if name in ("--config", "--bits") else None
        if name == "--config" and value is not None:
            shipped = _PRESETS / f"{value}.yaml"
            known = not Path(value).exists() and shipped.is_file()
            files.append(f"--config={shipped if known else value}")
        elif name == "--bits" and value is not None:
            weight_bits, activation_bits = parse_bits(value)
            others.append(f"--quantization.weight_bits={weight_bits}")
            others.append(f"--quantization.activation_bits={activation_bits}")
        else:
            others.append(argument)
    return files + others


def _named(key: str, arguments: Sequence[str]) -> str | None:
    """What the configuration files among ``arguments`` give for ``key``, if they do."""
    value = None
    for argument in arguments:
        path = Path(argument.removeprefix("--config="))
        if argument.startswith("--config=") and path.is_file():
            try:
                content = yaml.safe_load(path.read_bytes())
            except (OSError, yaml.YAMLError):  # the parser says what is wrong with it
                continue
            value = content.get(key, value) if isinstance(content, dict) else value
    return value


def preset_path(name: str, method: str) -> Path:
    """The file of a shipped preset: the constants that ``method`` has in it.

    Raises:
        UsageError: If there is no such preset, or no such method.
    """
    folder = _PRESETS / method_class(method).presets
    path = folder / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise UsageError(f"train: expected preset to be one of {names}, got {name}")
    return path


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[TrainConfig, str]:
    """Resolve preset, configuration file and command line, in this order.

    Returns:
        The configuration, and the part of it that decides the result, as YAML.

    Raises:
        UsageError: If an argument is wrong, or is an option that no method of the run uses. Such an
            option in a configuration file, which may serve several methods, is a warning.
    """
    arguments = _expand(with_underscores(arguments))
    config, text = _parse(arguments)
    if config.resume:  # the run keeps its configuration, which was checked when it began
        return config, text
    for option in _given_in_files(arguments):
        if reason := _why_unused(option, config):
            _log.warning("train: %s in a configuration file is not used: %s", option, reason)
    for option, value in _given(arguments):
        if reason := _why_unused(option, config):
            raise UsageError(
                f"train: expected options that method {config.method} or a baseline uses, "
                f"got {option} {value}: {reason}"
            )
    return config, text


def without_unused(arguments: Sequence[str]) -> list[str]:
    """The command line without the options that `parse_arguments` would refuse as unused."""
    expanded = _expand(with_underscores(arguments))
    config, _ = _parse(expanded)
    unused = {option for option, _ in _given(expanded) if _why_unused(option, config)}
    kept: list[str] = []
    rest = iter(expanded)
    for argument in rest:
        name, equals, _ = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in unused:
            if not equals and name not in _FLAGS:
                next(rest, None)
        else:
            kept.append(argument)
    return kept


def _why_unused(option: str, config: TrainConfig) -> str | None:
    """Why neither the method nor a baseline uses ``option``; None if one does."""
    kinds = {name: METHODS[name] for name in config.rows if name in METHODS}
    field = option.removeprefix("quantization.")
    own = kinds[config.method].fixed_ranges.get(field) if config.method in kinds else None
    if own is not None and getattr(config.quantization, field) == own:
        return None  # it asks for what the method does anyway
    reasons = [
        why_unused(option, name, kind, config.settings, config.quantization)
        for name, kind in kinds.items()
    ]
    return reasons[-1] if reasons and all(reasons) else None


def _given(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Options of the command line and their values, without those of configuration files."""
    found = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name not in (*_EXPANDED, *_FLAGS):
            found.append((name, value if equals else next(rest, "")))
        elif name == "keep_best":
            found.append((name, ""))
    return found


def _given_in_files(arguments: Sequence[str]) -> list[str]:
    """Dotted names of all options that configuration files set."""
    found: list[str] = []

    def walk(prefix: str, content: Any) -> None:
        if isinstance(content, dict) and content:
            for key, value in content.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            found.append(prefix)

    for argument in arguments:
        path = Path(argument.removeprefix("--config="))
        if argument.startswith("--config=") and path.is_file():
            walk("", yaml.safe_load(path.read_bytes()))
    return list(dict.fromkeys(found))


def _parse(arguments: list[str]) -> tuple[TrainConfig, str]:
    """What `parse_arguments` gives, for arguments from `_expand`; unused options are let pass."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")  # the second parser complains
    first.add_argument("--method", nargs="?")
    first.add_argument("--out", nargs="?")
    first.add_argument("--resume", action="store_true")
    chosen, _ = first.parse_known_args(arguments)
    defaults = preset_path(
        str(chosen.preset or _named("preset", arguments) or "short"),
        str(chosen.method or _named("method", arguments) or "fdda"),
    )
    if chosen.resume:
        if chosen.out is None:
            raise UsageError("train: expected --out with --resume, the run to go on with, got none")
        if chosen.preset is not None:
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
    parser.add_argument("--keep_best", action="store_true", help="keep best.safetensors, too")
    parser.add_argument(
        "--report", action=ActionYesNo, default=True, help="write report.html at the end"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch a set of torchvision's to PATH"
    )
    flags = {"resume", "keep_best", "report", "download"}
    parser.add_class_arguments(TrainConfig, as_group=False, skip=flags)
    namespace = parse_or_refuse(parser, arguments)
    stored = namespace.clone()
    for name in (*_NOT_STORED, *_EXPANDED):
        stored.pop(name, None)
    text = parser.dump(stored, skip_unset=False, skip_validation=True)
    instance = instantiate_or_refuse(parser, namespace)
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
        real_images: Images of the data that the method has looked at.
        made_images: Images it has made and shown to the student.
        peak_memory: Of the process or, on a GPU, of what torch asked for there, MiB.
        float_top1: Of the network that was quantized.
        of: Images that those tested are a sample of; 0 if they are no sample.
    """

    name: str
    top1: float
    top5: float
    images: int
    seconds: float = 0.0
    iterations: int = 0
    planned: int = 0
    real_images: int = 0
    made_images: int = 0
    peak_memory: int = 0
    float_top1: float = 0.0
    of: int = 0

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
        of=accuracy.of,
    )


@dataclass(frozen=True)
class _Session:
    """What all methods of one command have in common.

    Attributes:
        config: What to do.
        problem: Where every method starts from.
        preprocessing: Of image files, None for embedded data.
        test: What is tested in the end.
        curve: What is tested in training.
        float_top1: Of the float network on ``test``, per cent.
    """

    config: TrainConfig
    problem: Problem
    preprocessing: Preprocessing | None
    test: BatchSource
    curve: BatchSource
    float_top1: float

    def recipe(self, name: str, quantization: QuantizationConfig) -> dict[str, Any]:
        """What a student of the method ``name`` is built from."""
        return {
            "model": self.config.model,
            "num_classes": self.problem.num_classes,
            "image_size": self.problem.image_size,
            "channels": self.problem.channels,
            "data": self.config.data,
            "preprocessing": self.preprocessing.to_dict() if self.preprocessing else None,
            "method": name,
            "quantization": asdict(quantization),
        }


def _train_one(session: _Session, name: str, folder: RunFolder, max_seconds: float | None) -> Row:
    """Train and evaluate one method in ``folder``, or read there what it ended with before."""
    config, problem = session.config, session.problem
    summary = from_first(folder.summary)
    if summary is not None:
        try:
            return Row(**summary)
        except TypeError as error:
            raise UsageError(
                f"train: expected {folder.path / 'summary.json'} as a run writes it, got {error}"
            ) from None

    def measure(method: Method, bar: ProgressBar) -> dict[str, float]:
        accuracy = evaluate(
            method.student, session.curve, device=problem.device, label="testing", bar=bar
        )
        if config.keep_best and is_first() and accuracy.top1 > _best_top1(folder):
            recipe = session.recipe(name, method.quantization)
            kept = {**recipe, "top1": accuracy.top1, "split": config.split, "best": True}
            write_student(folder.path / "best.safetensors", method.student, kept)
        return {"top1": accuracy.top1, "top5": accuracy.top5, "images": accuracy.count}

    method, progress = run_method(
        name,
        problem,
        config.scheduled,
        folder,
        max_seconds=max_seconds,
        evaluation=measure,
        evaluate_every=config.evaluate_every,
    )
    if progress.interrupted:
        raise KeyboardInterrupt(f"go on with --out {config.out or folder.path} --resume")
    memory = peak_memory(problem.device)
    accuracy = evaluate(
        method.student, session.test, device=problem.device, label=f"{name}: testing"
    )
    row = replace(
        _row(name, accuracy, progress, method.iterations),
        real_images=len(problem.labels) if method.real_images else 0,
        made_images=method.made_images,
        peak_memory=memory,
        float_top1=session.float_top1,
    )
    if not is_first():
        return row
    # A method may choose bits while it trains.
    recipe = session.recipe(name, method.quantization)
    write_student(folder.path / "student.safetensors", method.student, recipe)
    (folder.path / "bits.txt").write_text(render_bits(bits_table(method.student)) + "\n")
    with alone():
        method.save_artifacts(folder.path)
    if row.finished:
        folder.finish(asdict(row))
    return row


#: Iterations before a profile: memory is asked for, kernels are chosen.
_UNMEASURED = 3


def measure_stages(
    config: TrainConfig, problem: Problem, folder: Path, console: Console
) -> Profile:
    """Run the method's schedule, shortened, and write where the time of its iterations goes.

    Raises:
        UsageError: If the method does not train.
    """
    assert config.profile is not None
    settings = config.scheduled
    planned = build_method(config.method, problem, settings).iterations
    if not planned:
        raise UsageError(
            f"train: expected profile with a method that trains, got method {config.method}"
        )
    share = min((config.profile + _UNMEASURED) / planned, 1.0)
    method = build_method(config.method, problem, settings.scaled(share))
    unmeasured = min(_UNMEASURED, method.iterations - 1)
    for iteration in range(unmeasured):
        method.step(iteration)
    with profile(problem.device, folder / "trace.json" if is_first() else None) as measured:
        for iteration in range(unmeasured, method.iterations):
            begin = measured.now()
            method.step(iteration)
            measured.iterations.append(measured.now() - begin)
    table = measured.table()
    console.print(table)
    mean = sum(measured.iterations) / len(measured.iterations)
    bound = "at most" if problem.replays else "about"  # stages are launched, never replayed
    console.print(
        f"{planned} iterations of the whole schedule: {bound} {format_duration(mean * planned)}; "
        f"trace in {folder / 'trace.json'}",
        highlight=False,
    )
    if is_first():
        with (folder / "profile.txt").open("w") as file:
            Console(file=file, width=100).print(table)
    return measured


def _best_top1(folder: RunFolder) -> float:
    """Of the measurements that metrics.jsonl holds; below 0 if there is none."""
    lines = folder.metrics.read_text().splitlines()
    return max((json.loads(line).get("top1", -1.0) for line in lines), default=-1.0)


def render_rows(rows: list[Row], bits: str, split: str = "test") -> Table:
    """The final table."""
    images = f"{rows[0].images} {split} images"
    if rows[0].images < rows[0].of:
        images = f"{rows[0].images} of {rows[0].of} {split} images (± standard error)"
    table = Table(title=f"top-1 over {images}, {bits}, last step of training")
    for column in ("", "top-1 %", "top-5 %", "drop", "training"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        name = row.name if row.finished else f"{row.name} ({row.iterations} of {row.planned})"
        table.add_row(
            name,
            render_percent(row.top1, row.images, row.of),
            render_percent(row.top5, row.images, row.of),
            f"{rows[0].top1 - row.top1:.2f}",
            format_duration(row.seconds) if row.planned else "",
        )
    return table


def _open_folder(path: Path, config: str, resume: bool, inputs: str) -> RunFolder:
    """The run folder, which the first of several processes makes.

    Raises:
        UsageError: See `RunFolder`; or if another process has other weights or images.
    """
    made: list[RunFolder] = []

    def make() -> str:
        made.append(RunFolder(path, config, resume=resume, inputs=inputs))
        return made[0].fingerprint

    expected = from_first(make)
    folder = made[0] if made else RunFolder(path, config, resume=True, inputs=inputs)
    if folder.fingerprint != expected:
        raise UsageError(
            "distributed: expected the configuration, weights and images of the first process on "
            f"all, got others{signature()}"
        )
    return folder


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


def build_problem(config: TrainConfig) -> tuple[Problem, TrainedNetwork]:
    """Load the network and the calibration images.

    Returns:
        Both together, and where the network is from and how images from files are prepared for it.

    Raises:
        UsageError: If they do not fit each other.
    """
    dataset = load_dataset(
        config.data, "calibration", image_size=config.image_size, download=config.download
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # for weights "none"
        opened = open_model(config.model, weights=config.weights, num_classes=dataset.num_classes)
    channels = input_channels(opened.network, dataset.image_size, "train")
    preprocessing = choose_preprocessing(
        dataset,
        opened.preprocessing,
        config.preprocessing,
        image_size=config.image_size,
        channels=channels,
    )
    images, labels = calibration_set(
        config.data,
        config.images_per_class,
        seed=config.seed,
        image_size=config.image_size,
        preprocessing=preprocessing,
        channels=channels,
        max_unreadable=config.max_unreadable,
    )
    if takes_preprocessing(config.data):
        mean, std = preprocessing.mean, preprocessing.std
    else:
        own = load_dataset(config.data, "calibration", channels=channels)
        mean, std = own.mean, own.std
    problem = quantizing.build_problem(
        opened.network,
        images,
        labels,
        num_classes=dataset.num_classes,
        quantization=config.quantization,
        seed=config.seed,
        device=config.device,
        precision=config.precision,
        augmentation=dataset.augmentation,
        mean=mean,
        std=std,
        cuda_graphs=config.cuda_graphs,
        images_at_once=config.images_at_once,
    )
    outputs = count_outputs(problem.teacher, problem.images[:1], "train")
    if outputs != dataset.num_classes:
        raise UsageError(
            f"train: expected model to have the data's {dataset.num_classes} classes, got {outputs}"
        )
    return problem, replace(opened, preprocessing=preprocessing)


def inputs_digest(problem: Problem) -> str:
    """Of the weights and images that a run starts from."""
    return digest({"images": problem.images.cpu(), **cpu_state(problem.teacher)}, "")


def report(
    config: TrainConfig,
    problem: Problem,
    preprocessing: Preprocessing | None,
    folder: Path,
    images: int = REPORT_IMAGES,
) -> Path:
    """Write ``report.html`` of the run, or the baseline, in ``folder``; see `write_report`.

    Args:
        config: Of the run.
        problem: Of `build_problem`.
        preprocessing: Of image files, None for embedded data.
        folder: Where its student is.
        images: At most so many of the split are compared.
    """
    with alone():
        limit = min(config.test_limit or images, images)
        batches = test_batches(config, preprocessing, limit, problem.channels)
        return write_report(folder, problem, batches)


def test_batches(
    config: TrainConfig, preprocessing: Preprocessing | None, limit: int | None, channels: int
) -> BatchSource:
    """At most ``limit`` images of so many ``channels`` from the split that is measured."""
    dataset = load_dataset(
        config.data,
        config.split,
        image_size=config.image_size,
        limit=limit,
        preprocessing=preprocessing,
        channels=channels,
        download=config.download,
    )
    workers = decode_workers(config.workers, config.device, dataset.from_files)
    return BatchSource(dataset, config.test_batch, workers, config.max_unreadable)


def run(config: TrainConfig, stored_config: str, console: Console | None = None) -> list[Row]:
    """Train ``config.method`` and its baselines; print and store the table.

    Args:
        config: What to do.
        stored_config: What the run folder keeps of it, see `parse_arguments`.
        console: Where to print.

    Returns:
        The rows: float, the baselines, the method.
    """
    console = console or Console(quiet=not is_first())
    for name in config.rows:
        method_class(name)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    with must_fit(images_per_class=config.images_per_class), first_on_machine():
        problem, opened = build_problem(config)
        if not config.resume:
            check_problem(problem, config.rows, exportable=config.exportable)
        with alone():  # it takes steps, in which processes would exchange gradients
            check_memory(
                config.method, problem, config.scheduled, console, test_batch=config.test_batch
            )
    preprocessing = opened.preprocessing if takes_preprocessing(config.data) else None
    path = Path(config.out or from_first(lambda: str(_new_folder(config))))
    inputs = inputs_digest(problem)
    folder = _open_folder(path, stored_config, config.resume, inputs)
    with folder.removed_if_unused():
        return _run_in(folder, config, stored_config, problem, opened, preprocessing, console)


def _run_in(
    folder: RunFolder,
    config: TrainConfig,
    stored_config: str,
    problem: Problem,
    opened: TrainedNetwork,
    preprocessing: Preprocessing | None,
    console: Console,
) -> list[Row]:
    """What `run` does once the folder is there."""
    path = folder.path
    q = config.quantization
    bits = f"W{q.weight_bits}A{q.activation_bits}, first and last layer " + (
        f"{q.first_last_bits} bits" if q.first_last_bits else "included"
    )
    if q.layer_bits:
        bits += f", weights of {len(q.layer_bits)} layers by name"
    together = f"; {world_size()} processes" if world_size() > 1 else ""
    console.print(
        f"{config.model} on {config.data}: {bits}; results in {path}{together}", highlight=False
    )
    if preprocessing is not None:
        console.print(f"weights: {opened.origin}", highlight=False)

    if config.profile is not None:
        measure_stages(config, problem, path, console)
        return []

    test = test_batches(config, preprocessing, config.test_limit, problem.channels)
    test_set = cast(ImageDataset, test.dataset)
    if preprocessing is not None:
        how = preprocessing.describe(test_set.stored_size)
        console.print(f"images: {how}", highlight=False)
    note = test_set.absent_classes()
    if note is not None:
        console.print(f"{config.split} data: {note}", highlight=False)
    curve = test
    if config.evaluate_every and config.evaluate_limit:
        curve = test_batches(config, preprocessing, config.evaluate_limit, problem.channels)
    for doubt in (
        doubt_margin(problem.teacher, test.dataset, problem.device),
        diagnose(problem.teacher, test.dataset, problem.num_classes, problem.device),
    ):
        if doubt is None:
            continue
        console.print(f"[yellow]warning:[/] {escape(doubt)}", highlight=False)
    accuracy = evaluate(problem.teacher, test, device=problem.device, label="float: testing")
    console.print(f"float: {accuracy}", highlight=False)
    session = _Session(config, problem, preprocessing, test, curve, accuracy.top1)
    rows = [_row("float", accuracy, Progress(0, 0.0), 0)]
    left = None if config.max_time is None else 60 * config.max_time
    for name in config.rows:
        is_main = name == config.method
        here = (
            folder
            if is_main
            else _open_folder(path / "baselines" / name, stored_config, True, folder.inputs)
        )
        row = _train_one(session, name, here, left)
        rows.append(row)
        if left is not None:
            left = max(left - row.seconds, 0.0)
    table = render_rows(rows, bits, config.split)
    console.print(table)
    if is_first():
        with (path / "table.txt").open("w") as file:
            Console(file=file, width=100).print(table)
        if config.report:
            try:
                report(config, problem, preprocessing, path)
            except Exception as error:  # the run is finished, whatever is wrong with its report
                reason = escape(" ".join(f"{type(error).__name__}: {error}".split())[:200])
                console.print(f"[yellow]warning:[/] no report.html ({reason})", soft_wrap=True)
    if not all(row.finished for row in rows):
        console.print(f"stopped by --max-time; go on with --out {path} --resume", highlight=False)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    config, text = parse_arguments(arguments)
    with joined(config.device):
        run(config, text)
