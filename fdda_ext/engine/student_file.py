"""Files of students: state dict, and a recipe to build the student again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UsageError
from ..image_size import height_and_width, parse_image_size
from ..preprocessing import CHANNELS, Preprocessing
from .checkpoint import cpu_state, digest

__all__ = ["image_shape_of", "preprocessing_of", "read_student", "write_student"]

_FORMAT = "fdda_ext.student.1"


def write_student(path: Path, student: nn.Module, recipe: dict[str, Any]) -> None:
    """Write a student's state and ``recipe`` (JSON: model, classes, image size, bits)."""
    tensors = cpu_state(student)
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(recipe)
    metadata = {"format": _FORMAT, "recipe": text, "sha256": digest(tensors, text)}
    save_file(tensors, str(temporary), metadata=metadata)
    temporary.replace(path)


def read_student(path: Path, command: str = "evaluate") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_student` wrote. Errors begin with ``command``.

    Raises:
        UsageError: If the file is missing, damaged, or not a student.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UsageError(
                    f"{command}: expected a student file ({_FORMAT}), got {path} "
                    f"of format {metadata.get('format', 'unknown')}"
                )
            recipe = json.loads(metadata["recipe"])
            state = {name: file.get_tensor(name) for name in file.keys()}
            if digest(state, metadata["recipe"]) != metadata["sha256"]:
                raise OSError("its content was changed after it was written")
            return state, recipe
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UsageError(
            f"{command}: expected a complete student file, got {path} ({error})"
        ) from None


def image_shape_of(recipe: dict[str, Any], command: str = "evaluate") -> tuple[int, int, int]:
    """Return channels, height and width of the images in a student's ``recipe``.

    Raises:
        UsageError: If they are not valid.
    """
    channels = recipe.get("channels", 3)  # files of older versions lack it
    if channels not in CHANNELS:
        raise UsageError(f"{command}: expected a recipe of 1, 3 or 4 channels, got {channels}")
    return (channels, *height_and_width(parse_image_size(recipe["image_size"], command)))


def preprocessing_of(recipe: dict[str, Any], command: str = "evaluate") -> Preprocessing:
    """Return the preprocessing of image files in a student's ``recipe``.

    Raises:
        UsageError: If it is not valid.
    """
    given = recipe.get("preprocessing")
    if given is None:  # embedded data, or a file of an older version
        return Preprocessing().for_size(parse_image_size(recipe["image_size"], command))
    try:
        return Preprocessing.from_dict(given)
    except (UsageError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{command}: expected a recipe with a preprocessing, got {given} ({error})"
        ) from None
