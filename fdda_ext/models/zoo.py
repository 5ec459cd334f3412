"""Networks by source and name, and weights from the package, a library or the user's file."""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
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
from ..preprocessing import Preprocessing
from .glyph_networks import GlyphMobileNet, GlyphResNet
from .layouts import relatives, translate

__all__ = ["EMBEDDED", "TrainedNetwork", "load_model", "load_weights", "open_model"]

#: Networks with weights in this package, trained on ``glyphs``.
EMBEDDED: dict[str, Callable[[int], nn.Module]] = {
    "glyphs_resnet": GlyphResNet,
    "glyphs_mobilenet": GlyphMobileNet,
}
_log = logging.getLogger("fdda_ext")

_SOURCES = ("torchvision", "timm", "pytorchcv")
#: Before the name of what builds a network of the user's.
_OWN = "module"
_NAMED_FILE = re.compile(rf"(order|(?:{'|'.join(_SOURCES)}):[^=/]+)=(.+)")


@dataclass(frozen=True)
class TrainedNetwork:
    """A network and what its weights say about themselves.

    Attributes:
        network: In evaluation mode, from images ``[N, 3, H, W]`` to logits ``[N, K]``.
        preprocessing: What the weights were trained for, of images from files.
        origin: Where the weights are from, in words.
    """

    network: nn.Module
    preprocessing: Preprocessing
    origin: str


def load_model(
    spec: str, *, weights: str | None = "default", num_classes: int | None = None
) -> nn.Module:
    """Build a network in evaluation mode; arguments, result and errors are `open_model`'s."""
    return open_model(spec, weights=weights, num_classes=num_classes).network


def open_model(
    spec: str, *, weights: str | None = "default", num_classes: int | None = None
) -> TrainedNetwork:
    """Build a network, fill it with weights, and say how these want their images.

    Args:
        spec: ``glyphs_resnet``, ``glyphs_mobilenet``, ``torchvision:NAME``, ``timm:NAME`` (a tag
            may follow: ``timm:resnet50.tv_in1k``), ``pytorchcv:NAME``, or ``module:NAME.CLASS``:
            what the module NAME on Python's path calls CLASS, given ``num_classes=K``.
        weights: "default" for trained ones (shipped, or the library's own download and cache);
            "none" or None for random ones; a name such as ``IMAGENET1K_V1`` that torchvision has
            for the network; or a file: safetensors, or a torch file of plain tensors. A file that
            was saved from the same network of another library is recognised by its names; where
            they leave a choice, ``SPEC=FILE`` names the network it was saved from. ``order=FILE``
            is for files of other origin: it goes by the order of the tensors, whatever their
            names, and the user vouches that the networks compute the same.
        num_classes: Outputs; None for those of the weights.

    Raises:
        UsageError: If there is no such network or file, or they do not fit.
    """
    library, _, name = spec.partition(":")
    if spec not in EMBEDDED and (library not in (*_SOURCES, _OWN) or not name):
        libraries = (f"{library}:NAME" for library in _SOURCES)
        names = (*EMBEDDED, *libraries, f"{_OWN}:NAME.CLASS")
        close = difflib.get_close_matches(spec, EMBEDDED, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"model: expected one of {', '.join(names)}, got {spec}{hint}")
    chosen = "none" if weights is None else weights
    if chosen == "none" or (chosen == "default" and spec in EMBEDDED):
        network = _build(spec, num_classes, None if chosen == "none" else chosen)
        return TrainedNetwork(network.eval(), _preprocessing(spec, network), chosen)
    if chosen == "default" and library == _OWN:
        raise UsageError(f"model: expected weights of {spec} to be a file or none, got default")
    if chosen == "default" or _is_torchvision_weights(spec, chosen):
        network = _build(spec, num_classes, chosen)
        preprocessing = _preprocessing(spec, network, chosen)
        return TrainedNetwork(network.eval(), preprocessing, f"{library}'s {chosen}")

    named = _NAMED_FILE.fullmatch(chosen)
    path = Path(named[2] if named else chosen)
    if not path.is_file():
        raise UsageError(f"model: expected weights to be default, none or a file, got {weights}")
    network = _build(spec, num_classes, None)
    state = _read_weights(path)
    if named is not None and named[1] == "order":
        _fill(network, _in_order(network, state, path), path)
        preprocessing = _preprocessing(spec, network, path.name)
        return TrainedNetwork(network.eval(), preprocessing, f"{path}, by order")
    if (named is None or named[1] == spec) and _misfit(network, state) is None:
        _fill(network, state, path)
        return TrainedNetwork(network.eval(), _preprocessing(spec, network, path.name), str(path))
    origin = named[1] if named else _origin(spec, network, state, num_classes, path)
    source = _build(origin, num_classes, None)
    misfit = _misfit(source, state)
    if misfit is not None:
        raise UsageError(f"model: expected weights of {origin}, got {path} with {misfit}")
    preprocessing = _preprocessing(origin, source, path.name)
    # pytorchcv's networks pool over a fixed window and take images of one size only.
    size = preprocessing.short_side
    state = translate(state, source, network, names=(origin, spec), image_size=size)
    _fill(network, state, path)
    return TrainedNetwork(network.eval(), preprocessing, f"{path}, saved from {origin}")


