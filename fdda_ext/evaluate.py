"""Entry point of ``python -m fdda_ext.evaluate``."""

from .commands.evaluate import main
from .engine import run_command

__all__ = ["main"]

if __name__ == "__main__":
    run_command(main)
