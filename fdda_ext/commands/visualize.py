"""``python -m fdda_ext.visualize RUN``: write the report of a run as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from ..data import takes_preprocessing
from ..engine import RunFolder, build_parser, check_machine, parse_or_refuse
from ..errors import UsageError
from .train import REPORT_IMAGES, build_problem, inputs_digest, parse_arguments, report

__all__ = ["main"]

_DESCRIPTION = """\
Write RUN/report.html again: settings, accuracies, losses, generated images, errors by layer,
predictions, size and, after an export, the size on disk and the speed.

examples:
  python -m fdda_ext.visualize runs/a
  python -m fdda_ext.visualize runs/a/baselines/mse --images 10000
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser("fdda_ext.visualize", _DESCRIPTION)
    parser.add_argument("run", help="run folder, or the folder of one of its baselines")
    parser.add_argument(
        "--images", type=int, default=REPORT_IMAGES, help="number of images to compare on"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads, also for timing the program")
    parser.add_argument(
        "--max_unreadable", type=int, default=0, help="number of damaged images to skip"
    )
    options = parse_or_refuse(parser, arguments)
    check_machine("visualize", threads=options.threads, device=options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.images < 1:
        raise UsageError(f"visualize: expected images at least 1, got {options.images}")
    names = ("device", "max_unreadable")
    here = [f"--{name}={getattr(options, name)}" for name in names]
    config, stored = parse_arguments(["--resume", f"--out={options.run}", *here])
    problem, opened = build_problem(config)
    preprocessing = opened.preprocessing if takes_preprocessing(config.data) else None
    folder = RunFolder(Path(options.run), stored, resume=True, inputs=inputs_digest(problem))
    folder.summary()  # refuses a run with other weights or images
    path = report(config, problem, preprocessing, folder.path, options.images)
    Console().print(f"written to {path}", highlight=False)
