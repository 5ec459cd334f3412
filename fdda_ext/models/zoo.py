"""Networks and weights from this package, a library or the user."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from .._torchvision import import_torchvision
from ..errors import UsageError
from ..preprocessing import Preprocessing
from .glyph_networks import GlyphMobileNet, GlyphResNet
from .layouts import relatives, translate
from .weight_files import WeightFile, locate_weights, read_weight_file

__all__ = ["EMBEDDED", "TrainedNetwork", "load_model", "load_weights", "open_model"]

#: Networks with weights in this package, trained on ``glyphs``.
EMBEDDED: dict[str, Callable[[int], nn.Module]] = {
    "glyphs_resnet": GlyphResNet,
    "glyphs_mobilenet": GlyphMobileNet,
}
_log = logging.getLogger("fdda_ext")

_SOURCES = ("torchvision", "timm", "pytorchcv")
#: Prefix of the user's own networks.
_OWN = "module"
_NAMED_FILE = re.compile(rf"(order|(?:{'|'.join(_SOURCES)}):[^=/]+)=(.+)")


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with its preprocessing and the origin of its weights.

    Attributes:
        network: Network in evaluation mode, from images ``[N, 3, H, W]`` to logits ``[N, K]``.
        preprocessing: Preprocessing of image files for which the weights were trained.
        origin: Description of where the weights are from.
    """

    network: nn.Module
    preprocessing: Preprocessing
    origin: str


def load_model(
    spec: str, *, weights: str | None = "default", num_classes: int | None = None
) -> nn.Module:
    """Build a network in evaluation mode; see `open_model` for arguments and errors."""
    return open_model(spec, weights=weights, num_classes=num_classes).network


def open_model(
    spec: str, *, weights: str | None = "default", num_classes: int | None = None
) -> TrainedNetwork:
    """Build a network, load its weights and find their preprocessing.

    Args:
        spec: ``glyphs_resnet``, ``glyphs_mobilenet``, ``torchvision:NAME``, ``timm:NAME``
            (optionally with a tag: ``timm:resnet50.tv_in1k``), ``pytorchcv:NAME``, or
            ``module:NAME.CLASS`` for a class or function CLASS in the module NAME on Python's
            path. It gets ``num_classes=K`` if it takes this argument.
        weights: "default" for trained weights (from this package, or downloaded and cached by the
            library); "none" or None for random weights; a name such as ``IMAGENET1K_V1`` that
            torchvision has for the network; or a file: safetensors, or a torch file of a training
            script, with wrapper prefixes and other content. ``FILE#NAME`` selects the weights
            under NAME from several sets. A file that was saved from the same network of another
            library is recognised by its names. If these are ambiguous, ``SPEC=FILE`` names the
            network. ``order=FILE`` is for files of other origin. It assigns tensors in order and
            ignores their names, so the user must make sure that both networks compute the same.
        num_classes: Number of classes, K; None for that of the weights.

    Raises:
        UsageError: If network or file do not exist, or do not fit.
    """
    library, _, name = spec.partition(":")
    if spec not in EMBEDDED and (library not in (*_SOURCES, _OWN) or not name):
        libraries = (f"{library}:NAME" for library in _SOURCES)
        names = (*EMBEDDED, *libraries, f"{_OWN}:NAME.CLASS")
        close = _closest_network(spec)
        hint = f"; did you mean {close}?" if close else ""
        raise UsageError(f"model: expected one of {', '.join(names)}, got {spec}{hint}")
    chosen = "none" if weights is None else weights
    if chosen == "none" or (chosen == "default" and spec in EMBEDDED):
        network = _build(spec, num_classes, None if chosen == "none" else chosen)
        return TrainedNetwork(network.eval(), _preprocessing(spec, network), chosen)
    if chosen == "default" and library == _OWN:
        raise UsageError(f"model: expected weights of {spec} to be a file or none, got default")
    if chosen == "default" or chosen in _torchvision_weights(spec):
        network = _build(spec, num_classes, chosen)
        preprocessing = _preprocessing(spec, network, chosen)
        return TrainedNetwork(network.eval(), preprocessing, f"{library}'s {chosen}")

    named = _NAMED_FILE.fullmatch(chosen)
    try:
        path, name = locate_weights(named[2] if named else chosen)
    except UsageError as error:
        known = _torchvision_weights(spec)
        if known:
            raise UsageError(f"{error}; torchvision has {', '.join(known)}") from None
        raise
    network = _build(spec, num_classes, None)
    file = read_weight_file(path, name)
    if named is not None and named[1] == "order":
        _fill(network, _in_order(network, file), path)
        preprocessing = _preprocessing(spec, network, path.name)
        return TrainedNetwork(network.eval(), preprocessing, f"{path}, by order")
    if named is None or named[1] == spec:
        found = file.fitting(network.state_dict())
        if found is not None:
            _fill(network, found.tensors, path)
            where = f", from {found.name}" if found.name else ""
            preprocessing = _preprocessing(spec, network, path.name)
            return TrainedNetwork(network.eval(), preprocessing, f"{path}{where}")
    origin = named[1] if named else _origin(spec, network, file, num_classes)
    source = _build(origin, num_classes, None)
    found = file.fitting(source.state_dict())
    if found is None:
        raise UsageError(
            f"model: expected weights of {origin}, got {file.in_words(source.state_dict())}"
        )
    preprocessing = _preprocessing(origin, source, path.name)
    # pytorchcv's networks pool over a fixed window, so they take only one image size.
    size = preprocessing.short_side
    state = translate(found.tensors, source, network, names=(origin, spec), image_size=size)
    _fill(network, state, path)
    return TrainedNetwork(network.eval(), preprocessing, f"{path}, saved from {origin}")


def _closest_network(name: str) -> str | None:
    """Return the network of any library whose name is most similar to ``name``."""
    name = name.rpartition(":")[2]
    known = {embedded: embedded for embedded in EMBEDDED}
    for library in reversed(_SOURCES):  # the first library is preferred
        if find_spec(library) is not None:
            known.update({other: f"{library}:{other}" for other in _names_in(library)})
    close = difflib.get_close_matches(name, known, n=1)
    return known[close[0]] if close else None


def _names_in(library: str) -> list[str]:
    torchvision = import_torchvision()  # before timm or pytorchcv import it
    if library == "torchvision":
        return list(torchvision.models.list_models(module=torchvision.models))
    if library == "timm":
        import timm

        return list(timm.list_models())
    from pytorchcv.model_provider import _models

    return list(_models)


def _build(spec: str, num_classes: int | None, weights: str | None) -> nn.Module:
    """Build a network, with random weights if ``weights`` is None."""
    if spec in EMBEDDED:
        return _embedded(spec, num_classes, trained=weights == "default")
    library, _, name = spec.partition(":")
    if library == _OWN:
        return _own(name, num_classes)
    return _from_library(library, name, num_classes, weights)


def _own(name: str, num_classes: int | None) -> nn.Module:
    spec = f"{_OWN}:{name}"
    if num_classes is None:
        raise UsageError(f"model: expected num_classes for {spec}, got none")
    module, _, attribute = name.rpartition(".")
    try:
        build = getattr(importlib.import_module(module), attribute)
        # Networks for one data set often have no argument for the number of classes.
        network = build(num_classes=num_classes) if _takes_classes(build) else build()
    except Exception as error:  # the user's code may raise anything
        reason = f"{type(error).__name__} ({' '.join(str(error).split())[:200]})"
        close = difflib.get_close_matches(attribute, dir(sys.modules.get(module)), n=1)
        if isinstance(error, AttributeError) and close and close[0] != attribute:
            reason += f"; did you mean {_OWN}:{module}.{close[0]}?"
        raise UsageError(
            f"model: expected {spec} to be a class or function on Python's path that makes a "
            f"network for num_classes={num_classes}, got {reason}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"model: expected {spec} to make a torch.nn.Module, got {type(network).__name__}"
        )
    return network


def _takes_classes(build: Callable[..., Any]) -> bool:
    """Whether ``build`` takes ``num_classes``, judging by its signature."""
    try:
        parameters = inspect.signature(build).parameters
    except (TypeError, ValueError):
        return True
    kinds = [parameter.kind for parameter in parameters.values()]
    return "num_classes" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


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
            f"trained on, got {num_classes}; train for others with python -m fdda_ext.pretrain"
        )
    network = EMBEDDED[name](stored_classes)
    network.load_state_dict(state)
    return network


def _outputs(state: dict[str, Tensor]) -> int:
    """Number of classes: the rows of the only matrix."""
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
        known = _names_in(library)
        which = "DEFAULT" if weights == "default" else weights
        build = lambda: models.get_model(name, weights=which, **classes)  # noqa: E731
    elif find_spec(library) is None:
        raise UsageError(
            f"model: expected the package {library} to be installed, got none; "
            f"pip install --no-deps {library}"
        )
    elif library == "timm":
        known = _names_in(library)
        import timm

        if "." in name:
            known += timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        build = lambda: timm.create_model(name, pretrained=trained, **classes)  # noqa: E731
    else:
        known = _names_in(library)
        from pytorchcv.model_provider import get_model

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


def _torchvision_weights(spec: str) -> list[str]:
    library, _, name = spec.partition(":")
    if library != "torchvision" or name not in _names_in(library):
        return []
    return list(import_torchvision().models.get_model_weights(name).__members__)


