"""The folder of one run.

It holds ``config.yaml`` (resolved), ``origin.json`` (when and where the run began),
``metrics.jsonl``, ``tensorboard/``, ``checkpoint.safetensors``, and ``summary.json`` once the run
is finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..about import build_info
from ..errors import UsageError
from .checkpoint import atomic_write_text

__all__ = ["RunFolder"]

#: Files that exist before any result, and the folder of TensorBoard events.
_AT_THE_BEGINNING = ("config.yaml", "origin.json")
_EVENTS = "tensorboard"


class RunFolder:
    """The folder of a new or resumed run.

    Args:
        path: The folder. It is created if absent.
        config: Resolved configuration as YAML. A resumed run must have the same, except for the
            line ``device: ...``.
        resume: Whether to continue the run in the folder.
        inputs: Digest of the weights and images that the run starts from.

    Raises:
        UsageError: If the folder holds other files, a run of another configuration, or a run while
            ``resume`` is off.
    """

    def __init__(self, path: Path, config: str, *, resume: bool, inputs: str = "") -> None:
        self.path = path
        self.inputs = inputs
        #: Whether this object began the run, and the parent folders that it creates for that.
        self._began, self._made = False, [p for p in path.absolute().parents if not p.exists()]
        #: Checksum of configuration and inputs, stored with every result.
        self.fingerprint = hashlib.sha256((_essence(config) + inputs).encode()).hexdigest()[:16]
        if path.exists() and not path.is_dir():
            raise UsageError(f"run: expected out to be a folder, got the file {path}")
        stored = path / "config.yaml"
        if stored.exists():
            if not resume:
                raise UsageError(
                    f"run: expected out to be a new or empty folder, got {path} which holds a run; "
                    "give --resume to continue it, or another --out"
                )
            before = stored.read_text(errors="replace")
            if _essence(before) != _essence(config):
                raise UsageError(
                    f"run: expected the configuration of the resumed run {path}, got another: "
                    f"{_first_difference(before, config)}"
                )
        elif path.exists() and any(p.name != "config.yaml.tmp" for p in path.iterdir()):
            raise UsageError(
                f"run: expected out to be a new or empty folder, got {path} which holds other files"
            )
        else:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"run: expected out to be a folder that can be created, got {path} ({error})"
                ) from None
            self._began = True
            atomic_write_text(stored, config)
            atomic_write_text(path / "origin.json", json.dumps(_origin(), indent=1) + "\n")

    @contextmanager
    def removed_if_unused(self) -> Iterator[None]:
        """Remove the folder if an error inside leaves it without results, unless it was resumed.

        The same command can then be given again.
        """
        try:
            yield
        except BaseException:
            if self._began and not self._holds_results():
                shutil.rmtree(self.path, ignore_errors=True)
                for folder in self._made:
                    with suppress(OSError):  # it now holds another run
                        folder.rmdir()
            raise

    def _holds_results(self) -> bool:
        """Return whether this run, or one in a subfolder, has written results."""
        files = (p for p in self.path.rglob("*") if p.is_file() and p.stat().st_size)
        return any(p.name not in _AT_THE_BEGINNING and _EVENTS not in p.parts for p in files)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in this folder.

        Raises:
            UsageError: If another process already trains in it.
        """
        with (self.path / "config.yaml").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"run: expected no other process to train in {self.path}, got one that does"
                ) from None
            yield

    @property
    def checkpoint(self) -> Path:
        """File of the training state."""
        return self.path / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        """File with one JSON object per line."""
        return self.path / "metrics.jsonl"

    def check_fingerprint(self, found: object) -> None:
        """Refuse a result of another configuration or other inputs.

        Raises:
            UsageError: If ``found`` is not this run's fingerprint.
        """
        if found != self.fingerprint:
            raise UsageError(
                f"run: expected {self.path / 'config.yaml'}, and the weights and images it names, "
                "to be unchanged since the run began, got others; start a new run in another --out"
            )

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, or None.

        Raises:
            UsageError: If the file is damaged, or of another configuration or inputs.
        """
        path = self.path / "summary.json"
        if not path.exists():
            return None
        try:
            summary = json.loads(path.read_text())
            if not isinstance(summary, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise UsageError(
                f"run: expected {path} to be a JSON object, got a damaged file ({error})"
            ) from None
        self.check_fingerprint(summary.pop("config", None))
        return summary

    @staticmethod
    def is_finished(path: Path) -> bool:
        """Return whether the run in ``path`` is finished."""
        return (path / "summary.json").exists()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks the run as finished."""
        text = json.dumps({**summary, "config": self.fingerprint}, indent=2)
        atomic_write_text(self.path / "summary.json", text + "\n")


def _origin() -> dict[str, str]:
    """Return date, versions and machine of a run's start."""
    info, python = build_info(), platform.python_version()
    cores = f"{os.cpu_count()} cores, threads: {info.threads}"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": f"fdda_ext {info.version}, torch {info.torch}, Python {python}",
        "machine": f"{platform.machine()} with {info.isa}, {cores}",
    }


def _essence(config: str) -> str:
    """Return the configuration without the device, which may change in a resumed run."""
    return "".join(x for x in config.splitlines(keepends=True) if not x.startswith("device:"))


def _first_difference(stored: str, given: str) -> str:
    pairs = zip(_essence(stored).splitlines(), _essence(given).splitlines(), strict=False)
    for old, new in pairs:
        if old != new:
            return f"'{new.strip()}' instead of '{old.strip()}'"
    return "one has more settings than the other"
