"""``python -m fdda_ext.export``: a run's student as a program of integers, in one small file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .data import load_dataset, takes_preprocessing
from .deploy import IntegerProgram, load_program, load_student, lower, save_program, stored_bytes
from .engine import (
    build_parser,
    image_shape_of,
    instantiate_or_refuse,
    parse_or_refuse,
    preprocessing_of,
    run_command,
)
from .errors import UsageError

__all__ = ["ExportConfig", "main", "run"]

_DESCRIPTION = """\
Write the integer program of a run's student: packed weights, scales and instructions, no code.

examples:
  python -m fdda_ext.export --run runs/a                  writes runs/a/model.int4.safetensors
  python -m fdda_ext.export --run runs/a --out net.safetensors
  python -m fdda_ext.export --run runs/a --profile 1      also where the time of one image goes
"""


@dataclass
class ExportConfig:
    """What to export, and where to.

    Attributes:
        run: A run folder, or a student.safetensors.
        out: The file to write; None for model.int4.safetensors beside the student.
        profile: Also measure every layer, at so many images; 0 for not.
    """

    run: str
    out: str | None = None
    profile: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.profile <= 4096:
            raise UsageError(f"export: expected profile to be 0 to 4096 images, got {self.profile}")
        if "" in (self.run, self.out):
            raise UsageError("export: expected run and out not to be empty")


def run(config: ExportConfig) -> tuple[Path, IntegerProgram]:
    """Export, and read back what was written."""
    source = Path(config.run)
    student, recipe = load_student(source, "export")
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    try:
        how = preprocessing_of(recipe, "export")
        if takes_preprocessing(str(recipe["data"])):
            mean, std = how.mean, how.std
        else:
            channels = image_shape_of(recipe, "export")[0]
            dataset = load_dataset(str(recipe["data"]), "test", channels=channels)
            mean, std = dataset.mean, dataset.std
    except UsageError:
        pass  # an unknown set: the program then takes normalised images alone
    folder = source if source.is_dir() else source.parent
    path = Path(config.out) if config.out else folder / "model.int4.safetensors"
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"export: expected out to be a file in a folder that exists, got {path}")
    save_program(path, lower(student, mean, std))
    return path, load_program(path)


def render_sizes(program: IntegerProgram, file_bytes: int) -> Table:
    """A table of what every layer takes in the file."""
    table = Table("layer", "bits", "parameters", "bytes")
    total = 0
    for name, bits, parameters, size in stored_bytes(program):
        table.add_row(name, str(bits), str(parameters), str(size))
        total += size
    table.add_row("instructions", "", "", str(file_bytes - total))
    table.add_row("file", "", "", str(file_bytes))
    return table


def render_times(program: IntegerProgram, images: int) -> Table:
    """A table of the time of every step on this CPU."""
    rows = program.native.profile(torch.zeros(images, *program.image.shape))
    table = Table("step", "by", "microseconds", "GOP/s", title=f"{images} images")
    for row in rows:
        rate = 2 * row.products / row.seconds / 1e9 if row.seconds else 0.0
        table.add_row(
            row.name, row.algorithm, f"{row.seconds * 1e6:.0f}", f"{rate:.0f}" if rate else ""
        )
    table.add_row("all", "", f"{sum(row.seconds for row in rows) * 1e6:.0f}", "")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
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


if __name__ == "__main__":
    run_command(main)
