"""``python -m fdda_ext.train``: quantize a trained network to a few bits.

Without arguments, it quantizes a small residual network for the embedded glyphs to W4A4 by FDDA,
and compares it with the float network and three baselines.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser
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
from ..quantizing import check_problem, run_method, schedule_share
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
  python -m fdda_ext.train                                      FDDA, W4A4, embedded data: minutes
  python -m fdda_ext.train --bits W3A3 --model glyphs_mobilenet
  python -m fdda_ext.train --method mse --baselines []          ranges only, no baselines
  python -m fdda_ext.train --config imagenet/resnet18-w4a4-f4l4 --data imagenet:PATH
  python -m fdda_ext.train --out runs/a --resume                continue a stopped run
  torchrun --nproc-per-node 8 -m fdda_ext.train --device cuda ...    eight GPUs share each batch
  python -m fdda_ext.train --bits W5A5 --print_config > my.yaml, then --config my.yaml

A preset sets all settings of the method. --config FILE overrides the preset, and may name it
(preset: paper). Arguments override both. The settings of the paper are included as
--config imagenet/NETWORK-BITS with NETWORK resnet18, mobilenetv1, mobilenetv2 or regnetx600mf,
and BITS w4a4-f4l4, w4a4-f8l8, w5a5-f5l5 or w5a5-f8l8.
"""


