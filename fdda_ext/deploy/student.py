"""The student of a run, built again from its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from ..engine import image_shape_of, read_student
from ..errors import UsageError
from ..models import load_model
from ..quantization import QuantizationConfig, prepare

__all__ = ["load_student"]


def load_student(path: Path, command: str = "evaluate") -> tuple[GraphModule, dict[str, Any]]:
    """Build the student stored in ``path``, a run folder or a student file.

    Args:
        path: Where it is.
        command: Named in errors.

    Returns:
        The fake-quantized network in evaluation mode, and the recipe it was built from.

    Raises:
        UsageError: If there is no student, or its file is damaged.
    """
    if path.is_dir():
        if not (path / "student.safetensors").exists():
            raise UsageError(
                f"{command}: expected run to be a folder with a trained student, got {path}; "
                "an unfinished run goes on with fdda_ext.train --out ... --resume"
            )
        path = path / "student.safetensors"
    state, recipe = read_student(path, command)
    try:
        network = load_model(recipe["model"], weights="none", num_classes=recipe["num_classes"])
        example = torch.zeros(1, *image_shape_of(recipe, command))
        student = prepare(network, QuantizationConfig(**recipe["quantization"]), example)
        student.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{command}: expected {path} to hold the student its recipe describes, got {reason}"
        ) from None
    return student.eval(), recipe
