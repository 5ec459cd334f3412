"""What the programs beside this file share: runs that are not repeated, and tables."""

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdda_ext.engine import RunFolder
from fdda_ext.train import main as train


def finished_run(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """What the run in ``folder`` ended with: begun with ``arguments``, gone on with, or there."""
    if not RunFolder.is_finished(folder):
        begun = (folder / "config.yaml").exists()
        train(["--no-report", f"--out={folder}", *(["--resume"] if begun else arguments)])
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and, of several values, standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_table(
    stem: Path, title: str, header: Sequence[str], rows: Sequence[Sequence[object]], note: str = ""
) -> None:
    """A table as .csv and as .md, which is printed, too; all columns but the first hold numbers."""
    write_csv(stem.with_suffix(".csv"), header, rows)
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    lines.insert(1, "|---" + "|---:" * (len(header) - 1) + "|")
    text = "\n".join([f"### {title}", "", *lines, *(["", note] if note else [])]) + "\n"
    stem.with_suffix(".md").write_text(text)
    print(text)
