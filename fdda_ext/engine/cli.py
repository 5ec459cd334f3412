"""How a command line ends: a user's mistake is one line and status 2, never a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from ..errors import UsageError

__all__ = ["build_parser", "parse_or_refuse", "run_command"]


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of a description's examples."""


def build_parser(command: str, description: str, **options: Any) -> ArgumentParser:
    """A parser of typed options for ``python -m command``, see `parse_or_refuse`."""
    return ArgumentParser(
        prog=f"python -m {command}",
        usage=f"python -m {command} [--option value ...]",
        description=description,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        **options,
    )


def parse_or_refuse(parser: ArgumentParser, arguments: Sequence[str] | None) -> Namespace:
    """Parse the command line; a mistake is a `UsageError` of one sentence."""
    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        sentence = " ".join(str(error).split())
        raise UsageError(f"{parser.prog.removeprefix('python -m ')}: {sentence}") from None


def run_command(main: Callable[[], None]) -> None:
    """Run ``main``; leave with 0 when it returns, 2 after a `UsageError`, 130 on Ctrl-C."""
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
