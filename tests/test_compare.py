"""fdda_ext.compare: its runs, the budget, and the table of given results."""

import csv
import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from fdda_ext import methods
from fdda_ext.commands import compare, train
from fdda_ext.errors import UsageError
from fdda_ext.methods import pace
from fdda_ext.methods.base import Phase

SETTING = compare.Setting("glyphs_resnet", "W3A3", "same", 1)


def parse(*arguments: str) -> tuple[compare.CompareConfig, list[str]]:
    return compare.parse(arguments)


def names(config: compare.CompareConfig) -> list[str]:
    return [
        f"{cell.folder(Path())} {cell.row}"
        for setting in compare.settings_of(config)
        for cell in compare.cells_of(config, setting)
    ]


def test_every_combination_is_a_separate_run():
    config, rest = parse(
        *("--methods", "minmax,gdfq,fdda", "--bits=W3A3,W4A4", "--ends=[same,8]"),
        *("--mode", "published,common", "--seeds", "0,5", "--images-per-class", "1,16"),
        *("--", "--test-limit", "71"),
    )
    assert rest == ["--test-limit", "71"]
    found = names(config)
    # Both modes are the same for minmax, which has no student step, and for FDDA.
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 2 * (1 + 2 + 1)
    assert "glyphs_resnet-W3A3/gdfq-seed0 gdfq" in found
    assert "glyphs_resnet-W4A4-ends8-16images/gdfq-common-seed5 gdfq (common step)" in found


def test_runs_have_their_settings_and_the_common_step_is_that_of_fdda():
    config, _ = parse("--methods=gdfq", "--mode=published,common", "--bits=W3A5", "--ends=8")
    (setting,) = compare.settings_of(config)
    published, common = (
        train.parse_arguments(compare.run_arguments(config, cell, ["--test-limit=9"]))[0]
        for cell in compare.cells_of(config, setting)
        if cell.seed == 2
    )
    fdda, _ = train.parse_arguments([])
    for run in (published, common):
        q = run.quantization
        assert (q.weight_bits, q.activation_bits, q.first_last_bits) == (3, 5, 8)
        assert (run.method, run.seed, run.test_limit, run.baselines) == ("gdfq", 2, 9, [])
    assert common.settings.distillation == fdda.settings.distillation
    assert published.settings.distillation != fdda.settings.distillation
    assert common.settings.gdfq == published.settings.gdfq


def test_a_variant_is_its_method_with_other_settings(monkeypatch):
    config, _ = parse(
        *("--methods=gdfq,gdfq+bns_weight=0+distillation.weight=7", "--seeds=0", "--budget=9"),
        *("--mode=published,common",),
    )
    (setting,) = compare.settings_of(config)
    cells = list(compare.cells_of(config, setting))
    assert len({cell.folder(Path()) for cell in cells}) == len({c.row for c in cells}) == 4
    assert cells[2].row == "gdfq+bns_weight=0+distillation.weight=7"
    whole, variant = (
        train.parse_arguments(compare.run_arguments(config, cell, []))[0].settings
        for cell in (cells[0], cells[2])
    )
    assert (variant.gdfq.bns_weight, variant.distillation.weight) == (0, 7)
    assert replace(variant.gdfq, bns_weight=whole.gdfq.bns_weight) == whole.gdfq
    assert cells[2].pace == cells[0].pace != cells[1].pace == cells[3].pace


@pytest.mark.parametrize(
    ("fixed", "whole", "share"), [(10.0, 100.0, 0.5), (0.0, 30.0, 2.0), (0.0, 0.0, 64.0)]
)
def test_the_budget_minus_the_fixed_time_gives_the_schedule_share(fixed, whole, share):
    assert compare.share_in_budget(compare.Pace(fixed, whole, 8), 60, "fdda") == share
    # A method that does not train has no schedule to stretch.
    assert compare.share_in_budget(compare.Pace(fixed, 0, 0), 60, "fdda") == 1


def test_a_budget_that_preparation_uses_up_is_refused():
    with pytest.raises(
        UsageError, match="budget to exceed the 1.02 min that fdda needs .*, got 60 s"
    ):
        compare.share_in_budget(compare.Pace(61, 1, 8), 60, "fdda")


