"""How a command line ends: a user's mistake is one line and status 2, never a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from jsonargparse import DefaultHelpFormatter

from ..errors import UsageError

__all__ = ["HelpFormatter", "run_command"]


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of a description's examples."""


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
