"""A student as a program file that has shown to compute the same."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..errors import UsageError
from .file import load_program, replacing, write_program
from .lowering import lower
from .program import IntegerProgram

__all__ = ["check_target", "export_student"]

#: Sizes of the batches that program and student are compared on.
_BATCHES = (1, 3)
_REPORT = "nothing was written; this is a fault of fdda_ext, please report it with the network"


def export_student(
    student: GraphModule,
    path: str | Path,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    images: Tensor | None = None,
) -> IntegerProgram:
    """Write the integer program of ``student`` to ``path``, once both have given the same logits.

    The file takes its place when the program, as read back from it, has run on batches of one and
    three images with the student's logits to the last bit. Otherwise nothing is written.

    Args:
        student: From `prepare` with grid "deploy", calibrated; on any device.
        path: The file to write; its folder must exist.
        mean: Of the images' normalisation, for a program that is to take uint8.
        std: Likewise.
        images: Normalised float32 ``[n, C, H, W]`` to compare on, of which the first three are
            taken; None for random ones.

    Returns:
        The program that was written, on the CPU.

    Raises:
        UsageError: If the file cannot be written there, the student cannot be lowered, or the
            program fails or differs.
    """
    path = Path(path)
    check_target(path)
    program = lower(student, mean, std)
    with replacing(path) as temporary:
        write_program(temporary, program)
        program = load_program(temporary)
        _compare(program, student, images)
    return program


def check_target(path: Path, argument: str = "path") -> None:
    """Whether a file can be written to ``path``.

    Args:
        path: A file that exists, or not yet.
        argument: How errors name it.

    Raises:
        UsageError: If its folder does not exist or cannot be written to, or it is no file.
    """
    folder = path.parent
    if not folder.is_dir() or (path.exists() and not path.is_file()):
        raise UsageError(
            f"export: expected {argument} to be a file in a folder that exists, got {path}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(
            f"export: expected {argument} in a folder that can be written to, got {path}"
        )


@torch.no_grad()
def _compare(program: IntegerProgram, student: GraphModule, images: Tensor | None) -> None:
    """Refuse a program that fails or gives other logits than the student."""
    if any(not parameter.is_cpu for parameter in student.parameters()):
        student = copy.deepcopy(student).cpu()
    if images is None or not len(images):
        inputs, normalised = _random_images(program)
    else:
        inputs = normalised = images.detach().to("cpu", torch.float32)
    program.check_images(inputs)
    for size in _BATCHES:
        chosen = torch.arange(size) % len(inputs)
        expected = student(normalised[chosen])
        if not bool(expected.isfinite().all()):
            raise UsageError(
                "export: expected student to give finite logits, got NaN or infinity; nothing was "
                "written"
            )
        try:
            logits = program(inputs[chosen])
        except Exception as error:
            raise UsageError(
                f"export: expected the program to run on {size} images, "
                f"got {type(error).__name__}: {error}; {_REPORT}"
            ) from error
        if not torch.equal(logits, expected):
            raise UsageError(
                "export: expected the program to give the student's logits to the last bit, "
                f"got others on {size} images; {_REPORT}"
            )


def _random_images(program: IntegerProgram) -> tuple[Tensor, Tensor]:
    """What the program is to take, uint8 if it can, and the same normalised."""
    size = (max(_BATCHES), *program.image.shape)
    random = torch.Generator().manual_seed(0)
    if program.mean is None or program.std is None:
        images = torch.randn(size, generator=random)
        return images, images
    raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=random)
    return raw, program.normalise(raw)