@dataclass
class TrainConfig:
    """What to quantize, how, and where the result goes.

    Attributes:
        method: fdda; distill (fdda without generated images); qdrop_plus (qdrop for few images);
            minmax, mse (ranges only); lapq, bitsplit, adaquant, brecq, qdrop; without real images:
            gdfq, qimera, zaq, zeroq, dsg, di, adi, noise.
        model: glyphs_resnet, glyphs_mobilenet, torchvision:NAME, timm:NAME, pytorchcv:NAME, or
            module:NAME.CLASS for your own class, which is called with num_classes.
        weights: "default" for the model's trained weights; the torchvision name of other weights; a
            file of this or another library (safetensors, or a torch file from a training script);
            FILE#NAME for one of several sets in a file (model.pt#state_dict_ema); MODEL=FILE to
            name the network that a file belongs to; order=FILE to match tensors by their order; or
            "none" for random weights from `seed`.
        data: glyphs, digits, folder:PATH, shards:PATH, imagenet:PATH, imagenet (PATH from the
            environment variable IMAGENET), or a torchvision data set by name, such as cifar10:PATH.
        download: Download a torchvision data set to PATH if it is missing.
        image_size: A number, or HEIGHTxWIDTH; None for the size of the data set or of the weights.
        preprocessing: Changes to the preprocessing of image files that the weights prescribe.
        images_per_class: Number of calibration images per class.
        quantization: Bits, grid and ranges of every tensor.
        settings: Settings of the methods.
        schedule_share: Factor for the iterations of every schedule, its phases and milestones.
        baselines: Methods to run first, for the table. None means minmax, mse and, if the method
            has a student step, distill, which takes this step on the calibration images.
        seed: Seed for all random numbers. Equal seeds give equal results on one machine.
        out: Run folder; None for a new one in runs/.
        resume: Continue the run in `out`.
        minutes: Time for the training of each method, in minutes. A short trial measures the pace
            on this machine, and the schedules are shortened or stretched to fit. None for the whole
            schedules.
        max_time: Time limit of the training, in minutes. --resume continues later.
        device: cpu or cuda.
        threads: CPU threads; None for torch's default.
        precision: Precision of the float network and the generator during training: float32, or
            bfloat16 (autocast; statistics, losses and the student stay in float32). None means
            bfloat16 on a GPU and float32 on a CPU.
        cuda_graphs: Whether a GPU replays the steps of fdda's generator and of the student as CUDA
            graphs. They need fewer launches, but the memory of both steps at once.
        augmented_images: Random crops and flips of the calibration images are added, equally many
            of each, until there are this many images. None adds nothing.
        training_pixels: Largest number of pixels of an image in training. Larger images are
            resized, which saves time and memory. Tests and exports keep the full size. None for no
            limit.
        equalisation: Strength of the equalisation of channels, 0 to 1. Before quantization, every
            channel of an activation is scaled, and the next layers undo it. 1 gives all channels
            the same range, which is best for activations, and lower values keep weights easy to
            quantize. None changes nothing. See fdda_ext.quantization.equalisation.
        bias_correction: Whether the biases are corrected after calibration, so that quantization
            does not change the mean of any channel. Methods that learn or compute biases by
            themselves do not take it. See fdda_ext.quantization.bias_correction.
        images_at_once: Largest number of images that pass through a network together in training.
            It changes only the memory use and the order of sums. None means all images on a GPU,
            and as many pixels as 16 images of 224x224 have on a CPU.
        profile: Number of iterations to measure instead of training. The schedule is shortened to
            them and a few unmeasured ones. Times by stage go to profile.txt, and a trace for
            chrome://tracing or Perfetto to trace.json.
        split: Split for measuring accuracy: "test", or "validation" while you choose settings.
        test_limit: Number of images to test, a sample with all classes in proportion, equal for
            all seeds; None for all.
        test_batch: Images per batch of the evaluation.
        evaluate_every: Iterations between two measurements of accuracy, for metrics.jsonl (the
            paper's epoch has 200); None measures only at the end.
        evaluate_limit: Number of images for these measurements, like `test_limit`; None for the
            same images as at the end.
        keep_best: Keep the best student of these measurements as best.safetensors. The table shows
            the last student, because a choice on the test split overestimates accuracy.
        exportable: Refuse, before training, a network that cannot be exported as an integer
            program. False trains it anyway.
        report: Write report.html at the end. See fdda_ext.visualize.
        workers: Number of processes that decode images. None means one per core, at most 8, for
            image files on a GPU, and otherwise the main process alone.
        max_unreadable: Number of damaged image files that are skipped, each with a warning. One
            more is an error.
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
    minutes: float | None = None
    max_time: float | None = None
    device: str = "cpu"
    threads: int | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    cuda_graphs: bool = True
    images_at_once: int | None = None
    augmented_images: int | None = None
    training_pixels: int | None = None
    equalisation: float | None = None
    bias_correction: bool = False
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
            ("augmented_images", 1),
            ("training_pixels", 1),
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
        if self.equalisation is not None:
            if not 0 <= self.equalisation <= 1:
                raise UsageError(
                    f"train: expected equalisation between 0 and 1, got {self.equalisation}"
                )
            if self.method in METHODS and not METHODS[self.method].real_images:
                raise UsageError(
                    "train: expected equalisation, which measures real images, only with methods "
                    f"that use real images, got method {self.method}"
                )
        if self.minutes is not None:
            if not 0 < self.minutes < math.inf:
                raise UsageError(f"train: expected minutes above 0 and finite, got {self.minutes}")
            if self.schedule_share != 1:
                raise UsageError(
                    "train: expected no schedule_share with minutes, which sets it, "
                    f"got {self.schedule_share:g}"
                )
        for name in ("keep_best", "evaluate_limit"):
            if getattr(self, name) and self.evaluate_every is None:
                raise UsageError(f"train: expected evaluate_every with {name}, got none")
        if self.preprocessing.given and not takes_preprocessing(self.data):
            raise UsageError(
                f"train: expected preprocessing only with images from files, got data {self.data}"
            )
        if self.out == "":
            raise UsageError("train: expected out to be a folder, got an empty name")
        if self.baselines is None:
            kind = METHODS.get(self.method)
            trains = kind is not None and kind.distils and self.settings.distillation.steps > 0
            self.baselines = ["minmax", "mse", *(["distill"] if trains else [])]
        # The method is a row of its own.
        self.baselines = [name for name in dict.fromkeys(self.baselines) if name != self.method]
        if self.bias_correction:
            self._check_bias_correction()

    def _check_bias_correction(self) -> None:
        for name in self.rows:
            if name not in METHODS:
                continue  # the error of an unknown method comes later
            kind = METHODS[name]
            if not kind.corrects_biases:
                able = ", ".join(name for name, kind in METHODS.items() if kind.corrects_biases)
                raise UsageError(
                    "train: expected bias_correction only with methods that calibrate and then "
                    f"keep the biases or train them ({able}), got method {name}"
                )
            if kind.observes(self.settings):
                raise UsageError(
                    "train: expected bias_correction only with ranges that are set once, got "
                    f"method {name}, whose ranges move with every batch"
                )
            if kind.distils and self.settings.distillation.rounding is not None:
                raise UsageError(
                    "train: expected no bias_correction with settings.distillation.rounding, which "
                    f"begins with unrounded weights, got both for method {name}"
                )

    @property
    def rows(self) -> list[str]:
        """All methods to run, in order: the baselines, then the method."""
        return [*(self.baselines or []), self.method]

    @property
    def scheduled(self) -> MethodSettings:
        """`settings` with every schedule multiplied by `schedule_share`."""
        share = self.schedule_share
        return self.settings if share == 1 else self.settings.scaled(share)


#: Options that do not change the result: folder, time limit, resumption and speed.
_NOT_STORED = (
    *("out", "resume", "max_time", "threads", "profile", "workers", "test_batch"),
    *("max_unreadable", "report", "cuda_graphs", "exportable", "download"),
)
#: Options that stand for others.
_EXPANDED = ("preset", "config", "bits")
#: Options without a value.
_FLAGS = ("resume", "keep_best", "report", "download", "no_report", "print_config", "help")
#: Largest factor by which --minutes stretches a schedule.
_LARGEST_SHARE = 64.0
#: Number of images in a report's comparison.
REPORT_IMAGES = 1000
#: Configuration files of the package.
_PRESETS = Path(str(files("fdda_ext") / "presets"))


def _expand(arguments: Sequence[str]) -> list[str]:
    """Put --config first, because other options override it, and expand --bits."""
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
    """Return the value of ``key`` in the configuration files among ``arguments``, if any."""
    value = None
    for argument in arguments:
        path = Path(argument.removeprefix("--config="))
        if argument.startswith("--config=") and path.is_file():
            try:
                content = yaml.safe_load(path.read_bytes())
            except (OSError, yaml.YAMLError):  # the parser will report it
                continue
            value = content.get(key, value) if isinstance(content, dict) else value
    return value


def preset_path(name: str, method: str) -> Path:
    """Return the file of a preset for ``method``.

    Raises:
        UsageError: If there is no such preset or method.
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
        UsageError: If an argument is wrong, or no method of the run uses it. In a configuration
            file, which may serve several methods, an unused option only causes a warning.
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
    """Remove the options that `parse_arguments` would refuse as unused."""
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
    """Return why no method of the run uses ``option``; None if one does."""
    kinds = {name: METHODS[name] for name in config.rows if name in METHODS}
    field = option.removeprefix("quantization.")
    own = kinds[config.method].fixed_ranges.get(field) if config.method in kinds else None
    if own is not None and getattr(config.quantization, field) == own:
        return None  # it requests what the method does anyway
    reasons = [
        why_unused(option, name, kind, config.settings, config.quantization)
        for name, kind in kinds.items()
    ]
    return reasons[-1] if reasons and all(reasons) else None


