"""Parsing and exit of commands. A user's mistake gives one line and status 2."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from safetensors import SafetensorError

from ..distribution import signature, world_size
from ..errors import UsageError
from .memory import is_out_of_memory

__all__ = [
    "available_cores",
    "build_parser",
    "check_machine",
    "decode_workers",
    "instantiate_or_refuse",
    "parse_or_refuse",
    "run_command",
    "with_underscores",
]


_LONGEST_ERROR = 500
_DISK_ERRORS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of descriptions."""


def build_parser(command: str, description: str, **options: Any) -> ArgumentParser:
    """Build a parser of typed options for ``python -m command``. See `parse_or_refuse`."""
    return ArgumentParser(
        prog=f"python -m {command}",
        usage=f"python -m {command} [--option value ...]",
        description=description,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        **options,
    )


def with_underscores(arguments: Sequence[str] | None) -> list[str]:
    """Write option names as they are declared: ``--max-time`` becomes ``--max_time``."""

    def declared(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return f"--{name[2:].replace('-', '_')}{equals}{value}" if name[:2] == "--" else argument

    return [declared(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]


def parse_or_refuse(parser: ArgumentParser, arguments: Sequence[str] | None) -> Namespace:
    """Parse the command line. A mistake raises a `UsageError` of one sentence."""
    try:
        return parser.parse_args(with_underscores(arguments))
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        raise _refusal(parser, error) from None


def instantiate_or_refuse(parser: ArgumentParser, namespace: Namespace) -> dict[str, Any]:
    """Build the options' dataclasses. A mistake raises a `UsageError` of one sentence."""
    try:
        return dict(parser.instantiate(namespace).as_dict())
    except ValueError as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, UsageError):
            cause = cause.__cause__ or cause.__context__
        raise cause or _refusal(parser, error) from None


def _refusal(parser: ArgumentParser, error: Exception) -> UsageError:
    sentence = re.sub(r"<class '(.*?)'>", r"\1", " ".join(str(error).split()))
    # If an option may also be null, report only the error of its other type.
    union = re.fullmatch(
        r"(.*?)Does not validate against any of the Union subtypes .*? Errors: - (.*?)"
        r"(?: - .*)? Given value type: .*? Given value: (.*)",
        sentence,
    )
    if union:
        key, wrong, value = union.groups()
        nested = re.search(r'key "(.*?)": (.*)', wrong)
        outer = re.search(r'key "(.*?)"', key)
        if nested and outer:
            sentence = f'Parser key "{outer[1]}.{nested[1]}": {nested[2]}'
        else:
            sentence = f"{key}{wrong}. Got value: {value}"
    if len(sentence) > _LONGEST_ERROR:  # a wrong --config is quoted in full
        sentence = sentence[:_LONGEST_ERROR] + " ..."
    return UsageError(f"{parser.prog.removeprefix('python -m ')}: {sentence}")


def check_machine(
    command: str, *, seed: int = 0, threads: int | None = None, device: str = "cpu"
) -> None:
    """Refuse early what would make torch fail later.

    Raises:
        UsageError: If torch cannot use ``seed``, ``threads`` or ``device``.
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"{command}: expected seed between 0 and 2^63 - 1, got {seed}")
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cores:
        raise UsageError(
            f"{command}: expected threads between 1 and this machine's {cores} cores, got {threads}"
        )
    try:
        kind = torch.device(device)
    except RuntimeError:
        kind = None
    if kind is None or kind.type not in ("cpu", "cuda"):
        raise UsageError(f"{command}: expected device to be cpu or cuda, got {device}")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"{command}: expected device to be available, got {device}, which torch cannot use"
        )


def decode_workers(workers: int | None, device: str, from_files: bool) -> int:
    """Return ``workers``, the number of processes that decode images, or a default if it is None.

    On a CPU the default is 0, so that they do not compete with the network for cores.
    """
    if workers is not None:
        return workers
    return min(8, available_cores()) if from_files and device.startswith("cuda") else 0


def available_cores() -> int:
    """Return the number of cores that ``taskset`` or a container leaves to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_command(main: Callable[[], None]) -> None:
    """Run ``main``. Exit with 0 when it returns, 2 after a `UsageError`, 130 on Ctrl-C."""
    try:
        main()
    except UsageError as error:
        _leave(f"error{signature()}: {error}", 2)
    except (OSError, SafetensorError) as error:
        # Other errors would be bugs. safetensors reports a full disk without a number.
        if isinstance(error, OSError) and error.errno not in _DISK_ERRORS:
            raise
        _leave(f"error{signature()}: expected to write and read files, got: {error}", 2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        _leave(f"error{signature()}: expected sizes that fit in memory, got {reason}", 2)
    except KeyboardInterrupt as interruption:
        _leave(f"interrupted; {interruption}" if interruption.args else "interrupted", 130)


def _leave(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    if world_size() > 1:  # at a normal exit, NCCL would wait for processes that do not answer
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
