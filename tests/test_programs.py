"""The programs that make the paper's tables and figures, with their smoke budgets."""

import csv
import importlib
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_fdda import problem, settings
from torch import nn

from fdda_ext.commands.train import parse_arguments
from fdda_ext.engine import RunFolder, format_duration
from fdda_ext.errors import UsageError
from fdda_ext.methods import FDDA

PROGRAMS = Path(__file__).parent.parent / "python"
SMOKE = ("--budget=smoke",)


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a program with the smoke budget in this process; returns its output."""
    monkeypatch.syspath_prepend(PROGRAMS)

    def printed(name: str, out: Path, *arguments: str, budget: tuple[str, ...] = SMOKE) -> str:
        path = str(PROGRAMS / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *budget, f"--out={out}", *arguments])
        capsys.readouterr()
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return printed


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def is_drawing(path: Path) -> bool:
    """Return whether an image has more than 20 colours."""
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_classes_separate_in_deep_layers(run, tmp_path):
    run("figure_s1_s2_bns_tsne", tmp_path)
    rows = table(tmp_path / "bns_separation.csv")
    assert len(rows) == 23
    assert float(rows[-1]["silhouette"]) > 0.1 > float(rows[0]["silhouette"])
    assert float(rows[-1]["incohesion"]) < 0.8 < float(rows[0]["incohesion"])
    assert is_drawing(tmp_path / "bns_tsne.png")
    assert is_drawing(tmp_path / "bns_separation.png")


def test_table_of_accuracy_over_time(run, tmp_path):
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
    assert max(float(row["sevenths"]) for row in points) == 7
    assert is_drawing(folder / "curve.png")


def test_tables_of_size_and_speed(run, tmp_path):
    run("section_3_size_and_speed", tmp_path, "--model", "torchvision:mobilenet_v2")
    folder = tmp_path / "smoke"
    with (folder / "size.csv").open() as file:
        rows = {row[1]: [float(x) for x in row[2:]] for row in list(csv.reader(file))[1:]}
    assert set(rows) == {"float32", "W8A8", "W5A5", "W5A5, ends 8", "W4A4", "W4A4, ends 8"}
    assert rows["float32"][1] == rows["float32"][3] == 1
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
    assert all(float(row["q1"]) <= float(row["ms"]) <= float(row["q3"]) for row in speeds)
    assert is_drawing(folder / "section_3.png")


def test_ablation_repeats_only_missing_runs(run, tmp_path):
    first = run("ablation", tmp_path, "--groups", "layers").splitlines()
    (folder,) = (tmp_path / "smoke").iterdir()
    names = [row["row"] for row in table(folder / "runs.csv")]
    depths = (0.0, 0.25, 0.75)
    assert names == ["full method", *(f"class losses from {n} of the depth" for n in depths)]
    assert is_drawing(folder / "ablation.png")
    # A lost run is repeated in another process, and the table does not change.
    lost = folder / "class losses from 0.25 of the depth, seed 0" / "summary.json"
    kept = folder / "full method, seed 0" / "summary.json"
    (tmp_path / "kept").hardlink_to(kept)  # a file that is written again gets another inode
    lost.unlink()
    again = run("ablation", tmp_path, "--groups", "layers", "--jobs", "2").splitlines()
    assert again[-6:] == first[-6:]
    assert lost.exists()
    assert kept.samefile(tmp_path / "kept")


@pytest.fixture
def programs(monkeypatch):
    """A function that imports a program as a module."""
    monkeypatch.syspath_prepend(PROGRAMS)
    return importlib.import_module


def test_every_row_of_the_ablation_differs_from_the_preset(programs):
    ablation = programs("ablation")
    rows = {row: a for group in ablation.GROUPS.values() for row, a in group.items()}
    assert len({tuple(arguments) for arguments in rows.values()}) == len(rows) == 22

    def section(arguments):
        config = parse_arguments(["--out=x", *arguments])[0]
        return (config.method, config.images_per_class, config.settings.fdda)

    full = section([])
    for row, arguments in rows.items():
        assert section(arguments) != full, row


def test_the_ablation_without_images_has_the_settings_of_fdda(programs):
    arguments = programs("ablation").constants_for_gdfq("short")
    found = parse_arguments(["--out=x", "--method=gdfq", *arguments])[0].settings
    own = parse_arguments(["--out=x", "--method=fdda"])[0].settings
    assert found.gdfq.warmup_iterations == own.fdda.warmup_iterations
    assert found.gdfq.lr == own.fdda.lr
    assert found.distillation == replace(own.distillation, generated_batch=32)


def test_class_depth_sets_the_first_layer_of_the_class_losses():
    # Two BN layers.
    methods = [FDDA(problem(), settings(class_depth=share)) for share in (0.0, 0.25, 0.5, 0.75)]
    assert [method.first_layer for method in methods] == [0, 0, 1, 1]
    assert FDDA(problem(), settings()).first_layer == 0
    with pytest.raises(UsageError, match="class_depth at least 0 and below 1, got 1.0"):
        settings(class_depth=1.0)


def test_runs_with_other_options_are_refused(tmp_path, programs, monkeypatch):
    common = programs("common")
    begun = []

    def train(arguments):
        begun.append(arguments)
        RunFolder(tmp_path / "run", parse_arguments(arguments)[1], resume=False).finish({"top1": 1})

    monkeypatch.setattr(common, "train", train)
    for _ in range(2):
        assert common.finished_run(tmp_path / "run", ["--data=glyphs"])["top1"] == 1
    assert len(begun) == 1
    with pytest.raises(UsageError, match=r"expected the configuration of the resumed .* digits"):
        common.finished_run(tmp_path / "run", ["--data=digits"])


def test_crossings_of_curves_are_described(programs):
    s3 = programs("table_s3_accuracy_over_time")

    def curve(*points):
        return [tuple(np.array(points).T)]

    flat, rising = curve((1.0, 50.0), (7.0, 50.0)), curve((1.0, 40.0), (5.0, 60.0))
    assert np.isnan(s3.at(flat[0], 0.5))
    assert [s3.at(rising[0], part) for part in (1, 3, 5, 7)] == [40, 50, 60, 60]
    text = s3.crossings("a", "b", {"a": flat, "b": rising})
    assert text == "a is ahead of b at first; b overtakes a after 3.01 sevenths."
    text = s3.crossings("a", "b", {"a": flat, "b": curve((1.0, 40.0), (7.0, 45.0))})
    assert text == "a is ahead of b throughout."
    assert s3.crossings("a", "b", {"a": flat, "b": flat}).startswith("a and b are equal")
    jagged = curve(*((1 + i / 2, 50 + (-1) ** i) for i in range(13)))
    assert "cross 12 times" in s3.crossings("a", "b", {"a": jagged, "b": flat})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("table_s3_accuracy_over_time", ["--methods", "minmax"], "train step by step, got minmax"),
        ("table_s3_accuracy_over_time", ["--bits", "W4A4,W3A3"], "a single value, got W4A4,W3A3"),
        ("table_s1_zeroshot_cost", ["--model", "a,b"], "expected a single value, got a,b"),
        ("section_3_size_and_speed", ["--threads", "0"], "threads between 1 and"),
        ("figure_s1_s2_bns_tsne", ["--seed", "-1"], "seed between 0 and"),
        ("figure_s1_s2_bns_tsne", ["--classes", "9"], "classes between 2 and 8"),
        ("figure_s1_s2_bns_tsne", ["--layers", "24"], "layers between 1 and 23, got"),
    ],
)
def test_bad_options_are_refused(run, tmp_path, capsys, name, arguments, message):
    with pytest.raises(SystemExit) as end:
        run(name, tmp_path, *arguments)
    assert end.value.code != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "method", "known", "real"),
    [("table_s1_zeroshot_cost", "gdfq", True, "0"), ("table_s2_ptq_cost", "lapq", False, "71")],
)
def test_tables_of_costs_show_published_costs(run, tmp_path, name, method, known, real):
    run(name, tmp_path, "--methods", method)
    (stem,) = (tmp_path / "smoke").glob("table_s?.csv")
    (row,) = table(stem)
    assert (row["method"], row["real images"]) == (method, real)
    assert (row["published"] != "not known") == known
    (run_of_it,) = table(tmp_path / "smoke" / "comparison.csv")
    assert float(row["seconds here"]) == float(run_of_it["seconds"])
    shown = format_duration(float(row["seconds here"]))
    assert f"| {shown} |" in stem.with_suffix(".md").read_text()


def test_the_page_of_networks_shows_every_stage(run, tmp_path):
    page = tmp_path / "networks.md"
    names = r"torchvision:(squeezenet1_1|mnasnet0_5|vgg11)$"
    arguments = ["--libraries=torchvision", "--names", names, "--image-size=64"]
    printed = run("networks", page, *arguments, "--most-parameters=100", budget=())
    assert "Of 1 networks, 1 are prepared, 1 train, 1 are exported, 1 are bit-identical" in printed
    text = page.read_text()
    assert "| mnasnet0_5 | 2.2 | 64 | yes | yes | yes | yes |  |" in text
    assert "Left out are 2 networks without batch normalisation: squeezenet1_1, vgg11." in text
    assert "torch" in text
    # Known results are not computed again.
    known = page.with_suffix(".jsonl").read_text()
    again = run("networks", page, *arguments, "--most-parameters=100", budget=())
    assert again.splitlines() == printed.splitlines()[-2:]
    assert (page.read_text(), page.with_suffix(".jsonl").read_text()) == (text, known)


def test_a_network_that_hangs_or_dies_does_not_affect_others(programs):
    networks = programs("networks")
    options = SimpleNamespace(image_size=32, memory=8.0, most_parameters=120.0, minutes=1e-9)
    worker = networks.Worker(options)
    question = {"inspect": {"name": "torchvision:squeezenet1_1", "family": "squeezenet"}}
    assert worker.ask(question) == {"failed": "start: takes more than 1e-09 minutes"}
    options.minutes = 60
    answer = worker.ask(question)
    assert (answer["left_out"], answer["parameters"]) == ("no batch normalisation", 1_235_496)
    worker.process.kill()
    worker.process.wait()
    assert "memory" in worker.ask(question)["failed"]
    worker.close()


@pytest.mark.parametrize(
    ("fails", "crash", "reason"),
    [
        (UsageError("prepare: expected this, got that"), False, "prepare: expected this, got that"),
        (KeyError("x"), True, "crash: KeyError: 'x'"),
    ],
)
def test_errors_other_than_usage_errors_are_crashes(programs, monkeypatch, fails, crash, reason):
    networks = programs("networks")

    def fail(*_):
        raise fails

    monkeypatch.setattr(networks, "settled", lambda name, size: nn.Flatten())
    monkeypatch.setattr(networks, "prepare", fail)
    told = []
    outcome = networks.check(networks.Candidate("a:b", "a", image_size=8), told.append)
    assert outcome == networks.Outcome("a:b", prepared=False, reason=reason, crash=crash)
    assert told == ["float network", "preparation"]


def test_the_smallest_networks_of_a_family_are_run(programs):
    networks = programs("networks")
    sizes = {"a": [3, 1, 2], "b": [5]}
    found = [
        networks.Candidate(f"x:{family}{n}", family, n) for family in sizes for n in sizes[family]
    ]
    found.append(networks.Candidate("x:a0", "a", 0, left_out="attention"))
    assert [c.name for c in networks.chosen(found, 2)] == ["x:a1", "x:a2", "x:b5"]
    assert len(networks.chosen(found, None)) == 4
