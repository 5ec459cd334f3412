"""BN statistics measured again through the quantized network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from ..quantization.operations import tensor_inputs
from .cache import BATCH
from .reconstruct import values_of

__all__ = ["retune_norms"]


@torch.no_grad()
def retune_norms(student: GraphModule, reference: GraphModule, images: Tensor) -> None:
    """Set the statistics of every normalisation to those of its current input (AdaQuant).

    The normalisations change one after another, so each sees the changes before it. Scale and shift
    become those of the float network again. A learned shift compensates for a mean that is now
    measured, so it would count twice.

    Args:
        student: Student whose parameters do not require gradients.
        reference: Float network on the same graph, from `float_copy`.
        images: Calibration images ``[n, C, H, W]``. All of them pass through the network for every
            normalisation.
    """
    modules = dict(student.named_modules())
    for node in student.graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, _BatchNorm):
            continue
        assert norm.running_mean is not None
        assert norm.running_var is not None
        original = reference.get_submodule(str(node.target))
        norm.load_state_dict(
            {**norm.state_dict(), **dict(original.named_parameters(recurse=False))}
        )
        before = values_of(student, [tensor_inputs(node)[0].name])
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in images.split(BATCH):
            with torch.enable_grad():  # without gradients, a layer would include its normalisation
                (values,) = before(batch)
            rows = values.double().transpose(0, 1).flatten(1)  # [C, *]
            count, total, squares = (
                count + rows.shape[1],
                total.to(rows) + rows.sum(1),
                squares.to(rows) + rows.square().sum(1),
            )
        mean = total / count
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((squares - count * mean.square()) / max(count - 1, 1))
