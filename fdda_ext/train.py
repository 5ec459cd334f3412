"""``python -m fdda_ext.train``: the command line of `fdda_ext.commands.train`."""

from .commands.train import main
from .engine import run_command

__all__ = ["main"]

if __name__ == "__main__":
    run_command(main)