def _build(spec: str, num_classes: int | None, weights: str | None) -> nn.Module:
    """The network; ``weights`` None for random ones."""
    if spec in EMBEDDED:
        return _embedded(spec, num_classes, trained=weights == "default")
    library, _, name = spec.partition(":")
    if library == _OWN:
        return _own(name, num_classes)
    return _from_library(library, name, num_classes, weights)


def _own(name: str, num_classes: int | None) -> nn.Module:
    """What ``MODULE.CLASS`` makes, for so many classes."""
    spec = f"{_OWN}:{name}"
    if num_classes is None:
        raise UsageError(f"model: expected num_classes for {spec}, got none")
    module, _, attribute = name.rpartition(".")
    try:
        build = getattr(importlib.import_module(module), attribute)
        network = build(num_classes=num_classes)
    except Exception as error:  # whatever the user's code may raise
        reason = f"{type(error).__name__} ({' '.join(str(error).split())[:200]})"
        raise UsageError(
            f"model: expected {spec} to be a class, or a function, on Python's path that makes a "
            f"network when called with num_classes={num_classes}, got {reason}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"model: expected {spec} to make a torch.nn.Module, got {type(network).__name__}"
        )
    return network


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


def _from_library(
    library: str, name: str, num_classes: int | None, weights: str | None
) -> nn.Module:
    trained = weights is not None
    classes: dict[str, Any] = {}
    if num_classes is not None and not trained:
        classes["num_classes"] = num_classes
    build: Callable[..., nn.Module]
    known: list[str]
    if library == "torchvision":
        models = import_torchvision().models
        known = models.list_models(module=models)
        which = "DEFAULT" if weights == "default" else weights
        build = lambda: models.get_model(name, weights=which, **classes)  # noqa: E731
    elif find_spec(library) is None:
        raise UsageError(
            f"model: expected the package {library} to be installed, got none; "
            f"pip install --no-deps {library}"
        )
    elif library == "timm":
        import_torchvision()  # timm and pytorchcv import it, and it may need its help
        import timm

        known = timm.list_models()
        if "." in name:
            known += timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        build = lambda: timm.create_model(name, pretrained=trained, **classes)  # noqa: E731
    else:
        import_torchvision()
        from pytorchcv.model_provider import _models, get_model

        known = list(_models)
        build = lambda: get_model(name, pretrained=trained, **classes)  # noqa: E731
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"model: expected a network that {library} has, got {name}{hint}")
    try:
        return build()
    except (OSError, RuntimeError, ValueError) as error:
        reason = f"got {type(error).__name__} ({' '.join(str(error).split())[:200]})"
        if not trained:
            raise UsageError(f"model: expected {library}:{name} to be built, {reason}") from None
        raise UsageError(
            f"model: expected {library} to have or download the weights of {name}, {reason}; "
            "without a network connection give --weights FILE"
        ) from None


def _is_torchvision_weights(spec: str, weights: str) -> bool:
    library, _, name = spec.partition(":")
    if library != "torchvision":
        return False
    models = import_torchvision().models
    return name in models.list_models(module=models) and (
        weights in models.get_model_weights(name).__members__
    )


