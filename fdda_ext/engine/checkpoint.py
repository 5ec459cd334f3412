"""Nested state in one safetensors file, written atomically and read without unpickling.

The dictionaries, lists, numbers and strings around the tensors are JSON in the file's metadata,
with a reference to each tensor.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UsageError

__all__ = [
    "atomic_write_text",
    "cpu_state",
    "digest",
    "load_state",
    "restore_random",
    "save_state",
]

_log = logging.getLogger("fdda_ext")

_FORMAT = "fdda_ext.state.1"


def _take_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the JSON form of ``value``. Its tensors go to ``tensors`` under running numbers."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy, because safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _take_apart(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_take_apart(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"save_state cannot store a {type(value).__name__}")


def _put_together(form: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = form.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(item, tensors) for key, item in content}
    if kind == "list":
        return [_put_together(item, tensors) for item in content]
    return content


def cpu_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of ``network``, contiguous and on the CPU."""
    return {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}


def digest(tensors: dict[str, Tensor], text: str) -> str:
    """Return the SHA-256 of contiguous CPU tensors, with their names, and of ``text``."""
    checksum = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksum.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()


def _replace(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text``. ``path`` holds either the old content or all of the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _replace(temporary, path)


def save_state(path: Path, state: dict[str, Any], **metadata: str) -> None:
    """Store nested dictionaries and lists of tensors, numbers and strings, atomically.

    Args:
        path: File to write or replace.
        state: What to store.
        metadata: Strings that can be read without the tensors.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_take_apart(state, tensors))
    temporary = path.with_name(path.name + ".tmp")
    checksum = digest(tensors, structure)
    save_file(
        tensors,
        str(temporary),
        metadata={"format": _FORMAT, "structure": structure, "sha256": checksum, **metadata},
    )
    _replace(temporary, path)


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        UsageError: If the file is missing, truncated, or was not written by `save_state`.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UsageError(
                    f"load_state: expected path to be a state file ({_FORMAT}), got {path} "
                    f"of format {metadata.get('format', 'unknown')}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            if digest(tensors, metadata["structure"]) != metadata["sha256"]:
                raise ValueError("its content was changed after it was written")
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            state = _put_together(json.loads(metadata["structure"]), tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"load_state: expected path to be a complete state file, got {path} ({error})"
        ) from None
    if not isinstance(state, dict):
        raise UsageError(f"load_state: expected path to hold a dictionary, got {path}")
    return state


def restore_random(random: torch.Generator, state: Tensor) -> None:
    """Continue ``random`` from ``state``.

    If one is from a CPU and the other from a GPU, this is impossible. Then a new sequence begins,
    whose seed comes from ``state``.
    """
    state = state.cpu()
    if state.numel() == random.get_state().numel():
        random.set_state(state)
        return
    seed = hashlib.sha256(state.numpy().tobytes()).digest()[:7]
    random.manual_seed(int.from_bytes(seed, "little"))
    _log.warning(
        "run: the checkpoint is from another kind of device; random numbers will be different"
    )
