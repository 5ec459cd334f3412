"""Entry point of ``python -m fdda_ext.compare``."""

from .commands.compare import main
from .engine import run_command

__all__ = ["main"]

if __name__ == "__main__":
    run_command(main)
