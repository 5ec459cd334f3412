"""Export of a student to a program file, with a check that both give the same logits."""

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

#: Batch sizes on which program and student are compared.
_BATCHES = (1, 3)
_REPORT = "nothing was written; this is a bug of fdda_ext, please report it with the network"


def export_student(
    student: GraphModule,
    path: str | Path,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    images: Tensor | None = None,
) -> IntegerProgram:
    """Write the integer program of ``student`` to ``path`` after a check of its logits.

    The check runs the program, read back from a temporary file, on batches of 1 and 3 images.
    Nothing is written unless the logits are bit-identical to the student's.

    Args:
        student: Calibrated student from `prepare` with grid "deploy", on any device.
        path: File to write. Its folder must exist.
        mean: Mean per channel, to normalise uint8 images; None to take only float32 images.
        std: Standard deviation per channel, together with ``mean``.
        images: Normalised float32 images ``[n, C, H, W]``, of which the check uses three; None
            for random images.

    Returns:
        The written program, on the CPU.

    Raises:
        UsageError: If the file cannot be written, the student cannot be lowered, or the check
            fails.
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
    """Check that a file can be written to ``path``.

    Args:
        path: Path of a new or an existing file.
        argument: Name of the path in error messages.

    Raises:
        UsageError: If the folder does not exist or is not writable, or ``path`` is not a file.
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
    """Raise an error if the program fails or its logits differ from the student's."""
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
                "export: expected the program's logits to be bit-identical to the student's, "
                f"got others on {size} images; {_REPORT}"
            )


def _random_images(program: IntegerProgram) -> tuple[Tensor, Tensor]:
    """Draw images, uint8 if the program takes them, and return them raw and normalised."""
    size = (max(_BATCHES), *program.image.shape)
    random = torch.Generator().manual_seed(0)
    if program.mean is None or program.std is None:
        images = torch.randn(size, generator=random)
        return images, images
    raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=random)
    return raw, program.normalise(raw)