def _given(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return the options and values of the command line."""
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
    """Return the dotted names of all options that configuration files set."""
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


@cache
def _parser() -> ArgumentParser:
    """Build the parser, which takes longer than parsing. The caller sets the default files."""
    parser = build_parser("fdda_ext.train", _DESCRIPTION)
    parser.add_argument("--preset", default="short", help="short (minutes, embedded data) or paper")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of settings")
    parser.add_argument("--bits", help="such as W4A4, short for the two quantization.*_bits")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--keep_best", action="store_true", help="also keep best.safetensors")
    parser.add_argument(
        "--report", action=ActionYesNo, default=True, help="write report.html at the end"
    )
    parser.add_argument(
        "--download", action="store_true", help="download a torchvision data set to PATH"
    )
    flags = {"resume", "keep_best", "report", "download"}
    parser.add_class_arguments(TrainConfig, as_group=False, skip=flags)
    return parser


def _parse(arguments: list[str]) -> tuple[TrainConfig, str]:
    """Parse arguments from `_expand`, and accept unused options."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")  # the second parser reports a missing value
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
            raise UsageError("train: expected --out, the run to continue, with --resume, got none")
        if chosen.preset is not None:
            raise UsageError(
                "train: expected no --preset with --resume, because a run keeps its settings, "
                f"got {chosen.preset}"
            )
        defaults = Path(chosen.out) / "config.yaml"
        if not defaults.is_file():
            raise UsageError(f"train: expected --out to hold a run to resume, got {chosen.out}")

    parser = _parser()
    parser.default_config_files = [str(defaults)]
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
        top1: Top-1 accuracy, in per cent.
        top5: Top-5 accuracy, in per cent.
        images: Number of tested images.
        seconds: Training time, over all resumptions.
        iterations: Iterations done.
        planned: Iterations of the schedule. Fewer were done if time ran out.
        real_images: Number of real images that the method used.
        synthetic_images: Number of synthetic images that the student saw.
        peak_memory: Peak memory of the process or, on a GPU, of torch there, in MiB.
        float_top1: Top-1 accuracy of the float network, in per cent.
        of: Number of images that these are a sample of; 0 if they are no sample.
    """

    name: str
    top1: float
    top5: float
    images: int
    seconds: float = 0.0
    iterations: int = 0
    planned: int = 0
    real_images: int = 0
    synthetic_images: int = 0
    peak_memory: int = 0
    float_top1: float = 0.0
    of: int = 0

    @property
    def finished(self) -> bool:
        """Whether the training was completed."""
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
        config: The configuration.
        problem: Network and calibration images.
        preprocessing: Preprocessing of image files; None for embedded data.
        test: Images for the test at the end.
        curve: Images for measurements during training.
        float_top1: Top-1 accuracy of the float network on ``test``, in per cent.
    """

    config: TrainConfig
    problem: Problem
    preprocessing: Preprocessing | None
    test: BatchSource
    curve: BatchSource
    float_top1: float

    def recipe(self, name: str, quantization: QuantizationConfig) -> dict[str, Any]:
        """Return the recipe to rebuild a student of the method ``name``."""
        return {
            "model": self.config.model,
            "num_classes": self.problem.num_classes,
            "image_size": self.problem.full_image_size,
            "channels": self.problem.channels,
            "data": self.config.data,
            "preprocessing": self.preprocessing.to_dict() if self.preprocessing else None,
            "method": name,
            "quantization": asdict(quantization),
        }


