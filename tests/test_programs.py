"""The programs that make the paper's tables and figures, each with its budget of seconds."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_fdda import problem, settings

from fdda_ext.train import parse_arguments

PROGRAMS = Path(__file__).parent.parent / "python"


def run(name: str, out: Path, *arguments: str) -> str:
    """What a program prints that is run with the smoke budget."""
    done = subprocess.run(
        [
            *(sys.executable, PROGRAMS / f"{name}.py", "--budget=smoke", f"--out={out}"),
            *arguments,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def is_drawing(path: Path) -> bool:
    """Whether a picture has more than one colour."""
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_classes_separate_with_depth(tmp_path):
    run("figure_s1_s2_bns_tsne", tmp_path)
    rows = table(tmp_path / "bns_separation.csv")
    assert len(rows) == 23
    assert float(rows[-1]["silhouette"]) > 0.1 > float(rows[0]["silhouette"])
    assert float(rows[-1]["incohesion"]) < 0.8 < float(rows[0]["incohesion"])
    assert is_drawing(tmp_path / "bns_tsne.png")
    assert is_drawing(tmp_path / "bns_separation.png")


def test_accuracy_over_time(tmp_path):
    run("table_s3_accuracy_over_time", tmp_path)
    folder = tmp_path / "smoke"
    points = table(folder / "curve.csv")
    assert {row["method"] for row in points} == {"fdda", "distill"}
    assert all(0 <= float(row["sevenths"]) <= 7 for row in points)
    (fdda, distill) = table(folder / "table.csv")
    # The last measurement is the run's own result.
    (summary,) = folder.glob("*/fdda-seed0/summary.json")
    assert float(fdda["7/7 of the budget"]) == pytest.approx(
        json.loads(summary.read_text())["top1"], abs=0.005
    )
    text = (folder / "table.md").read_text()
    assert "ahead of" in text or "equal as far" in text
    assert is_drawing(folder / "curve.png")


def test_size_and_speed(tmp_path):
    run("section_3_size_and_speed", tmp_path, "--model", "torchvision:mobilenet_v2")
    folder = tmp_path / "smoke"
    with (folder / "size.csv").open() as file:
        rows = {row[1]: [float(x) for x in row[2:]] for row in list(csv.reader(file))[1:]}
    assert set(rows) == {"W8A8", "W5A5", "W5A5, ends 8", "W4A4", "W4A4, ends 8"}
    for bits in (8, 5, 4):
        counted, less, stored, _ = rows[f"W{bits}A{bits}"]
        assert less == pytest.approx(32 / bits, abs=0.01)
        assert counted < stored
    for kind in (0, 2):  # counted, stored
        assert rows["W8A8"][kind] > rows["W5A5"][kind] > rows["W4A4"][kind]
        assert rows["W4A4, ends 8"][kind] > rows["W4A4"][kind]
    speeds = table(folder / "speed.csv")
    assert [row["by"] for row in speeds if row["by"].startswith("fdda")] == [
        f"fdda_ext W{bits}A{bits}" for bits in (8, 5, 4)
    ]
    assert all(float(row["ms"]) > 0 for row in speeds)
    assert is_drawing(folder / "section_3.png")


def test_ablation_goes_on_run_by_run(tmp_path):
    first = run("ablation", tmp_path, "--groups", "layers").splitlines()
    (folder,) = (tmp_path / "smoke").iterdir()
    names = [row["row"] for row in table(folder / "runs.csv")]
    assert names == ["full method", *(f"class losses from {n}/4 of the depth" for n in (0, 1, 3))]
    assert is_drawing(folder / "ablation.png")
    # One run is lost; the others stay as they are, and so does the table.
    lost = folder / "class losses from 1 of 4 of the depth, seed 0" / "summary.json"
    kept = folder / "full method, seed 0" / "summary.json"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert run("ablation", tmp_path, "--groups", "layers").splitlines()[-6:] == first[-6:]
    assert lost.exists()
    assert kept.stat().st_mtime_ns == before


def test_every_row_of_the_ablation_is_another_setting_that_there_is(monkeypatch):
    monkeypatch.syspath_prepend(PROGRAMS)
    import ablation

    rows = [arguments for group in ablation.GROUPS.values() for arguments in group.values()]
    assert len({tuple(arguments) for arguments in rows}) == len(rows) == 22
    options = [a for arguments in rows for a in arguments if not a.startswith("--method")]
    parse_arguments(["--out=x", *options])


def test_the_class_losses_begin_where_they_are_told(monkeypatch):
    monkeypatch.syspath_prepend(PROGRAMS)
    import ablation

    # Two BN layers.
    methods = [ablation.class_losses_from(quarter)(problem(), settings()) for quarter in range(4)]
    assert [method.first_layer for method in methods] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "method", "known", "real"),
    [("table_s1_zeroshot_cost", "gdfq", True, "0"), ("table_s2_ptq_cost", "lapq", False, "71")],
)
def test_costs_stand_beside_published_ones(tmp_path, name, method, known, real):
    run(name, tmp_path, "--methods", method)
    (stem,) = (tmp_path / "smoke").glob("table_s?.csv")
    (row,) = table(stem)
    assert (row["method"], row["real images"]) == (method, real)
    assert (row["published"] != "not known") == known
    assert float(row["minutes here"]) > 0