def _preprocessing(spec: str, network: nn.Module, weights: str = "") -> Preprocessing:
    """Preprocessing that the library states for ``weights``.

    ``weights`` is "default", a name in torchvision, or the name of a file. A file for a network of
    torchvision is recognised by its original name. Other files get the defaults.
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
                "short side is resized and the centre is cropped",
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
    """Load weights from a file into ``network``, without running code in the file.

    Args:
        network: Network with the tensor names of the file.
        path: Safetensors or torch file. The tensors may be in nested dictionaries and have a
            prefix, see `WeightFile.fitting`.

    Raises:
        UsageError: If the file is damaged, has objects that are not allowed, or does not fit.
    """
    file = read_weight_file(path)
    found = file.fitting(network.state_dict())
    if found is None:
        raise _no_fit(network, file)
    _fill(network, found.tensors, path)


def _no_fit(network: nn.Module, file: WeightFile, tried: Sequence[str] = ()) -> UsageError:
    own = network.state_dict()
    more = f"; nor are they from {', '.join(tried)}" if tried else ""
    return UsageError(
        f"model: expected weights with the network's {len(own)} tensors, "
        f"got {file.in_words(own)}{more}"
    )


def _in_order(network: nn.Module, file: WeightFile) -> dict[str, Tensor]:
    """Match the tensors of ``file`` to the names of ``network`` by their order.

    Raises:
        UsageError: If the number of tensors, a shape or the last part of a name differs.
    """
    ours = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    groups = file.groups()
    if not groups:
        raise UsageError(f"model: expected the network's {len(ours)} tensors, got 0 in {file.path}")
    # If no dictionary fits, the error describes the one with the most similar length.
    theirs = min(
        (tensors for _, tensors in groups),
        key=lambda tensors: (
            _other_order(ours, tensors) is not None,
            abs(len(tensors) - len(ours)),
        ),
    )
    difference = _other_order(ours, theirs)
    if difference is not None:
        raise UsageError(f"model: expected {difference} in {file.path}")
    return dict(zip(ours, theirs.values(), strict=True))


def _other_order(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str | None:
    """Describe the first difference between two lists of tensors; None if there is none."""
    for (key, like), (other, tensor) in zip(ours.items(), theirs.items(), strict=False):
        if other.rpartition(".")[2] != key.rpartition(".")[2] or tensor.shape != like.shape:
            return (
                f"tensors in the network's order, got {other} {tuple(tensor.shape)} in the place "
                f"of {key} {tuple(like.shape)} (safetensors are sorted by name, torch files keep "
                "the order of saving)"
            )
    if len(ours) != len(theirs):
        return f"the network's {len(ours)} tensors, got {len(theirs)}"
    return None


def _origin(spec: str, network: nn.Module, file: WeightFile, num_classes: int | None) -> str:
    """Find the network of another library from which ``file`` was saved.

    Raises:
        UsageError: If there is none, or there are several that compute different results.
    """
    candidates: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {}
    tried = []
    for other in relatives(spec):
        if find_spec(other.partition(":")[0]) is None:
            continue
        source = _build(other, num_classes, None)
        tried.append(other)
        found = file.fitting(source.state_dict())
        if found is not None and not found.misshapen:
            candidates[other] = (source, found.tensors)
    if not candidates:
        raise _no_fit(network, file, tried)
    equal, refusals = [], []
    for other, (source, state) in candidates.items():
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
            f"model: expected weights of a known network, got {file.path}, which may be from any "
            f"of {', '.join(candidates)}, and these compute different things; "
            f"give --weights {equal[0]}={file.path} if it is that one"
        )
    return equal[0]


def _fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Check ``state``, which was read from ``path``, and load it.

    Floating-point tensors of any width become float32.

    Raises:
        UsageError: If a tensor has another shape, another type, or invalid values.
    """
    own = network.state_dict()
    misshapen = [key for key, tensor in state.items() if tensor.shape != own[key].shape]
    if misshapen:
        raise _other_shape(own, state, misshapen, path)
    for key, tensor in state.items():
        if own[key].is_floating_point() and not tensor.is_floating_point():
            raise UsageError(
                f"model: expected {key} in floating point, got {tensor.dtype} in {path}"
            )
        # In float32: isfinite does not support some narrow types, and float64 may overflow.
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise UsageError(
                f"model: expected weights finite in float32, got NaN or infinity in {key} of {path}"
            )
        if key.endswith("running_var") and bool((tensor < 0).any()):
            raise UsageError(
                f"model: expected {key} at least 0, got {float(tensor.min()):.3g} in {path}"
            )
    network.load_state_dict(state, strict=False)


def _other_shape(
    own: dict[str, Tensor], state: dict[str, Tensor], misshapen: list[str], path: Path
) -> UsageError:
    """Return an error that names the first wrong shape, or a wrong number of classes."""
    key = misshapen[0]
    got, wanted = tuple(state[key].shape), tuple(own[key].shape)
    places = {name.rpartition(".")[0] for name in misshapen}
    if (
        len(places) == 1 and len(wanted) >= 2 and got[1:] == wanted[1:]
    ):  # one layer with another number of rows
        return UsageError(
            f"model: expected weights for {wanted[0]} classes, got weights for {got[0]} in {path} "
            f"({key} of shape {got} instead of {wanted}); use data with the same classes"
        )
    more = f", and {len(misshapen) - 1} more of other shapes" if len(misshapen) > 1 else ""
    return UsageError(f"model: expected {key} of shape {wanted}, got {got} in {path}{more}")