def _train_one(session: _Session, name: str, folder: RunFolder, max_seconds: float | None) -> Row:
    """Train and evaluate one method in ``folder``, or read its result there."""
    config, problem = session.config, session.problem
    summary = from_first(folder.summary)
    if summary is not None:
        try:
            return Row(**summary)
        except TypeError as error:
            raise UsageError(
                f"train: expected {folder.path / 'summary.json'} to be from a run, got {error}"
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

    share = schedule_share(
        name, problem, config.scheduled, config.minutes, folder, most=_LARGEST_SHARE
    )
    method, progress = run_method(
        name,
        problem,
        config.scheduled.scaled(share) if share != 1 else config.scheduled,
        folder,
        max_seconds=max_seconds,
        evaluation=measure,
        evaluate_every=config.evaluate_every,
    )
    if progress.interrupted:
        raise KeyboardInterrupt(f"continue with --out {config.out or folder.path} --resume")
    memory = peak_memory(problem.device)
    accuracy = evaluate(
        method.student, session.test, device=problem.device, label=f"{name}: testing"
    )
    row = replace(
        _row(name, accuracy, progress, method.iterations),
        real_images=len(problem.labels) // problem.views if method.real_images else 0,
        synthetic_images=method.synthetic_images,
        peak_memory=memory,
        float_top1=session.float_top1,
    )
    if not is_first():
        return row
    # A method may choose bits during training.
    recipe = session.recipe(name, method.quantization)
    write_student(folder.path / "student.safetensors", method.student, recipe)
    (folder.path / "bits.txt").write_text(render_bits(bits_table(method.student)) + "\n")
    with alone():
        method.save_artifacts(folder.path)
    if row.finished:
        folder.finish(asdict(row))
    return row


#: Iterations before a profile, in which memory is allocated and kernels are chosen.
_UNMEASURED = 3


def measure_stages(
    config: TrainConfig, problem: Problem, folder: Path, console: Console
) -> Profile:
    """Run the method's schedule, shortened, and write the time of its iterations by stage.

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
    bound = "at most" if problem.replays else "about"  # a profile never replays CUDA graphs
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
    """Return the best accuracy in metrics.jsonl; -1 if there is none."""
    lines = folder.metrics.read_text().splitlines()
    return max((json.loads(line).get("top1", -1.0) for line in lines), default=-1.0)


def render_rows(rows: list[Row], bits: str, split: str = "test") -> Table:
    """Return the final table."""
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
    """Open the run folder, which only the first rank creates.

    Raises:
        UsageError: See `RunFolder`, or if another rank has other weights or images.
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
            f"all processes, got others{signature()}"
        )
    return folder