def test_trials_are_announced_and_kept(monkeypatch, tmp_path):
    """Expect one trial per method and network, of at most a tenth of the budget."""
    tried = []

    def told(config, most):
        tried.append((config.method, config.model, most))
        return compare.Pace(10.0, 100.0, 8)

    monkeypatch.setattr(compare, "trial", told)
    config, rest = parse(
        *("--methods=minmax,fdda,fdda+batch=16", "--models=glyphs_resnet,glyphs_mobilenet"),
        *("--bits=W4A4,W3A3", "--budget=60", f"--out={tmp_path}"),
    )
    output = io.StringIO()
    shares = compare.all_shares(config, rest, Console(file=output, width=200))
    assert tried == [(m, n, 6) for n in config.models for m in ("minmax", "fdda")]
    assert set(shares.values()) == {0.5}
    assert "trials of 4 schedules: at most 6.00 s each, 24.0 s in all" in output.getvalue()
    assert "glyphs_resnet/fdda: 1.83 min for the whole schedule, estimated" in output.getvalue()
    assert compare.all_shares(config, rest, Console(file=output)) == shares
    assert len(tried) == 4
    # The result of a trial is kept when the next one fails.
    (tmp_path / "budget.json").unlink()
    monkeypatch.setattr(
        compare, "trial", lambda c, most: told(c, most) if c.method == "minmax" else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        compare.all_shares(config, rest, Console(file=output))
    kept = json.loads((tmp_path / "budget.json").read_text())["shares"]
    assert kept == {"glyphs_resnet/minmax": 0.5}


def test_student_images_gives_all_methods_the_same_number_of_images():
    config, _ = parse("--student-images=960")
    for method, seen in (("fdda", 960), ("gdfq", 960), ("distill", 960)):
        cell = compare.Cell(SETTING, method, "published", 0)
        arguments = compare.run_arguments(config, cell, [])
        share = compare.schedule_share(config, cell, [])
        run, _ = train.parse_arguments([*arguments, f"--schedule_share={share}"])
        step = run.scheduled.distillation
        assert step.steps * (step.real_batch + step.generated_batch) == seen
    cell = compare.Cell(SETTING, "minmax", "published", 0)
    assert compare.schedule_share(config, cell, []) == 1


def test_share_is_the_schedule_share_of_every_run():
    for arguments, share in (["--share=0.25"], 0.25), ([], 1.0):
        config, _ = parse(*arguments)
        cell = compare.Cell(SETTING, "fdda", "published", 0)
        assert compare.schedule_share(config, cell, []) == share


@pytest.mark.parametrize(
    ("preparing", "inside", "most", "trials", "fixed", "whole"),
    [
        (5, 0, 1e9, [1200, 3], 5, 2400),
        # The first step takes time that does not depend on the schedule.
        (5, 200, 1e9, [1200, 3], 205, 2400),
        # The trial ends after the step in which its time is over.
        (5, 200, 30, [1200, 3], 5, 202 * 1200),
        (100, 0, 10, [1200, 3], 100, 2400),
    ],
)
def test_trials_separate_preparation_from_iterations_within_their_time(
    monkeypatch, preparing, inside, most, trials, fixed, whole
):
    """Use a fake clock: an iteration takes 2 s."""
    now, lengths, loaded = [0.0], [], []

    class Slow:
        def __init__(self, iterations):
            self.iterations = iterations
            self.phases = [Phase(iterations)]
            lengths.append(iterations)

        def step(self, iteration):
            now[0] += 2 + (inside if iteration == 0 else 0)

    def build(name, problem, settings):
        now[0] += preparing
        return Slow(settings.distillation.steps)

    real = compare.build_problem
    monkeypatch.setattr(compare, "build_problem", lambda c: loaded.append(c) or real(c))
    monkeypatch.setattr(compare, "_prepared", {})
    monkeypatch.setattr(pace, "_FEW_IMAGES", 1000)
    monkeypatch.setattr(methods, "build_method", build)
    monkeypatch.setattr(compare.time, "process_time", lambda: now[0])
    config, _ = train.parse_arguments(["--settings.distillation.steps=1200", "--threads=1"])
    found = compare.trial(config, most)
    assert lengths == trials
    assert found.fixed == pytest.approx(fixed, rel=0.15)
    assert found.whole == pytest.approx(whole, rel=0.05)
    assert now[0] <= max(most + 2, 2 * preparing + 2 + inside)
    # The next method uses the same network and images.
    gdfq, _ = train.parse_arguments(["--method=gdfq", "--threads=1", "--bits=W3A3"])
    compare.trial(gdfq, most)
    assert len(loaded) == 1


def test_trials_run_in_parallel_processes(tmp_path):
    """Run trials in two processes; the share depends on the machine."""
    config, rest = parse(
        *("--methods=minmax,distill", "--budget=600", "--jobs=2", f"--out={tmp_path}"),
        *("--", "--settings.distillation.steps=64"),
    )
    shares = compare.all_shares(config, rest, Console(file=io.StringIO()))
    assert shares["glyphs_resnet/minmax"] == 1
    assert 1 / 64 <= shares["glyphs_resnet/distill"] <= 64


def plant(folder: Path, top1: float, **changes) -> None:
    folder.mkdir(parents=True)
    row = train.Row("x", top1, 99.0, 100, 12.0, 6, 6, 71, 640, 500, 92.0)
    summary = {**row.__dict__, **changes, "config": "0"}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_the_table_has_means_and_spreads_of_the_seeds(tmp_path):
    config, _ = parse(
        "--methods=gdfq,fdda,zaq", "--seeds=0,1,2", "--bits=W3A3", f"--out={tmp_path}"
    )
    folder = tmp_path / "glyphs_resnet-W3A3"
    for seed, (gdfq, fdda) in enumerate([(80.0, 90.0), (81.0, 90.5), (85.0, 91.0)]):
        plant(folder / f"gdfq-seed{seed}", gdfq, peak_memory=500 + seed)
        plant(folder / f"fdda-seed{seed}", fdda)
    shares = {f"glyphs_resnet/{method}": 0.5 for method in config.methods}
    text = compare.write_results(config, shares)
    assert "| gdfq | 82.00 ± 2.65 | 10.00 | 12.0 s | 71 | 640 | 502 | 0.5 |" in text
    assert "| fdda | **90.50 ± 0.50** | 1.50 | 12.0 s | 71 | 640 | 500 | 0.5 |" in text
    assert "zaq" not in text, "zaq has no finished run"
    assert (tmp_path / "comparison.md").read_text() == text
    lines = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [float(line["top1"]) for line in lines] == [80.0, 81.0, 85.0, 90.0, 90.5, 91.0]
    assert {line["bits"] for line in lines} == {"W3A3"}
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_a_trial_of_a_method_with_labels_has_images_of_all_71_classes():
    config, _ = train.parse_arguments(["--method=fdda", "--settings.fdda.generator.channels=4"])
    assert compare.trial(config, 0.01).iterations >= 1


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = [
        *("--methods=noise,gdfq", "--mode=published,common", "--seeds=0", "--bits=W3A3"),
        *("--student-images=64", "--jobs=2", f"--out={out}"),
        *("--", "--test_limit=71", "--settings.gdfq.generator.channels=4"),
    ]
    compare.main(arguments)
    lines = list(csv.DictReader((out / "comparison.csv").open()))
    assert [(line["name"], line["mode"], line["real_images"]) for line in lines] == [
        ("noise", "published", "0"),
        ("gdfq", "published", "0"),
        ("gdfq", "common", "0"),
    ]
    assert [int(line["synthetic_images"]) for line in lines] == [0, 64, 64]
    assert all(int(line["peak_memory"]) > 100 for line in lines)
    stored = yaml.safe_load((out / "glyphs_resnet-W3A3/gdfq-seed0/config.yaml").read_text())
    step = train.parse_arguments(["--method=gdfq"])[0].settings.distillation
    assert stored["schedule_share"] == 64 / (step.steps * step.generated_batch)
    assert "gdfq (common step)" in capsys.readouterr().out
    for name in ("comparison", "glyphs_resnet-images", "glyphs_resnet-distances"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

    monkeypatch.setattr(subprocess, "run", None)
    compare.main(arguments)
    with pytest.raises(UsageError, match="expected student_images as in the runs .* 64, got 65"):
        compare.main([a.replace("=64", "=65") for a in arguments])


def test_a_run_that_fails_is_named_and_the_others_continue(tmp_path):
    arguments = ["--methods=minmax", "--models=nonsense,glyphs_resnet", "--seeds=0"]
    with pytest.raises(UsageError, match=r"got 1 that did not; .*error: model: expected one of"):
        compare.main([*arguments, f"--out={tmp_path}", "--", "--test_limit=71"])
    assert len(list(csv.DictReader((tmp_path / "comparison.csv").open()))) == 1


@pytest.mark.parametrize(
    "arguments", [["--methods=minmax,gdfq+nonsense=1"], ["--methods=minmax", "--", "--nonsense=1"]]
)
def test_unknown_arguments_are_refused_before_the_first_run(tmp_path, arguments):
    with pytest.raises(UsageError, match="unrecognized arguments: .*nonsense=1"):
        compare.main([f"--out={tmp_path / 'out'}", *arguments])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=fdd"], "method to be one of .*, got fdd; did you mean fdda"),
        (["--methods=gdfq+bns_weight"], "form METHOD.NAME=VALUE, got gdfq.bns_weight"),
        (["--methods=[]"], "methods to name at least one, got none"),
        (["--seeds=1,1"], r"seeds to differ, got \[1, 1\]"),
        (["--bits=W9A4"], "bits of the form W4A4, each between 2 and 8, got W9A4"),
        (["--ends=9"], "ends to be same or 2 to 8, got 9"),
        (["--budget=0"], "budget above 0, got 0"),
        (["--budget=1", "--student_images=1"], "one of budget, .*, got 1.0, 1, None"),
        (["--share=0"], "share above 0, got 0"),
        (["--preset=long"], "preset to be one of .*, got long"),
        (["--mode=mine"], "mode"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse(*arguments)
