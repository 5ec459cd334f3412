"""Transfer of weights between the same networks of different libraries.

The libraries name and order layers differently. No table of names is needed. Both networks run on
the same image, and each layer of one is paired with the layer of the other that has the same weight
shape and the same input. For this run, the network of the file gets random weights, so that no two
inputs are equal by chance. Each pair gets the same weights before the next layer runs. If all
layers are paired and the logits are equal, both networks compute the same function, and the weights
can be copied from layer to layer. Otherwise an error names the first difference.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import UsageError

__all__ = ["relatives", "translate"]


def _families() -> list[tuple[str, ...]]:
    """Groups of networks with the same layers, judging by their weights."""
    families: list[tuple[str, ...]] = [
        ("timm:mobilenetv1_100", "pytorchcv:mobilenet_w1"),
        ("torchvision:regnet_x_400mf", "timm:regnetx_004_tv"),
        ("torchvision:mobilenet_v2", "timm:mobilenetv2_100", "pytorchcv:mobilenetv2b_w1"),
    ]
    for depth in (18, 34):
        name = f"resnet{depth}"
        families.append((f"torchvision:{name}", f"timm:{name}", f"pytorchcv:{name}"))
    for depth in (50, 101, 152):
        # pytorchcv's names without b have the stride in the 1x1 convolution.
        name = f"resnet{depth}"
        families.append(
            (f"torchvision:{name}", f"timm:{name}", f"pytorchcv:{name}b", f"pytorchcv:{name}")
        )
    sizes = {
        "002": None,
        "004": None,  # torchvision's network has other widths
        "006": None,
        "008": "800mf",
        "016": "1_6gf",
        "032": "3_2gf",
        "040": None,
        "064": None,
        "080": "8gf",
        "120": None,
        "160": "16gf",
        "320": "32gf",
    }
    for size, name_there in sizes.items():
        family = (f"timm:regnetx_{size}", f"pytorchcv:regnetx{size}")
        families.append((f"torchvision:regnet_x_{name_there}", *family) if name_there else family)
    return families


def relatives(spec: str) -> tuple[str, ...]:
    """Return the networks of other libraries whose weights may fit the network ``spec``."""
    name = spec.partition(".")[0]  # a tag of timm names weights, not a network
    for family in _families():
        if name in family:
            return tuple(other for other in family if other != name)
    return ()


@dataclass
class _Layer:
    """A call of a layer with weights.

    Attributes:
        name: Qualified name.
        module: Convolution, linear layer or batch normalisation.
        input: Input of the call.
        before: Types of the modules without weights that ran since the previous layer.
    """

    name: str
    module: nn.Module
    input: Tensor
    before: tuple[str, ...]

    @property
    def form(self) -> tuple[Any, ...]:
        """Properties that a pair shares; a 1x1 convolution may match a linear layer."""
        if isinstance(self.module, _BatchNorm):
            return ("normalisation", self.module.num_features)
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        positions = weight[0, 0].numel()
        kernel = tuple(weight.shape[2:]) if positions > 1 else ()
        return ("product", *weight.shape[:2], *kernel)


@dataclass
class _Walk:
    """Runs a network and calls a function before each layer."""

    network: nn.Module
    before: list[str] = field(default_factory=list)

    def run(self, images: Tensor, visit: Any) -> Tensor:
        """Compute the logits; ``visit(layer)`` runs before each layer and may set its weights."""
        handles = []
        for name, module in self.network.named_modules():
            if isinstance(module, (_ConvNd, nn.Linear, _BatchNorm)):
                hook = self._layer_hook(name, visit)
            elif not any(True for _ in module.children()):
                hook = self._note
            else:
                continue
            handles.append(module.register_forward_pre_hook(hook))
        try:
            with torch.no_grad():
                logits = self.network(images)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(logits, Tensor):
            raise TypeError(f"{type(self.network).__name__} returns {type(logits).__name__}")
        return logits

    def _note(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not isinstance(module, (nn.Identity, nn.Dropout, nn.Flatten)):
            self.before.append(type(module).__name__)

    def _layer_hook(self, name: str, visit: Any) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            layer = _Layer(name, module, inputs[0].clone(), tuple(self.before))
            self.before.clear()
            visit(layer)

        return hook


def _draw_weights(layer: _Layer, random: torch.Generator) -> None:
    """Draw weights that keep values near 1, and sometimes above 6 to reveal a ReLU6."""

    def uniform(shape: Any, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=random)

    module: Any = layer.module
    if isinstance(layer.module, _BatchNorm):
        axes = [axis for axis in range(layer.input.ndim) if axis != 1]
        shape = module.running_mean.shape
        module.running_mean.copy_(layer.input.mean(axes) + uniform(shape, -0.5, 0.5))
        variance = layer.input.var(axes, unbiased=False) + 0.05
        module.running_var.copy_(variance * uniform(shape, 0.5, 2.0))
        if module.weight is not None:
            module.weight.copy_(uniform(shape, 0.5, 3.0))
            module.bias.copy_(uniform(shape, -1.0, 3.0))
        return
    spread = module.weight[0].numel() ** -0.5
    module.weight.copy_(torch.randn(module.weight.shape, generator=random) * spread)
    if module.bias is not None:
        module.bias.copy_(uniform(module.bias.shape, -0.5, 0.5))


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two inputs are equal: bit-identical for feature maps.

    Vectors have a tolerance, because the libraries sum the mean over positions in other orders.
    """
    if one.ndim == 4 and one.shape[2:].numel() > 1:
        return torch.equal(one, two)
    if one.numel() != two.numel():
        return False
    scale = float(one.abs().max())
    return float((one.flatten() - two.flatten()).abs().max()) <= 1e-5 * scale


