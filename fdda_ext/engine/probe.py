"""Checks of a network's inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..image_size import ImageSize, height_and_width, show_image_size, to_image_size
from ..preprocessing import CHANNELS

__all__ = ["check_logits", "check_one_input", "count_outputs", "input_channels"]

#: Exceptions that networks raise for images that they cannot take.
_MISFITS = (RuntimeError, AssertionError, ValueError, TypeError, IndexError)


class _ReachedError(Exception):
    """The first convolution is about to run."""

    def __init__(self, layer: nn.Conv2d, channels: int) -> None:
        super().__init__()
        self.layer = layer
        self.channels = channels


def check_one_input(network: nn.Module, command: str) -> None:
    """Refuse a network whose ``forward`` does not work with one tensor of images alone.

    Raises:
        UsageError: If ``forward`` takes no tensor or needs more arguments.
    """
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):  # for example of a scripted module
        return
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        p for p in parameters
        if p.default is inspect.Parameter.empty
        and p.kind in (*positional, inspect.Parameter.KEYWORD_ONLY)
    ]  # fmt: skip
    takes_one = any(
        p.kind in (*positional, inspect.Parameter.VAR_POSITIONAL) for p in parameters
    ) and (not needed or (len(needed) == 1 and needed[0].kind in positional))
    if not takes_one:
        names = ", ".join(p.name for p in needed)
        raise UsageError(
            f"{command}: expected model to take one image tensor, got forward({names}) with "
            f"{len(needed)} input{'' if len(needed) == 1 else 's'}; wrap it in a module that takes "
            "only images"
        )


@torch.no_grad()
def input_channels(network: nn.Module, image_size: ImageSize, command: str) -> int:
    """Return the number of image channels that ``network`` takes, from its first convolution.

    Args:
        network: The network, which runs on black RGB images up to its first convolution.
        image_size: Size of these images.
        command: Name at the beginning of errors.

    Raises:
        UsageError: If the network takes several inputs, or images other than gray, RGB or RGBA.
    """
    check_one_input(network, command)

    def stop(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        raise _ReachedError(layer, inputs[0].shape[1])

    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(stop) for layer in convolutions]
    parameter = next(network.parameters(), torch.empty(0))
    images = torch.zeros(1, 3, *height_and_width(image_size), device=parameter.device)
    was_training = network.training
    channels = 3
    try:
        network.eval()(images)
    except _ReachedError as reached:
        if reached.channels == 3:  # earlier layers have not rearranged them
            channels = reached.layer.in_channels
    except _MISFITS:  # before any convolution, for example in a normalisation of the images
        if convolutions:
            channels = convolutions[0].in_channels
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    if channels not in CHANNELS:
        raise UsageError(
            f"{command}: expected model to take images of 1 (gray), 3 (RGB) or 4 (RGBA) channels, "
            f"got a first convolution with {channels}"
        )
    return channels


@torch.no_grad()
def count_outputs(network: nn.Module, images: Tensor, command: str) -> int:
    """Return the number of logits that ``network`` gives for ``images [N, C, H, W]``.

    Raises:
        UsageError: If the network takes several inputs, cannot take images of this size, or gives
            anything but one tensor of logits.
    """
    check_one_input(network, command)
    size = show_image_size(to_image_size(*images.shape[-2:]))
    try:
        logits = network.eval()(images)
    except _MISFITS as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{command}: expected image_size that the model can take, got {size} ({reason})"
        ) from None
    return check_logits(logits, len(images), command)


def check_logits(result: object, images: int, command: str) -> int:
    """Return the number of classes K in a network's output for ``images`` images.

    Raises:
        UsageError: If ``result`` is not one tensor ``[images, K]``.
    """
    if isinstance(result, Tensor) and result.dim() == 2 and len(result) == images:
        return int(result.shape[1])
    got = type(result).__name__
    if isinstance(result, Tensor):
        got = f"one of shape {list(result.shape)} for {images} image{'' if images == 1 else 's'}"
    elif isinstance(result, (Sequence, Mapping)):
        names = f": {', '.join(map(str, result))}" if isinstance(result, Mapping) else ""
        got = f"{len(result)} outputs ({got}{names})"
    raise UsageError(
        f"{command}: expected model to give one tensor of logits [N, classes], got {got}; "
        "wrap it in a module that gives only the logits"
    )
