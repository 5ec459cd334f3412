"""Weight files of training scripts, and the tensors in them that fit a network.

The network's tensors may be in a nested dictionary, have a wrapper's prefix, and come with an
optimizer's state, settings or a second set of averaged weights. Every tensor of the file gets a
full name: the keys that lead to it, joined by dots. If all of the network's names, after one common
prefix, are full names of the file, these tensors are a *set* of weights.
"""

from __future__ import annotations

import logging
import pickle
import pickletools
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UsageError

__all__ = ["WeightFile", "WeightSet", "locate_weights", "read_weight_file"]

_log = logging.getLogger("fdda_ext")

#: Last name parts of tensors that have no effect in evaluation mode: counters of batch
#: normalisation and of averaged models, and tensors of a profiler.
_NO_EFFECT = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
#: Attributes by which torch's wrappers hold the wrapped module, at any depth.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: Words in the name of a set that mark an average over training.
_AVERAGES = {"ema", "swa", "averaged", "average", "avg", "shadow", "teacher", "polyak"}
#: Number of names that an error or a warning lists.
_TOLD = 3

# ---- reading ------------------------------------------------------------------------------------


class _Settings:
    """Stand-in for any other object than a tensor.

    It ignores its arguments, so that a file cannot choose code to run.
    """

    def __init__(self, *arguments: object) -> None:
        pass

    def __new__(cls, *arguments: object) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class _Dictionary:
    """Stand-in for a subclass of dict, since torch's reader fills only plain dictionaries."""

    def __new__(cls, *arguments: object) -> Any:
        return OrderedDict()


class _List:
    """Stand-in for a class that is filled like a list."""

    def __new__(cls, *arguments: object) -> Any:
        return []


#: Classes and functions that weight files may name. Stand-ins replace them: none is imported or
#: called.
_ALLOWED = re.compile(
    r"(argparse\.Namespace|types\.SimpleNamespace|uuid\.UUID|decimal\.Decimal|functools\.partial"
    r"|copyreg\._reconstructor|re\._compile"
    r"|builtins\.(getattr|object|dict|list|tuple|int|float|bool|str|bytes|frozenset|slice|range)"
    r"|(pathlib|datetime|enum|typing|numpy|omegaconf|torch\.nn|torch\.optim|torch\.amp|torch\.cuda\.amp"
    r"|lightning|pytorch_lightning|lightning_fabric|lightning_utilities|torchmetrics|ml_collections)"
    r"\..+)"
)
_DICTIONARIES = re.compile(
    r"(collections\.defaultdict|easydict\.EasyDict|addict\.(addict\.)?Dict|munch\.Munch|box\.box\.Box"
    r"|(yacs|fvcore\.common)\.config\.CfgNode|mmengine\.config\.config\.ConfigDict"
    r"|(lightning|pytorch_lightning|lightning_fabric)\..+\.AttributeDict)"
)
_LISTS = re.compile(r"collections\.deque")


def _stand_in(name: str) -> type | None:
    """Return the stand-in for the class or function ``name``; None if it is not allowed."""
    for pattern, kind in ((_DICTIONARIES, _Dictionary), (_LISTS, _List), (_ALLOWED, _Settings)):
        if pattern.fullmatch(name):
            return kind
    return None


def _named_in(path: Path) -> set[str]:
    """Classes and functions named in a torch file that torch does not allow by default."""
    if zipfile.is_zipfile(path):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    names: set[str] = set()
    with path.open("rb") as file:
        for _ in range(4):  # before torch 1.6: a number, the version, the system, then the content
            try:
                names |= _named_in_pickle(file)
            except ValueError:  # not a pickle, which torch's reader reports
                break
    reader = torch._weights_only_unpickler  # has no public list of allowed names
    allowed: Mapping[str, Any] = getattr(reader, "_get_allowed_globals", dict)()
    return names - allowed.keys()


def _named_in_pickle(file: BinaryIO) -> set[str]:
    names = set()
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            name = str(argument).replace(" ", ".", 1)
            names.add(re.sub(r"^__builtin__\.", "builtins.", name))
    return names


