"""Networks by source and name, and weights from the package, a library or the user's file."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .._torchvision import import_torchvision
from ..errors import UsageError
from .glyph_networks import GlyphMobileNet, GlyphResNet

__all__ = ["EMBEDDED", "load_model", "load_weights"]

#: Networks with weights in this package, trained on ``glyphs``.
EMBEDDED: dict[str, Callable[[int], nn.Module]] = {
    "glyphs_resnet": GlyphResNet,
    "glyphs_mobilenet": GlyphMobileNet,
}
_SOURCES = ("torchvision", "timm", "pytorchcv")


def load_model(
    spec: str, *, weights: str | None = "default", num_classes: int | None = None
) -> nn.Module:
    """Build a network in evaluation mode.

    Args:
        spec: ``glyphs_resnet``, ``glyphs_mobilenet``, ``torchvision:NAME``, ``timm:NAME`` or
            ``pytorchcv:NAME``.
        weights: "default" for trained ones (shipped, or the library's own download), "none" or
            None for random ones, or a file: safetensors, or a torch file of plain tensors.
        num_classes: Outputs; None for those of the weights.

    Returns:
        The network, from images ``[N, 3, H, W]`` to logits ``[N, num_classes]``.

    Raises:
        UsageError: If there is no such network or file, or they do not fit.
    """
    path = None if weights in (None, "none", "default") else Path(str(weights))
    if path is not None and not path.is_file():
        raise UsageError(f"model: expected weights to be default, none or a file, got {weights}")
    source, _, name = spec.partition(":")
    if spec in EMBEDDED:
        network = _embedded(spec, num_classes, trained=weights == "default")
    elif source in _SOURCES and name:
        network = _from_library(source, name, num_classes, trained=weights == "default")
    else:
        names = (*EMBEDDED, *(f"{source}:NAME" for source in _SOURCES))
        close = difflib.get_close_matches(spec, EMBEDDED, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"model: expected one of {', '.join(names)}, got {spec}{hint}")
    if path is not None:
        load_weights(network, path)
    return network.eval()


def _embedded(name: str, num_classes: int | None, *, trained: bool) -> nn.Module:
    if not trained:
        if num_classes is None:
            raise UsageError(
                f"model: expected num_classes for {name} without its weights, got none"
            )
        return EMBEDDED[name](num_classes)
    path = Path(str(files("fdda_ext") / "models" / "weights" / f"{name}.safetensors"))
    state = load_file(path)
    stored_classes = _outputs(state)
    if num_classes is not None and num_classes != stored_classes:
        raise UsageError(
            f"model: expected data of the {stored_classes} classes that the weights of {name} were "
            f"trained on, got {num_classes}; train others with python -m fdda_ext.pretrain"
        )
    network = EMBEDDED[name](stored_classes)
    network.load_state_dict(state)
    return network


def _outputs(state: dict[str, Tensor]) -> int:
    """Number of classes: rows of the only matrix."""
    (matrix,) = (tensor for tensor in state.values() if tensor.ndim == 2)
    return int(matrix.shape[0])


def _from_library(source: str, name: str, num_classes: int | None, *, trained: bool) -> nn.Module:
    classes: dict[str, Any] = {}
    if num_classes is not None and not trained:
        classes["num_classes"] = num_classes
    build: Callable[..., nn.Module]
    known: list[str]
    if source == "torchvision":
        models = import_torchvision().models
        known = models.list_models(module=models)
        build = lambda: models.get_model(  # noqa: E731
            name, weights="DEFAULT" if trained else None, **classes
        )
    elif find_spec(source) is None:
        raise UsageError(
            f"model: expected the package {source} to be installed, got none; "
            f"pip install --no-deps {source}"
        )
    elif source == "timm":
        import_torchvision()  # timm and pytorchcv import it, and it may need its help
        import timm

        known = timm.list_models()
        build = lambda: timm.create_model(name, pretrained=trained, **classes)  # noqa: E731
    else:
        import_torchvision()
        from pytorchcv.model_provider import _models, get_model

        known = list(_models)
        build = lambda: get_model(name, pretrained=trained, **classes)  # noqa: E731
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"model: expected a network that {source} has, got {name}{hint}")
    try:
        return build()
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"model: expected {source}:{name} to be built, got {type(error).__name__} "
            f"({reason}); without a network connection give --weights FILE"
        ) from None


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill ``network`` from a file of the user's, without running anything the file may hold.

    Args:
        network: With the parameters the file has, under the same names.
        path: safetensors, or a torch file of tensors (read with ``weights_only``), possibly below
            a key ``state_dict`` or ``model`` and with the prefix ``module.``.

    Raises:
        UsageError: If the file is damaged, holds other things than tensors, or does not fit.
    """
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError):
        state = _torch_file(path)
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    own = network.state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = sorted(own.keys() - state.keys() - counters)
    unknown = sorted(state.keys() - own.keys())
    if missing or unknown:
        what = f"no {missing[0]}" if missing else f"the unknown {unknown[0]}"
        raise UsageError(
            f"model: expected weights with the network's {len(own)} tensors, got {path} with {what}"
        )
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            raise UsageError(
                f"model: expected {key} of shape {tuple(own[key].shape)}, "
                f"got {tuple(tensor.shape)} in {path}"
            )
        if own[key].is_floating_point() and not tensor.is_floating_point():
            raise UsageError(
                f"model: expected {key} of floating point, got {tensor.dtype} in {path}"
            )
        # In float32: not every narrow type can be asked, and a float64 may overflow.
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise UsageError(
                f"model: expected weights finite in float32, got NaN or infinity in {key} of {path}"
            )
        if key.endswith("running_var") and bool((tensor < 0).any()):
            raise UsageError(
                f"model: expected {key} at least 0, got {float(tensor.min()):.3g} in {path}"
            )
    network.load_state_dict(state, strict=False)


def _torch_file(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"model: expected weights to be a file of tensors alone, got {path}, "
            "which is damaged or holds code and was not run"
        ) from None
    except Exception as error:  # a damaged file makes the reader stumble in a dozen ways
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            "model: expected weights to be a whole safetensors or torch file, "
            f"got {path} ({reason})"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(key, str)
        and isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_meta
        for key, tensor in state.items()
    ):
        raise UsageError(f"model: expected weights to be named tensors, got other things in {path}")
    return state