def _new_folder(config: TrainConfig) -> Path:
    """Return the first unused path: runs/NAME, runs/NAME-2, ..."""
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
        The problem, and the loaded network with its origin and preprocessing.

    Raises:
        UsageError: If network and data do not fit each other.
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
        augmented_images=config.augmented_images,
        training_pixels=config.training_pixels,
        equalisation=config.equalisation,
        bias_correction=config.bias_correction,
    )
    outputs = count_outputs(problem.teacher, problem.images[:1], "train")
    if outputs != dataset.num_classes:
        raise UsageError(
            f"train: expected model to have the data's {dataset.num_classes} classes, got {outputs}"
        )
    return problem, replace(opened, preprocessing=preprocessing)


def inputs_digest(problem: Problem) -> str:
    """Return the digest of the weights and images that a run starts from."""
    return digest({"images": problem.images.cpu(), **cpu_state(problem.teacher)}, "")


def report(
    config: TrainConfig,
    problem: Problem,
    preprocessing: Preprocessing | None,
    folder: Path,
    images: int = REPORT_IMAGES,
) -> Path:
    """Write ``report.html`` of the run or baseline in ``folder``. See `write_report`.

    Args:
        config: Configuration of the run.
        problem: Problem from `build_problem`.
        preprocessing: Preprocessing of image files; None for embedded data.
        folder: Folder of the student.
        images: Largest number of images of the split to compare on.
    """
    with alone():
        limit = min(config.test_limit or images, images)
        batches = test_batches(config, preprocessing, limit, problem.channels)
        return write_report(folder, problem, batches)


def test_batches(
    config: TrainConfig, preprocessing: Preprocessing | None, limit: int | None, channels: int
) -> BatchSource:
    """Return at most ``limit`` images of the split to test."""
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
    """Train ``config.method`` and its baselines. Print and store the table.

    Args:
        config: The configuration.
        stored_config: YAML text for the run folder, from `parse_arguments`.
        console: Console to print on.

    Returns:
        The rows: float, the baselines, the method.
    """
    console = console or Console(quiet=not is_first())
    for name in config.rows:
        method_class(name)
    if config.minutes is not None and world_size() > 1:
        raise UsageError(
            "train: expected minutes with a single process, because ranks cannot take trials of "
            f"their own, got {world_size()} processes; use schedule_share"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    with must_fit(images_per_class=config.images_per_class), first_on_machine():
        problem, opened = build_problem(config)
        if not config.resume:
            check_problem(problem, config.rows, exportable=config.exportable)
        with alone():  # it takes steps, in which ranks would exchange gradients
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
            except Exception as error:  # the run is finished even without its report
                reason = escape(" ".join(f"{type(error).__name__}: {error}".split())[:200])
                console.print(f"[yellow]warning:[/] no report.html ({reason})", soft_wrap=True)
    if not all(row.finished for row in rows):
        console.print(
            f"stopped by --max-time; continue with --out {path} --resume", highlight=False
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    config, text = parse_arguments(arguments)
    with joined(config.device):
        run(config, text)
