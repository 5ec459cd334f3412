"""``python -m fdda_ext.train``: take a trained network to a few bits.

Without arguments: FDDA to W4A4, first and last layer included, on the embedded glyphs with a small
residual network, and a table against the float network and three baselines.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ActionConfigFile, ArgumentParser
from rich.console import Console
from rich.table import Table

from .data import calibration_set, load_dataset
from .engine import BatchSource, Progress, RunFolder, evaluate, run_command, train
from .errors import UsageError
from .methods import METHODS, MethodSettings, Problem, build_method
from .models import load_model
from .quantization import QuantizationConfig, bits_table, parse_bits, render_bits, save_student

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
        weights: "default" for the trained weights that come with the model, or a file
            (safetensors, or a torch file of plain tensors).
        data: glyphs, digits, folder:PATH or imagenet:PATH.
        image_size: Height and width; None for the data set's own.
        images_per_class: Calibration images of each class.
        bits: Short for quantization.weight_bits and quantization.activation_bits, such as W4A4.
        quantization: Bits, grid and ranges of every tensor.
        settings: Constants of the methods.
        baselines: Methods to run first, for the table.
        seed: Of everything random: same seed and machine, same result.
        out: Run folder; None for a new one below runs/.
        resume: Go on with the run in `out`.
        max_time: Stop training after so many minutes; --resume goes on later.
        device: cpu or cuda.
        threads: CPU threads; None leaves torch's choice.
        test_limit: Evaluate on the first so many test images only; None for all.
    """

    method: str = "fdda"
    model: str = "glyphs_resnet"
    weights: str = "default"
    data: str = "glyphs"
    image_size: int | None = None
    images_per_class: int = 1
    bits: str | None = None
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    settings: MethodSettings = field(default_factory=MethodSettings)
    baselines: list[str] = field(default_factory=lambda: ["minmax", "mse", "distill"])
    seed: int = 0
    out: str | None = None
    resume: bool = False
    max_time: float | None = None
    device: str = "cpu"
    threads: int | None = None
    test_limit: int | None = None


#: Where a run is, how long and whether it goes on: not part of what it computes.
_NOT_STORED = ("out", "resume", "max_time", "bits", "threads")


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
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="short")
    first.add_argument("--out")
    first.add_argument("--resume", nargs="?", const="true")
    chosen, _ = first.parse_known_args(arguments)
    defaults = preset_path(chosen.preset)
    if chosen.resume in ("true", "True"):
        if chosen.out is None:
            raise UsageError("train: expected --out with --resume, the run to go on with, got none")
        defaults = Path(chosen.out) / "config.yaml"
        if not defaults.is_file():
            raise UsageError(f"train: expected --out to hold a run to resume, got {chosen.out}")

    parser = ArgumentParser(
        prog="python -m fdda_ext.train",
        description=_DESCRIPTION,
        formatter_class=_HelpFormatter,
        default_config_files=[str(defaults)],
        allow_abbrev=False,
    )
    parser.add_argument("--preset", default="short", help="short (minutes, embedded data) or paper")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of settings")
    parser.add_class_arguments(TrainConfig, as_group=False)
    namespace = parser.parse_args(arguments)
    if namespace.bits is not None:
        weight_bits, activation_bits = parse_bits(namespace.bits)
        namespace.quantization.weight_bits = weight_bits
        namespace.quantization.activation_bits = activation_bits
    stored = namespace.clone()
    for name in (*_NOT_STORED, "preset", "config"):
        stored.pop(name, None)
    text = parser.dump(stored, skip_validation=True)
    instance = parser.instantiate_classes(namespace).as_dict()
    instance.pop("preset"), instance.pop("config")
    return TrainConfig(**instance), text


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' line breaks."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    config, text = parse_arguments(arguments)
    run(config, text)
