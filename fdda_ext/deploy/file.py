"""An integer program as one safetensors file.

The metadata holds ``format``, ``manifest`` (JSON: image, normalisation, instructions) and
``sha256``. The tensors are weights, scales and shifts by name. A weight has one row
``[kh, kw, C / groups]`` per output channel, and its values are packed without gaps: value i of b
bits takes the bits i b to (i + 1) b - 1 of the row, in two's complement, with the lowest bit of a
byte first. Zeros pad every row to a whole byte. Scales and shifts are float32. If the lowest byte
of all values is 0, it is left out and the tensor is uint8 ``[C, 3]``. A file holds no executable
code, and it is checked completely before it is used.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import types
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..engine.checkpoint import digest
from ..errors import UsageError
from .instructions import (
    AveragePool,
    Concat,
    Conv,
    Instruction,
    Linear,
    MaxPool,
    Pad,
    Quantize,
    Rescale,
    Reshape,
    Value,
)
from .program import IntegerProgram

__all__ = [
    "is_program",
    "load_program",
    "pack_codes",
    "replacing",
    "save_program",
    "stored_bytes",
    "unpack_codes",
    "write_program",
]

_FORMAT = "fdda_ext.program.3"
_KINDS: dict[str, type[Instruction]] = {
    "average_pool": AveragePool,
    "concat": Concat,
    "conv": Conv,
    "linear": Linear,
    "max_pool": MaxPool,
    "pad": Pad,
    "quantize": Quantize,
    "rescale": Rescale,
    "reshape": Reshape,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Yield index, first byte and bit offset of each of eight packed codes."""
    for k in range(8):
        yield k, *divmod(k * bits, 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes ``[rows, n]`` of ``bits`` bits to uint8 ``[rows, ceil(n bits / 8)]``."""
    rows, n = codes.shape
    size = -(-n * bits // 8)
    unsigned = torch.nn.functional.pad(codes.view(torch.uint8) & ((1 << bits) - 1), (0, -n % 8))
    eights = unsigned.view(rows, -1, 8)
    packed = torch.zeros(rows, eights.shape[1], bits, dtype=torch.uint8)
    for k, byte, below in _places(bits):
        packed[..., byte] |= eights[..., k] << below
        if below + bits > 8:
            packed[..., byte + 1] |= eights[..., k] >> (8 - below)
    return packed.flatten(1)[:, :size].contiguous()


def unpack_codes(packed: Tensor, n: int, bits: int) -> Tensor:
    """Unpack the int8 codes ``[rows, n]`` that `pack_codes` packed."""
    bytes_ = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits))
    bytes_ = bytes_.view(packed.shape[0], -1, bits)
    eights = torch.empty(*bytes_.shape[:2], 8, dtype=torch.uint8)
    for k, byte, below in _places(bits):
        eights[..., k] = bytes_[..., byte] >> below
        if below + bits > 8:
            eights[..., k] |= bytes_[..., byte + 1] << (8 - below)
    sign = 1 << (bits - 1)
    codes = ((eights & (2 * sign - 1)) ^ sign) - sign
    return codes.view(torch.int8).flatten(1)[:, :n].contiguous()


def save_program(path: Path, program: IntegerProgram) -> None:
    """Write ``program`` to ``path`` atomically."""
    with replacing(path) as temporary:
        write_program(temporary, program)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` at the end, unless an error occurs."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_program(path: Path, program: IntegerProgram) -> None:
    """Write ``program`` to ``path``."""
    tensors = {}
    shapes = {}
    bits = _weight_bits(program.instructions)
    for name, tensor in program.tensors.items():
        tensor = tensor.cpu()
        if name in bits:
            shapes[name] = list(tensor.shape)
            rows = tensor.movedim(1, -1).flatten(1).contiguous()
            tensor = pack_codes(rows, bits[name])
        elif _ends_in_zero(tensor):
            tensor = tensor.view(torch.uint8).view(-1, 4)[:, 1:]
        tensors[name] = tensor.contiguous()
    manifest = json.dumps(
        {
            "image": asdict(program.image),
            "mean": program.mean,
            "std": program.std,
            "weights": shapes,
            "instructions": [{"kind": _NAMES[type(i)], **asdict(i)} for i in program.instructions],
        }
    )
    metadata = {"format": _FORMAT, "manifest": manifest, "sha256": digest(tensors, manifest)}
    save_file(tensors, str(path), metadata=metadata)


def is_program(path: Path) -> bool:
    """Whether ``path`` claims to be a program; only `load_program` checks it."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (OSError, SafetensorError):
        return False


def load_program(path: Path) -> IntegerProgram:
    """Read and check a program file, which is memory-mapped.

    Raises:
        UsageError: If the file is missing or damaged, or its program could not run.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format', 'unknown')}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if digest(tensors, metadata["manifest"]) != metadata["sha256"]:
            raise ValueError("its content was changed after it was written")
        return _build(json.loads(metadata["manifest"]), tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"load_program: expected path to be a whole program file ({_FORMAT}), "
            f"got {path} ({reason})"
        ) from None


def _build(manifest: Any, tensors: dict[str, Tensor]) -> IntegerProgram:
    given = _fields(manifest, {"image", "mean", "std", "weights", "instructions"})
    instructions = []
    for item in _parse(given["instructions"], tuple[dict[str, Any], ...], "instructions"):
        kind = _KINDS.get(str(item.pop("kind", None)))
        if kind is None:
            raise ValueError("an instruction has an unknown kind")
        instructions.append(_parse(item, kind, kind.__name__))
    shapes = _parse(given["weights"], dict[str, tuple[int, ...]], "weights")
    bits = _weight_bits(instructions)
    if shapes.keys() != bits.keys():
        raise ValueError("its weights do not match its instructions")
    for name, size in shapes.items():
        tensors[name] = _unpacked(tensors[name], size, bits[name], name)
    for name, tensor in tensors.items():
        if name not in shapes and tensor.dtype == torch.uint8:
            if tensor.dim() != 2 or tensor.shape[1] != 3:
                raise ValueError(f"{name} is stored as uint8 {tuple(tensor.shape)}")
            whole = torch.nn.functional.pad(tensor, (1, 0)).view(torch.float32)
            tensors[name] = whole.flatten()
    image = _parse(given["image"], Value, "image")
    mean, std = (_parse(given[key], tuple[float, ...] | None, key) for key in ("mean", "std"))
    return IntegerProgram(image, instructions, tensors, mean, std)


def _unpacked(tensor: Tensor, size: tuple[int, ...], bits: int, name: str) -> Tensor:
    """Unpack a stored weight to ``[O, C / groups, ...]``."""
    if len(size) not in (2, 4) or min(size) < 1 or max(size) > 2**20:
        raise ValueError(f"{name} has the shape {size}")
    if not 2 <= bits <= 8:
        raise ValueError(f"{name} has {bits} bits")
    row = math.prod(size[1:])
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) != (size[0], (row * bits + 7) // 8):
        raise ValueError(f"{name} is stored as {tensor.dtype} {tuple(tensor.shape)}")
    rows = unpack_codes(tensor, row, bits)
    return rows.view(size[0], *size[2:], size[1]).movedim(-1, 1).contiguous()


def _ends_in_zero(tensor: Tensor) -> bool:
    """Whether the lowest byte of all float32 values is 0."""
    return not bool((tensor.view(torch.int32) & 0xFF).any())


def _weight_bits(instructions: Any) -> dict[str, int]:
    """Bits of every weight, by the tensor's name."""
    return {
        f"{i.output.name}.weight": i.weight_bits
        for i in instructions
        if isinstance(i, (Conv, Linear))
    }


def _fields(value: Any, names: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != names:
        raise ValueError(f"the manifest lacks one of {sorted(names)} or has other keys")
    return value


def _parse(value: Any, hint: Any, where: str) -> Any:
    """Convert ``value`` from JSON to the type ``hint`` with strict type checks.

    Raises:
        ValueError: If it has another type; the message names ``where``.
    """
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        (wanted,) = (part for part in get_args(hint) if part is not type(None))
        return None if value is None else _parse(value, wanted, where)
    if origin is tuple and isinstance(value, list):
        parts = get_args(hint)
        if len(parts) == 2 and parts[1] is Ellipsis:
            return tuple(_parse(item, parts[0], where) for item in value)
        if len(parts) == len(value):
            return tuple(_parse(v, part, where) for v, part in zip(value, parts, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {str(k): _parse(v, get_args(hint)[1], where) for k, v in value.items()}
    elif is_dataclass(hint):
        hints = get_type_hints(hint)
        given = _fields(value, {field.name for field in fields(hint)})
        build: Any = hint
        return build(**{name: _parse(v, hints[name], name) for name, v in given.items()})
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif type(value) is hint and not (hint is int and not -(2**31) < value < 2**31):
        return value
    raise ValueError(f"{where} is {str(value)[:40]}")


def stored_bytes(program: IntegerProgram) -> list[tuple[str, int, int, int]]:
    """List name, bits, weight count, and bytes with scale and shift of each layer."""
    rows = []
    for name, bits in _weight_bits(program.instructions).items():
        layer = name.removesuffix(".weight")
        weight = program.tensors[name]
        size = weight.shape[0] * ((weight[0].numel() * bits + 7) // 8)
        for part in ("scale", "shift"):
            tensor = program.tensors[f"{layer}.{part}"]
            size += tensor.numel() * (3 if _ends_in_zero(tensor) else 4)
        rows.append((layer, bits, weight.numel(), size))
    return rows
