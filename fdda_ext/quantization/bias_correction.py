"""Bias correction: the mean of every layer's output stays that of the float network.

Quantization changes the weights of a filter by errors e. If an input has a mean m that is not 0, as
after a ReLU, the mean of the output changes by the sum of e m. This can be much larger than the
noise that the errors cause. The correction subtracts the change from the bias, which costs nothing
at inference (Nagel et al., ICCV 2019, section 4.2, with images instead of the statistics of batch
normalisation).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from .layers import QuantizedConv2d, QuantizedLinear
from .student import float_copy

__all__ = ["correct_biases_"]

#: Pixels of all images together. Activations of both networks must fit into memory.
_PIXELS = 64 * 224 * 224


@torch.no_grad()
def correct_biases_(student: GraphModule, images: Tensor) -> None:
    """Correct the biases of ``student``, in place and in the order of execution.

    So the correction of a layer includes the effect of all layers and activations before it. If a
    normalisation follows a layer, its bias is corrected instead. A layer that has neither stays as
    it is.

    Args:
        student: Network from `fdda_ext.quantization.prepare`, with ranges.
        images: Normalised images ``[n, C, H, W]``. At most 3.2 million pixels are used, of images
            at equal distances, but at least 16 images.

    Raises:
        UsageError: If there is no image.
    """
    if images.dim() != 4 or not len(images):
        raise UsageError(
            "correct_biases_: expected at least one image in images [n, C, H, W], "
            f"got shape {tuple(images.shape)}"
        )
    count = max(_PIXELS // images[0, 0].numel(), 16)
    if count < len(images):
        images = images[torch.arange(count, device=images.device) * len(images) // count]
    modules = dict(student.named_modules())
    reference = float_copy(student)
    runs = Interpreter(student), Interpreter(reference)
    for nodes in zip(student.graph.nodes, reference.graph.nodes, strict=True):
        for run, node in zip(runs, nodes, strict=True):
            run.env[node] = images if node.op == "placeholder" else run.run_node(node)
        module = modules.get(str(nodes[0].target)) if nodes[0].op == "call_module" else None
        if module is not None and _corrects(nodes[0], module, modules):
            found, expected = (run.env[node] for run, node in zip(runs, nodes, strict=True))
            error = (found - expected).transpose(0, 1).flatten(1).mean(1)  # [C]
            _shift_result_(module, error)
            runs[0].env[nodes[0]] = found - error.view(-1, *[1] * (found.dim() - 2))
        for run, node in zip(runs, nodes, strict=True):
            for used in run.user_to_last_uses.get(node, []):
                del run.env[used]


def _corrects(node: Node, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """Return whether the bias of ``module`` is corrected."""
    if isinstance(module, _BatchNorm):
        return True
    if not isinstance(module, (QuantizedConv2d, QuantizedLinear)) or module.bias is None:
        return False
    return not any(isinstance(modules.get(str(user.target)), _BatchNorm) for user in node.users)


def _shift_result_(module: nn.Module, error: Tensor) -> None:
    """Subtract ``error [C]`` from the result of ``module``."""
    if isinstance(module.bias, Tensor):
        module.bias.sub_(error)
        return
    assert isinstance(module, _BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
    module.running_mean.add_(error * (module.running_var + module.eps).sqrt())