def _preprocessing(spec: str, network: nn.Module, weights: str = "") -> Preprocessing:
    """What the library says of ``weights``: "default", torchvision's name of them, or a file's.

    Of torchvision's networks only the file's name can tell; another file gets the usual values.
    """
    library, _, name = spec.partition(":")
    if library == "torchvision":
        every = import_torchvision().models.get_model_weights(name)
        found = [w for w in every if weights in (w.name, Path(w.url).name)]
        if weights == "default":
            found = [every.DEFAULT]
        if found:
            transform = found[0].transforms()
            return Preprocessing(
                tuple(transform.mean),
                tuple(transform.std),
                transform.crop_size[0],
                transform.resize_size[0],
                transform.interpolation.value,
                keep_small=False,
            )
    if library == "timm":
        values: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
        size = int(values["input_size"][-1])
        kind = values["interpolation"]
        if values.get("crop_mode", "center") != "center":
            _log.warning(
                "model: the weights of timm:%s were evaluated on images prepared by %s; here the "
                "short side is resized and the middle cut out",
                name,
                values["crop_mode"],
            )
        return Preprocessing(
            tuple(values["mean"]),
            tuple(values["std"]),
            size,
            math.floor(size / (values.get("crop_pct") or 0.875)),
            "bilinear" if kind == "random" else kind,
            keep_small=False,
        )
    if library == "pytorchcv":
        size = int(network.in_size[0])  # type: ignore[index]
        resize = math.ceil(size / 0.875)
        return Preprocessing(image_size=size, resize=resize, keep_small=False)
    return Preprocessing()


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill ``network`` from a file of the user's, without running anything the file may hold.

    Args:
        network: With the parameters the file has, under the same names.
        path: safetensors, or a torch file of tensors (read with ``weights_only``), possibly below
            a key ``state_dict`` or ``model`` and with the prefix ``module.``.

    Raises:
        UsageError: If the file is damaged, holds other things than tensors, or does not fit.
    """
    _fill(network, _read_weights(path), path)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError):
        state = _torch_file(path)
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _misfit(network: nn.Module, state: dict[str, Tensor]) -> str | None:
    """A tensor that only one of the two has, in words."""
    own = network.state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = sorted(own.keys() - state.keys() - counters)
    unknown = sorted(state.keys() - own.keys())
    if missing or unknown:
        return f"no {missing[0]}" if missing else f"the unknown {unknown[0]}"
    return None


def _in_order(network: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of ``state`` under the names that ``network`` has at the same places.

    Raises:
        UsageError: If there are more or less, or one has another shape or another last name.
    """

    def listed(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        return [(k, v) for k, v in tensors.items() if not k.endswith("num_batches_tracked")]

    ours, theirs = listed(network.state_dict()), listed(state)
    for (key, like), (other, tensor) in zip(ours, theirs, strict=False):
        if other.rpartition(".")[2] != key.rpartition(".")[2] or tensor.shape != like.shape:
            raise UsageError(
                f"model: expected tensors in the network's order, got {other} "
                f"{tuple(tensor.shape)} in the place of {key} {tuple(like.shape)} in {path}; "
                "safetensors are sorted by name, torch files by the order of saving"
            )
    if len(ours) != len(theirs):
        raise UsageError(
            f"model: expected the network's {len(ours)} tensors, got {len(theirs)} in {path}"
        )
    return {key: tensor for (key, _), (_, tensor) in zip(ours, theirs, strict=True)}


def _origin(
    spec: str, network: nn.Module, state: dict[str, Tensor], num_classes: int | None, path: Path
) -> str:
    """The network of another library that ``state`` was saved from.

    Raises:
        UsageError: If there is none, or several that compute different things.
    """
    shapes = {key: tensor.shape for key, tensor in state.items()}
    candidates: dict[str, nn.Module] = {}
    tried = []
    for other in relatives(spec):
        if find_spec(other.partition(":")[0]) is None:
            continue
        source = _build(other, num_classes, None)
        own = source.state_dict()
        tried.append(other)
        if _misfit(source, state) is None and all(own[k].shape == s for k, s in shapes.items()):
            candidates[other] = source
    if not candidates:
        more = f"; nor are they from {', '.join(tried)}" if tried else ""
        raise UsageError(
            f"model: expected weights with the network's {len(network.state_dict())} tensors, "
            f"got {path} with {_misfit(network, state)}{more}"
        )
    equal, refusals = [], []
    for other, source in candidates.items():
        size = _preprocessing(other, source).short_side
        try:
            translate(state, source, network, names=(other, spec), image_size=size)
            equal.append(other)
        except UsageError as error:
            refusals.append(error)
    if not equal:
        raise refusals[0]
    if refusals:
        raise UsageError(
            f"model: expected weights of a known network, got {path}, which may be from any of "
            f"{', '.join(candidates)}, and these compute different things; "
            f"give --weights {equal[0]}={path} if it is that one"
        )
    return equal[0]


def _fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load ``state``, read from ``path``, after a check of everything in it."""
    own = network.state_dict()
    misfit = _misfit(network, state)
    if misfit is not None:
        raise UsageError(
            f"model: expected weights with the network's {len(own)} tensors, "
            f"got {path} with {misfit}"
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
