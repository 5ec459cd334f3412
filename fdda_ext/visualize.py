"""Entry point of ``python -m fdda_ext.visualize``."""

from .commands.visualize import main
from .engine import run_command

__all__ = ["main"]

if __name__ == "__main__":
    run_command(main)
