"""``python -m fdda_ext.export``: write the integer program of a run's student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..data import load_dataset, takes_preprocessing
from ..deploy import IntegerProgram, check_target, export_student, load_student, stored_bytes
from ..engine import (
    build_parser,
    check_machine,
    format_significant,
    image_shape_of,
    instantiate_or_refuse,
    parse_or_refuse,
    preprocessing_of,
)
from ..errors import UsageError

__all__ = ["ExportConfig", "main", "run"]

_DESCRIPTION = """\
Write the integer program of a run's student: packed weights, scales and instructions, no code.
The program first runs on a few images. The file is written only if the logits are bit-identical to
the student's.

examples:
  python -m fdda_ext.export --run runs/a                  writes runs/a/model.int4.safetensors
  python -m fdda_ext.export --run runs/a --out net.safetensors
  python -m fdda_ext.export --run runs/a --profile 1      also times every layer with one image
"""


@dataclass
class ExportConfig:
    """What to export, and where to.

    Attributes:
        run: Run folder, or a student.safetensors.
        out: File to write; None for model.int4.safetensors beside the student.
        profile: Number of images to time every layer with; 0 for no timing.
        threads: CPU threads, also for `profile`; None for torch's default.
    """

    run: str
    out: str | None = None
    profile: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_machine("export", threads=self.threads)
        if not 0 <= self.profile <= 4096:
            raise UsageError(f"export: expected profile to be 0 to 4096 images, got {self.profile}")
        if "" in (self.run, self.out):
            raise UsageError("export: expected run and out not to be empty")


def run(config: ExportConfig) -> tuple[Path, IntegerProgram]:
    """Export a student whose program gives the same logits on a few images.

    Raises:
        UsageError: If there is no student, it has no integer program, or the file cannot be
            written.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = Path(config.run)
    folder = source if source.is_dir() else source.parent
    path = Path(config.out) if config.out else folder / "model.int4.safetensors"
    if config.out:
        check_target(path, "out")
    student, recipe = load_student(source, "export")
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    images: Tensor | None = None
    try:
        data, how = str(recipe["data"]), preprocessing_of(recipe, "export")
        channels, height, width = image_shape_of(recipe, "export")
        if takes_preprocessing(data):
            mean, std = how.mean, how.std
        size = (height, width)
        dataset = load_dataset(data, "test", image_size=size, preprocessing=how, channels=channels)
        mean, std = dataset.mean, dataset.std
        images, _ = dataset.images(range(min(len(dataset), 3)))
    except UsageError:
        pass  # without the data, random images are compared
    return path, export_student(student, path, mean, std, images)


def render_sizes(program: IntegerProgram, file_bytes: int) -> Table:
    """Return a table of the bytes that every layer takes in the file."""
    table = Table("layer", "bits", "parameters", "bytes")
    total = 0
    for name, bits, parameters, size in stored_bytes(program):
        table.add_row(name, str(bits), str(parameters), str(size))
        total += size
    table.add_row("instructions", "", "", str(file_bytes - total))
    table.add_row("file", "", "", str(file_bytes))
    return table


def render_times(program: IntegerProgram, images: int) -> Table:
    """Return a table of the time of every step on this CPU."""
    rows = program.native.profile(torch.zeros(images, *program.image.shape))
    table = Table("step", "by", "microseconds", "GOP/s", title=f"{images} images")
    for row in rows:
        rate = 2 * row.products / row.seconds / 1e9 if row.seconds else 0.0
        table.add_row(
            *(row.name, row.algorithm, format_significant(1e6 * row.seconds)),
            format_significant(rate) if rate else "",
        )
    table.add_row("all", "", format_significant(1e6 * sum(row.seconds for row in rows)), "")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser("fdda_ext.export", _DESCRIPTION)
    parser.add_class_arguments(ExportConfig, as_group=False)
    config = ExportConfig(**instantiate_or_refuse(parser, parse_or_refuse(parser, arguments)))
    path, program = run(config)
    console = Console()
    console.print(render_sizes(program, path.stat().st_size))
    if config.profile:
        console.print(render_times(program, config.profile))
    left = program.float_values()
    if left:
        names = ", ".join(value.name for value in left)
        console.print(f"in float32 between instructions: {names}", highlight=False)
    console.print(f"written to {path}", highlight=False)
