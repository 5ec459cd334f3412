"""Networks by source and name, and weights from the package, a library or the user's file."""

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
            what the module NAME on Python's path calls CLASS, given ``num_classes=K`` if it takes
            that.
        weights: "default" for trained ones (shipped, or the library's own download and cache);
            "none" or None for random ones; a name such as ``IMAGENET1K_V1`` that torchvision has
            for the network; or a file: safetensors, or a torch file as a training script writes
            it, with wrappers' prefixes and beside other things. ``FILE#NAME`` takes the weights
            under NAME, where a file holds several sets. A file that was saved from the same network
            of another library is recognised by its names; where they leave a choice, ``SPEC=FILE``
            names the network it was saved from. ``order=FILE`` is for files of other origin: it
            goes by the order of the tensors, whatever their names, and the user vouches that the
            networks compute the same.
        num_classes: Outputs; None for those of the weights.

    Raises:
        UsageError: If there is no such network or file, or they do not fit.
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
    # pytorchcv's networks pool over a fixed window and take images of one size only.
    size = preprocessing.short_side
    state = translate(found.tensors, source, network, names=(origin, spec), image_size=size)
    _fill(network, state, path)
    return TrainedNetwork(network.eval(), preprocessing, f"{path}, saved from {origin}")


def _closest_network(name: str) -> str | None:
    """The known network whose name is most like ``name``, which lacks a library or has another."""
    name = name.rpartition(":")[2]
    known = {embedded: embedded for embedded in EMBEDDED}
    for library in reversed(_SOURCES):  # the first library's networks count most
        if find_spec(library) is not None:
            known.update({other: f"{library}:{other}" for other in _names_in(library)})
    close = difflib.get_close_matches(name, known, n=1)
    return known[close[0]] if close else None


def _names_in(library: str) -> list[str]:
    """Names of all networks of a library that is installed."""
    torchvision = import_torchvision()  # timm and pytorchcv import it, and it may need its help
    if library == "torchvision":
        return list(torchvision.models.list_models(module=torchvision.models))
    if library == "timm":
        import timm

        return list(timm.list_models())
    from pytorchcv.model_provider import _models

    return list(_models)


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
        # Many networks are made for one data set and take no number: the outputs will tell.
        network = build(num_classes=num_classes) if _takes_classes(build) else build()
    except Exception as error:  # whatever the user's code may raise
        reason = f"{type(error).__name__} ({' '.join(str(error).split())[:200]})"
        close = difflib.get_close_matches(attribute, dir(sys.modules.get(module)), n=1)
        if isinstance(error, AttributeError) and close and close[0] != attribute:
            reason += f"; did you mean {_OWN}:{module}.{close[0]}?"
        raise UsageError(
            f"model: expected {spec} to be a class, or a function, on Python's path that makes a "
            f"network when called with num_classes={num_classes}, got {reason}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"model: expected {spec} to make a torch.nn.Module, got {type(network).__name__}"
        )
    return network


def _takes_classes(build: Callable[..., Any]) -> bool:
    """Whether ``build`` may be called with ``num_classes``, as far as its signature tells."""
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
    """Names of the trained weights that torchvision has for ``spec``."""
    library, _, name = spec.partition(":")
    if library != "torchvision" or name not in _names_in(library):
        return []
    return list(import_torchvision().models.get_model_weights(name).__members__)


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
        network: With the parameters that the file has, under the same names.
        path: safetensors, or a torch file. The tensors may lie in dictionaries and have a prefix,
            see `WeightFile.fitting`.

    Raises:
        UsageError: If the file is damaged, holds objects that are not allowed, or does not fit.
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
    """The tensors of ``file`` under the names that ``network`` has at the same places.

    Raises:
        UsageError: If there are more or less, or one has another shape or another last name.
    """
    ours = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    groups = file.groups()
    if not groups:
        raise UsageError(f"model: expected the network's {len(ours)} tensors, got 0 in {file.path}")
    # If no dictionary fits, what is wrong with the one of the most similar length.
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
    """The first place at which two lists of tensors differ, in words."""
    for (key, like), (other, tensor) in zip(ours.items(), theirs.items(), strict=False):
        if other.rpartition(".")[2] != key.rpartition(".")[2] or tensor.shape != like.shape:
            return (
                f"tensors in the network's order, got {other} {tuple(tensor.shape)} in the place "
                f"of {key} {tuple(like.shape)} (safetensors are sorted by name, torch files by the "
                "order of saving)"
            )
    if len(ours) != len(theirs):
        return f"the network's {len(ours)} tensors, got {len(theirs)}"
    return None


def _origin(spec: str, network: nn.Module, file: WeightFile, num_classes: int | None) -> str:
    """The network of another library that the weights of ``file`` were saved from.

    Raises:
        UsageError: If there is none, or several that compute different things.
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
    """Load ``state``, tensors of all of the network's names from ``path``, after a check of each.

    Tensors of any width of floating point become the network's float32.

    Raises:
        UsageError: If a tensor has another shape, or values that are no weights.
    """
    own = network.state_dict()
    misshapen = [key for key, tensor in state.items() if tensor.shape != own[key].shape]
    if misshapen:
        raise _other_shape(own, state, misshapen, path)
    for key, tensor in state.items():
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


def _other_shape(
    own: dict[str, Tensor], state: dict[str, Tensor], misshapen: list[str], path: Path
) -> UsageError:
    """An error that names the first tensor of another shape, or another number of classes."""
    key = misshapen[0]
    got, wanted = tuple(state[key].shape), tuple(own[key].shape)
    places = {name.rpartition(".")[0] for name in misshapen}
    if len(places) == 1 and len(wanted) >= 2 and got[1:] == wanted[1:]:  # one layer, by its rows
        return UsageError(
            f"model: expected weights for {wanted[0]} classes, got weights for {got[0]} in {path} "
            f"({key} of shape {got} instead of {wanted}); give data of the same classes"
        )
    more = f", and {len(misshapen) - 1} more of other shapes" if len(misshapen) > 1 else ""
    return UsageError(f"model: expected {key} of shape {wanted}, got {got} in {path}{more}")
