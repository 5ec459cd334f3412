"""All stages at 224x224 with a torchvision network, from images to an integer program."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_rehearsal_with_ten_classes_runs_all_stages(tmp_path):
    command = [
        *(sys.executable, ROOT / "python" / "rehearse_imagenet.py", "--out", tmp_path),
        *("--classes", "10", "--per-class", "2", "--val-per-class", "1", "--epochs", "1"),
        *("--iterations", "4", "--train-args"),
        "--settings.fdda.generator.channels=16 --settings.fdda.batch=2 "
        "--settings.distillation.real_batch=2 --settings.distillation.generated_batch=2 "
        "--evaluate_every 2 --evaluate_limit 10 --baselines=[] --no_report",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"generator", "centralised", "distorted", "student", "top1"} <= set().union(*metrics)
    # The program has exactly the accuracy of the student.
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = re.search(
        r"top-1 ([\d.]+) %, top-5 ([\d.]+) %", (tmp_path / "evaluated.txt").read_text()
    )
    assert found is not None
    assert [f"{summary['top1']:.2f}", f"{summary['top5']:.2f}"] == list(found.groups())
    measured = json.loads((tmp_path / "rehearsal.json").read_text())
    assert list(measured) == ["draw", "pretrain", "FDDA", "export", "evaluate"]
    assert all(stage["peak_mib"] > 50 for stage in measured.values())
    # A second call skips all stages.
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout
