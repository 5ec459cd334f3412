"""``python -m fdda_ext.data.synthetic``: write a data set in ImageNet's layout, for practice.

Every class is one or two characters of ``glyphs``, in many typefaces, colours and sizes, so that a
network can learn it. Validation images have typefaces of their own.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from rich.console import Console

from ..engine import (
    build_parser,
    check_machine,
    instantiate_or_refuse,
    parse_or_refuse,
    progress_bar,
    run_command,
)
from ..errors import UsageError
from .glyphs import CHARACTERS, draw, faces_of

__all__ = ["SyntheticConfig", "class_name", "class_text", "main", "run"]

_DESCRIPTION = """\
Write a folder of JPEG images in ImageNet's layout: train/<class>/* and val/<class>/*.

examples:
  python -m fdda_ext.data.synthetic --classes 1000 --per-class 20 --out data/synthetic
  python -m fdda_ext.data.synthetic --classes 20 --per-class 100 --out data/small --form shards
then
  python -m fdda_ext.pretrain --data shards:data/small --model torchvision:resnet18 --out runs/float
"""

#: The splits, their names in `glyphs`, and their part of the seed.
_SPLITS = {"train": ("train", 0), "val": ("test", 1)}
#: Characters are drawn with this many pixels and then enlarged to the image's size.
_DRAWN = 160
_SHORT_SIDE = (200, 500)
_LONGEST = 1.5
_IMAGES_PER_SHARD = 1000
_MOST_CLASSES = len(CHARACTERS) * (len(CHARACTERS) + 1)


@dataclass
class SyntheticConfig:
    """Settings of the data set.

    Attributes:
        out: Folder to write, which must be new or empty.
        classes: Number of classes: 71 characters, then pairs of characters.
        per_class: Training images per class.
        val_per_class: Validation images per class.
        seed: Seed for all random numbers.
        form: "folder" for files (folder:PATH), or "shards" for webdataset archives (shards:PATH).
        workers: Number of processes that draw; the images do not depend on it.
    """

    out: str
    classes: int = 1000
    per_class: int = 20
    val_per_class: int = 5
    seed: int = 0
    form: Literal["folder", "shards"] = "folder"
    workers: int = 1

    def __post_init__(self) -> None:
        check_machine("synthetic", seed=self.seed, threads=self.workers)
        if not 1 <= self.classes <= _MOST_CLASSES:
            raise UsageError(
                f"synthetic: expected classes between 1 and {_MOST_CLASSES}, got {self.classes}"
            )
        for name in ("per_class", "val_per_class"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"synthetic: expected {name} at least 1, got {getattr(self, name)}"
                )
        if self.out == "":
            raise UsageError("synthetic: expected out to be a folder, got an empty name")


def class_text(label: int) -> str:
    """Return the text on the images of class ``label``."""
    second, first = divmod(label, len(CHARACTERS))
    return CHARACTERS[first] + (CHARACTERS[second - 1] if second else "")


def class_name(label: int) -> str:
    """Return the folder of class ``label``; sorted names have the order of the labels."""
    return f"n{label:08d}"


def draw_jpeg(split: str, seed: int, label: int, number: int) -> bytes:
    """Draw image ``number`` of class ``label`` and encode it as JPEG."""
    of_glyphs, split_number = _SPLITS[split]
    rng = np.random.default_rng([seed, split_number, label, number])
    text = class_text(label)
    faces = [face for face in faces_of(text[0], of_glyphs) if face in faces_of(text[-1], of_glyphs)]
    image = Image.fromarray(draw(text, faces, _DRAWN, rng))
    short = int(rng.integers(*_SHORT_SIDE))
    long = int(short * rng.uniform(1, _LONGEST))
    size = (long, short) if rng.uniform() < 0.7 else (short, long)
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=int(rng.integers(75, 96))
    )
    return file.getvalue()


def _draw_all(tasks: Sequence[tuple[str, int, int, int]], pool: Executor | None) -> Iterator[bytes]:
    if pool is None:
        yield from (draw_jpeg(*task) for task in tasks)
        return
    waiting = iter(tasks)  # in batches, so that drawing does not run ahead of writing
    while batch := list(islice(waiting, 256)):
        yield from pool.map(draw_jpeg, *zip(*batch, strict=True), chunksize=8)


def run(config: SyntheticConfig) -> Path:
    """Write the folder and return it."""
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"synthetic: expected out to be a new or empty folder, got {out}")
    parallel = config.workers > 1
    with (
        ProcessPoolExecutor(config.workers) if parallel else nullcontext() as pool,
        progress_bar() as bar,
    ):
        for split, count in (("train", config.per_class), ("val", config.val_per_class)):
            tasks = [
                (split, config.seed, label, number)
                for label in range(config.classes)
                for number in range(count)
            ]
            if config.form == "shards":  # mixes the classes in each archive
                order = np.random.default_rng([config.seed, 2]).permutation(len(tasks))
                tasks = [tasks[i] for i in order]
            shown = bar.add_task(split, total=len(tasks), shown="")
            write = _write_shards if config.form == "shards" else _write_files
            for _ in write(out / split, tasks, _draw_all(tasks, pool)):
                bar.advance(shown)
    return out


def _write_files(
    folder: Path, tasks: Sequence[tuple[str, int, int, int]], images: Iterator[bytes]
) -> Iterator[None]:
    for (_, _, label, number), data in zip(tasks, images, strict=True):
        place = folder / class_name(label)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{class_name(label)}_{number}.JPEG").write_bytes(data)
        yield


def _write_shards(
    folder: Path, tasks: Sequence[tuple[str, int, int, int]], images: Iterator[bytes]
) -> Iterator[None]:
    folder.mkdir(parents=True)
    for first in range(0, len(tasks), _IMAGES_PER_SHARD):
        with tarfile.open(folder / f"{first // _IMAGES_PER_SHARD:06d}.tar", "w") as archive:
            for _, _, label, number in tasks[first : first + _IMAGES_PER_SHARD]:
                for extension, data in (("jpg", next(images)), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{class_name(label)}_{number}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = build_parser("fdda_ext.data.synthetic", _DESCRIPTION)
    parser.add_class_arguments(SyntheticConfig, as_group=False)
    config = SyntheticConfig(**instantiate_or_refuse(parser, parse_or_refuse(parser, arguments)))
    out = run(config)
    Console().print(f"written: --data {config.form}:{out}", highlight=False)


if __name__ == "__main__":
    run_command(main)
