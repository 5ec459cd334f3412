"""``python -m fdda_ext.pretrain``: the command line of `fdda_ext.commands.pretrain`."""

from .commands.pretrain import main
from .engine import run_command

__all__ = ["main"]

if __name__ == "__main__":
    run_command(main)
