"""``python -m fdda_ext.export``: the command line of `fdda_ext.commands.export`."""

from .commands.export import main
from .engine import run_command

__all__ = ["main"]

if __name__ == "__main__":
    run_command(main)