_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode", "eps")


def _other_setting(theirs: _Layer, ours: _Layer) -> str | None:
    """Describe a setting in which two layers of the same type differ."""
    if isinstance(theirs.module, type(ours.module)) or isinstance(ours.module, type(theirs.module)):
        for setting in _SETTINGS:
            left, right = (getattr(layer.module, setting, None) for layer in (theirs, ours))
            if left != right:
                return f"{setting} {left} at {theirs.name} where {ours.name} has {right}"
    return None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module without those of its children."""
    kept = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in kept.items() if tensor is not None}


def _pair_layers(
    source: nn.Module, target: nn.Module, image_size: int, title: str
) -> dict[str, str]:
    """Map the names of the target's layers to those of the source."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn((1, 3, image_size, image_size), generator=random)
    waiting: list[_Layer] = []

    def see(layer: _Layer) -> None:
        if any(other.module is layer.module for other in waiting):
            raise UsageError(f"{title}, got {layer.name}, which is used more than once")
        _draw_weights(layer, random)
        waiting.append(layer)

    expected = _Walk(copy.deepcopy(source).eval()).run(images, see)
    pairs: dict[str, str] = {}

    def pair(layer: _Layer) -> None:
        alike = [other for other in waiting if other.form == layer.form]
        if not alike:
            raise UsageError(f"{title}, got no layer with weights like those of {layer.name}")
        fitting = [other for other in alike if _same(other.input, layer.input)]
        if not fitting:
            left, right = (" ".join(x.before) or "nothing" for x in (alike[0], layer))
            why = "" if left == right else f" ({left} against {right} before it)"
            raise UsageError(
                f"{title}, got another input of {alike[0].name} than of {layer.name}{why}"
            )
        alike = [other for other in fitting if _other_setting(other, layer) is None]
        if not alike:
            raise UsageError(f"{title}, got {_other_setting(fitting[0], layer)}")
        # If several layers fit, the logits show whether the first was right.
        found = alike[0]
        waiting.remove(found)
        pairs[layer.name] = found.name
        theirs = _tensors(found.module)
        for name, tensor in _tensors(layer.module).items():
            tensor.copy_(_fitted(theirs, name, tensor, f"{title}, got {found.name}"))
        unused = theirs.keys() - _tensors(layer.module).keys()
        if unused:
            raise UsageError(f"{title}, got a {min(unused)} at {found.name}, not at {layer.name}")

    result = _Walk(copy.deepcopy(target).eval()).run(images, pair)
    if waiting:
        raise UsageError(f"{title}, got the additional layer {waiting[0].name}")
    if result.shape != expected.shape or not _same(result, expected):
        raise UsageError(f"{title}, got other logits after the last layer")
    return pairs


def _fitted(theirs: dict[str, Tensor], name: str, like: Tensor, subject: str) -> Tensor:
    if name in theirs:
        return theirs[name].reshape(like.shape)
    if name == "bias":  # no bias equals a bias of zero
        return torch.zeros_like(like)
    if name == "num_batches_tracked":  # unused in evaluation mode
        return like
    raise UsageError(f"{subject} without {name}")


def translate(
    state: dict[str, Tensor],
    source: nn.Module,
    target: nn.Module,
    *,
    names: tuple[str, str],
    image_size: int = 224,
) -> dict[str, Tensor]:
    """Rename the weights of ``source`` for ``target``, if both networks compute the same function.

    Args:
        state: Tensors of ``source.state_dict()``.
        source: Network that the weights are from; its own weights have no effect.
        target: Network that the weights are for; its own weights have no effect.
        names: Names of the two networks in error messages.
        image_size: Size of the random image on which they are compared.

    Returns:
        Tensors with the names and shapes of ``target.state_dict()``.

    Raises:
        UsageError: If the networks compute different results. The message names the first
            difference.
    """
    title = f"model: expected {names[0]} and {names[1]} to be the same network"
    try:
        pairs = _pair_layers(source, target, image_size, title)
    except (RuntimeError, TypeError, AssertionError) as error:  # usually a wrong image size
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{title} on images of {image_size}, got {type(error).__name__} ({reason})"
        ) from None
    own = target.state_dict()
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for layer, origin in pairs.items():
        prefix = f"{origin}."
        theirs = {
            key[len(prefix) :]: tensor
            for key, tensor in state.items()
            if key.startswith(prefix) and "." not in key[len(prefix) :]
        }
        used |= {prefix + name for name in theirs}
        for name in _tensors(target.get_submodule(layer)):
            key = f"{layer}.{name}"
            if key in own:
                result[key] = _fitted(theirs, name, own[key], f"{title}, got {origin}")
    for tensors, done, whose in ((own, result.keys(), names[1]), (state, used, names[0])):
        rest = sorted(tensors.keys() - done)
        if rest:
            raise UsageError(f"{title}, got {rest[0]} of {whose}, which belongs to no layer")
    return result