def _is_torchscript(path: Path) -> bool:
    """Whether torch.jit.save wrote ``path``."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


_SAVE = "save only its tensors: torch.save(network.state_dict(), FILE)"


def _torch_file(path: Path) -> Any:
    """Read a torch file, with stand-ins for all but tensors, numbers, texts and dictionaries.

    Raises:
        UsageError: If the file is damaged, is a TorchScript archive, or names a class or function
            that is not allowed.
    """
    names: set[str] = set()
    try:
        if _is_torchscript(path):
            raise UsageError(
                "model: expected weights to be a file of tensors, got the TorchScript archive "
                f"{path}, which holds code; write its tensors to another file: "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
            )
        names = _named_in(path)
        known = [(kind, name) for name in names if (kind := _stand_in(name)) is not None]
        with torch.serialization.safe_globals(known):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except pickle.UnpicklingError:
        refused = sorted(name for name in names if _stand_in(name) is None)
        what = "is damaged or holds code"
        if any(name.startswith("torch.nn.modules.") for name in names):
            what = "holds a whole pickled network or other code"
        told = f" ({_told(refused)})" if refused else ""
        raise UsageError(
            "model: expected weights to be a file of tensors and plain settings, "
            f"got {path}, which {what} and was not run{told}; {_SAVE}"
        ) from None
    except Exception as error:  # damaged files raise many types of errors
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            "model: expected weights to be a whole safetensors or torch file, "
            f"got {path} ({reason})"
        ) from None
    has_modules = any(name.startswith("torch.nn.modules.") for name in names)
    if has_modules and not any(isinstance(value, Tensor) for _, value in _leaves(content)):
        raise UsageError(
            "model: expected weights to be a file of tensors and plain settings, "
            f"got {path}, which holds a whole pickled network and was not run; {_SAVE}"
        )
    return content


def _told(names: list[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ", ".join(names[:_TOLD]) + more


def _leaves(content: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield all values of nested dictionaries with the keys that lead to them."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, (*place, str(key)))
    elif place:
        yield place, content


def locate_weights(text: str) -> tuple[Path, str]:
    """Split ``FILE`` or ``FILE#NAME`` into the file and the name of the set.

    Raises:
        UsageError: If there is no such file.
    """
    if Path(text).is_file():
        return Path(text), ""
    file, mark, name = text.rpartition("#")
    if mark and Path(file).is_file():
        if not name:
            raise UsageError(
                f"model: expected weights FILE#NAME to name a set of weights, got {text}"
            )
        return Path(file), name
    what = ", which is a folder" if Path(text).is_dir() else ", and there is no such file"
    raise UsageError(f"model: expected weights to be default, none or a file, got {text}{what}")


def read_weight_file(path: Path, name: str = "") -> WeightFile:
    """Read a safetensors or torch file without running code in it.

    Args:
        path: Path of the file.
        name: Dictionary or prefix to read weights from, joined by dots; "" for all.

    Raises:
        UsageError: If the file is damaged, has no tensors, or has objects that are not allowed.
    """
    content: Any
    try:
        content = load_file(path)
    except (SafetensorError, OSError, ValueError):
        content = _torch_file(path)
    file = WeightFile(path)
    for place, value in _leaves(content):
        if not isinstance(value, Tensor):
            continue
        full = ".".join(place)
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise UsageError(
                "model: expected weights to be named tensors, got something else in "
                f"{path}: {full} is sparse, quantized, or without values"
            )
        if not name or f"{full}.".startswith(f"{name}."):
            file.tensors[full] = value
            file.dictionaries[full] = ".".join(place[:-1])
    if not file.tensors:
        keys = [str(key) for key in content] if isinstance(content, Mapping) else []
        where = f"{path}#{name}" if name else str(path)
        holds = f", which holds {_told(keys)}" if keys else ""
        raise UsageError(
            f"model: expected weights to be named tensors, got something else in {where}{holds}"
        )
    return file


# ---- what fits ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightSet:
    """Tensors of a file that have a network's names after one prefix.

    Attributes:
        name: Prefix without its last dot.
        tensors: Tensors by the network's names.
        missing: Names of the network that the file lacks after this prefix.
        unknown: Names after the prefix, in the same dictionary, that the network lacks.
        beside: Names without the prefix in the same dictionary, such as those of a wrapper.
        misshapen: Names of the network whose tensors have another shape in the file.
    """

    name: str
    tensors: dict[str, Tensor]
    missing: list[str]
    unknown: list[str]
    beside: list[str]
    misshapen: list[str]

    @property
    def has_all_names(self) -> bool:
        """Whether file and network have the same names, except for tensors without effect."""
        return not self.missing and not self.unknown

    @property
    def is_average(self) -> bool:
        """Whether the name marks an average over training."""
        return not _AVERAGES.isdisjoint(re.split(r"[._-]", self.name.lower()))

    @property
    def misfit(self) -> str:
        """Description of the first name that only the file or only the network has."""
        if self.missing:
            return f"no {self.missing[0]}"
        return f"the unknown {self.unknown[0]}"


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file.

    Attributes:
        path: Path of the file.
        tensors: Tensors by full name.
        dictionaries: Full name of the dictionary of each tensor.
    """

    path: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dictionaries: dict[str, str] = field(default_factory=dict)

    def fitting(self, network: Mapping[str, Tensor]) -> WeightSet | None:
        """Find the set of weights that has all names of a network.

        Sets with the network's shapes are preferred, then plain weights over averaged ones. The
        logger ``fdda_ext`` warns if averaged weights or other tensors of the dictionary are left
        out.

        Args:
            network: State dict of the network.

        Returns:
            The set, or None if no set has all names.

        Raises:
            UsageError: If several sets fit equally well and have different values.
        """
        named = [s for s in self._sets(network) if s.has_all_names]
        fitting = [s for s in named if not s.misshapen] or named
        if not fitting:
            return None
        plain = [s for s in fitting if not s.is_average] or fitting
        taken = plain[0]
        if any(not _equal(taken, other) for other in plain[1:]):
            names = [s.name or "(no name)" for s in plain]
            chosen = next(s.name for s in plain if s.name)
            raise UsageError(
                f"model: expected one set of weights, got {len(plain)} that fit the network in "
                f"{self.path}: {', '.join(names)}; choose one with --weights {self.path}#{chosen}"
            )
        others = [s for s in fitting if s not in plain and s.name]
        if others:
            _log.warning(
                "model: %s also holds averaged weights, but those under %s are used; "
                "--weights %s#%s uses the averaged ones",
                self.path,
                taken.name or "no name",
                self.path,
                others[0].name,
            )
        if taken.beside:
            _log.warning(
                "model: %s also holds tensors that are not the network's and are left out: %s",
                self.path,
                _told(taken.beside),
            )
        return taken

    def closest(self, network: Mapping[str, Tensor]) -> WeightSet:
        """Return the set that shares most names with a network, possibly none."""
        return max(self._sets(network), key=lambda s: (len(s.tensors), -len(s.misshapen)))

    def in_words(self, network: Mapping[str, Tensor]) -> str:
        """Explain why no set fits ``network``, with names of both and the closest set."""
        needed = [key for key in network if not _without_effect(key)]
        held = [key for key in self.tensors if not _without_effect(key)]
        closest = self.closest(network)
        found = [key for key in needed if key in closest.tensors]
        where = f" under {closest.name}" if closest.name else ""
        match = f"the closest match{where} has {len(found)} of the {len(needed)} names"
        if closest.misshapen:
            key = closest.misshapen[0]
            got, wanted = (tuple(t[key].shape) for t in (closest.tensors, network))
            match += f", {len(closest.misshapen)} with another shape ({key} {got}, not {wanted})"
        if not found:
            match = f"none of them is one of the network's {len(needed)}"
        return (
            f"{self.path} with {closest.misfit if found else f'no {needed[0]}'}; the network has "
            f"{_told(needed)}; the file has {_told(held)}; {match}"
        )

    def groups(self) -> list[tuple[str, dict[str, Tensor]]]:
        """List the tensors of every dictionary in the file's order, averaged ones last."""
        found: dict[str, dict[str, Tensor]] = {}
        for full, tensor in self.tensors.items():
            if not _without_effect(full):
                found.setdefault(self.dictionaries[full], {})[full] = tensor

        def is_average(name: str) -> bool:
            return not _AVERAGES.isdisjoint(re.split(r"[._-]", name.lower()))

        return sorted(found.items(), key=lambda item: is_average(item[0]))

    def _sets(self, network: Mapping[str, Tensor]) -> list[WeightSet]:
        """Find the sets with most of the network's names, with or without wrappers."""
        found: dict[tuple[int, ...], WeightSet] = {}
        for names in (dict.fromkeys(self.tensors), self._unwrapped(network)):
            full_names = {short or full: full for full, short in names.items()}
            if len(full_names) < len(names):  # two tensors would share a name
                continue
            for weights in self._sets_of(network, full_names):
                found.setdefault(tuple(id(t) for t in weights.tensors.values()), weights)
        return list(found.values())

    def _unwrapped(self, network: Mapping[str, Tensor]) -> dict[str, str | None]:
        """Map full names to names without the wrappers that the network lacks."""
        own = {part for key in network for part in key.split(".")}
        wrappers = {part for part in _WRAPPERS if part not in own}
        return {
            full: ".".join(part for part in full.split(".") if part not in wrappers)
            for full in self.tensors
        }

    def _sets_of(
        self, network: Mapping[str, Tensor], full_names: Mapping[str, str]
    ) -> Iterator[WeightSet]:
        """Yield the sets with most names; ``full_names`` maps names to full names."""
        needed = {key for key in network if not _without_effect(key)}
        counts: Counter[str] = Counter()
        for name in full_names:
            start = 0
            while start >= 0:  # every tail of the name, from the whole name to its last part
                if name[start:] in needed:
                    counts[name[:start]] += 1
                start = name.find(".", start) + 1 or -1
        best = counts.most_common()
        most = best[0][1] if best else 0
        for prefix in [p for p, count in best if count == most] or [""]:
            tensors = {
                key: self.tensors[full_names[prefix + key]]
                for key in network
                if prefix + key in full_names
            }
            used = {self.dictionaries[full_names[prefix + key]] for key in tensors}
            others = [
                name
                for name, full in full_names.items()
                if self.dictionaries[full] in used
                and not (name.startswith(prefix) and name[len(prefix) :] in network)
                and not _without_effect(name)
            ]
            yield WeightSet(
                prefix.removesuffix("."),
                tensors,
                sorted(needed - tensors.keys()),
                sorted(name[len(prefix) :] for name in others if name.startswith(prefix)),
                sorted(name for name in others if not name.startswith(prefix)),
                [key for key, tensor in tensors.items() if tensor.shape != network[key].shape],
            )


def _without_effect(name: str) -> bool:
    return name.rpartition(".")[2] in _NO_EFFECT


def _equal(one: WeightSet, two: WeightSet) -> bool:
    if one.tensors.keys() != two.tensors.keys():
        return False
    pairs = ((tensor, two.tensors[key]) for key, tensor in one.tensors.items())
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
