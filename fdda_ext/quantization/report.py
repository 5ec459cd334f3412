"""Table of the bits of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from ..errors import UsageError
from .layers import QuantizedConv2d, QuantizedLinear
from .operations import GRID_PRESERVING, operation, tensor_inputs
from .quantizer import ActivationQuantizer

__all__ = ["LayerBits", "bits_table", "render_bits"]


@dataclass(frozen=True)
class LayerBits:
    """Bits of one convolution or linear layer.

    Attributes:
        name: Qualified name.
        kind: Type, such as "conv 3x3 /2", "conv 3x3 groups 8", "depthwise 3x3", "linear".
        weight_shape: ``[C_out, C_in / groups, kH, kW]`` or ``[out, in]``.
        weight_bits: Bits of the weight.
        input: Name of the input tensor in the graph; its quantizer has the same name.
        input_bits: Bits of the input; None for float.
        input_signed: Whether the input can be negative; None for float.
        output: Tensor at which the result is quantized, after normalisation, addition and
            activation, or the reason why it stays in float.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    weight_bits: int
    input: str
    input_bits: int | None
    input_signed: bool | None
    output: str


def bits_table(student: GraphModule) -> list[LayerBits]:
    """Return a row for each convolution and linear layer of ``student``, in order of execution."""
    if not isinstance(student, GraphModule):
        raise UsageError(
            "bits_table: expected student to be a network from prepare, "
            f"got {type(student).__name__}"
        )
    modules = dict(student.named_modules())
    rows = []
    for node in student.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, (QuantizedConv2d, QuantizedLinear)):
            continue
        source, quantizer = _origin(tensor_inputs(node)[0], modules)
        rows.append(
            LayerBits(
                name=str(node.target),
                kind=_kind(layer),
                weight_shape=tuple(layer.weight.shape),
                weight_bits=layer.weight_quantizer.grid.bits,
                input=source,
                input_bits=quantizer.grid.bits if quantizer else None,
                input_signed=quantizer.signed if quantizer else None,
                output="; ".join(_destinations(node, modules)),
            )
        )
    return rows


def render_bits(rows: Sequence[LayerBits]) -> str:
    """Return ``rows`` as a text table."""
    header = ("layer", "type", "weight", "bits", "input", "bits", "output")
    lines = [header] + [
        (
            row.name,
            row.kind,
            "x".join(map(str, row.weight_shape)),
            str(row.weight_bits),
            row.input,
            _grid(row.input_bits, row.input_signed),
            row.output,
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    text.append("")
    text.append("Biases, batch normalisation and the network's output are in float.")
    return "\n".join(text)


def _grid(bits: int | None, signed: bool | None) -> str:
    return "float" if bits is None else f"{bits} {'signed' if signed else 'unsigned'}"


def _kind(layer: nn.Conv2d | nn.Linear) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    depthwise = layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels
    words = [
        "depthwise" if depthwise else "conv",
        "x".join(map(str, layer.kernel_size)),
    ]
    if layer.stride != (1, 1):
        same = layer.stride[0] == layer.stride[1]
        words.append("/" + "x".join(map(str, layer.stride[:1] if same else layer.stride)))
    if layer.groups > 1 and not depthwise:
        words.append(f"groups {layer.groups}")
    return " ".join(words)


def _origin(node: Node, modules: dict[str, nn.Module]) -> tuple[str, ActivationQuantizer | None]:
    """Name of the tensor that ``node`` takes its values from, and its quantizer."""
    kind = operation(node, modules)
    while kind in GRID_PRESERVING and kind != "quantizer":
        node = tensor_inputs(node)[0]
        kind = operation(node, modules)
    if kind != "quantizer":
        return node.name, None
    quantizer = modules[str(node.target)]
    assert isinstance(quantizer, ActivationQuantizer)
    return tensor_inputs(node)[0].name, quantizer


def _destinations(node: Node, modules: dict[str, nn.Module]) -> list[str]:
    """Return where the values of ``node`` are quantized, and one place where they stay in float."""
    found: dict[str, None] = {}
    for user in node.users:
        kind = operation(user, modules)
        if kind == "quantizer":
            name, quantizer = _origin(user, modules)
            assert quantizer is not None
            found[f"{name} {_grid(quantizer.grid.bits, quantizer.signed)}"] = None
        elif kind == "output":
            found["float (output)"] = None
        elif _is_second_operand(node, user, modules):
            found[f"float, into {user.name}"] = None
        elif kind in ("conv", "linear"):
            found[f"float, into {user.target}"] = None
        else:
            found.update(dict.fromkeys(_destinations(user, modules)))
    in_float = [name for name in found if name.startswith("float")]
    return [name for name in found if name not in in_float[1:]]


def _is_second_operand(node: Node, user: Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether ``user`` combines ``node`` with an earlier operand that is also in float.

    The kernel of the first operand's layer computes the sum, so ``node`` is stored in float.
    """
    operands = tensor_inputs(user)
    if len(operands) < 2 or operation(user, modules) == "cat" or operands[0] is node:
        return False
    return _origin(operands[0], modules)[1] is None
