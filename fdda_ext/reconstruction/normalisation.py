"""Statistics of batch normalisation, measured again through the quantized network."""

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
    """Give every normalisation the statistics of what enters it now (AdaQuant).

    One after another, so that each sees what those before it have changed. Scale and shift become
    those of the float network again: a shift that was learned stood for a mean that is measured
    now, and would count twice.

    Args:
        student: Its parameters want no gradients.
        reference: The float network on the same graph, from `float_copy`.
        images: Calibration images ``[n, C, H, W]``, all of which are passed through for every
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
