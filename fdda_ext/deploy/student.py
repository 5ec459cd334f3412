"""Loading of a stored student."""

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
    """Build the student that is stored in ``path``.

    Args:
        path: Run folder or student file.
        command: Name of the command in error messages.

    Returns:
        The student in evaluation mode, and its recipe: the settings from which it is built.

    Raises:
        UsageError: If there is no student, or its file is damaged.
    """
    if path.is_dir():
        if not (path / "student.safetensors").exists():
            raise UsageError(
                f"{command}: expected run to be a folder with a trained student, got {path}; "
                "continue an unfinished run with fdda_ext.train --out ... --resume"
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
            f"{command}: expected {path} to hold the student that its recipe describes, "
            f"got {reason}"
        ) from None
    return student.eval(), recipe
