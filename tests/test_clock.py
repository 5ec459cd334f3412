"""Results must not depend on the speed of the machine: only measured times may.

The package runs with a clock that stands still, like a coarse one on a fast machine, and with one
that jumps, as after the machine sleeps or its date is set.
"""

import csv
import json
import math
import os
import re
import runpy
import sys
import time
from io import StringIO
from pathlib import Path

import clocks
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from fdda_ext.commands import compare, export, train, visualize
from fdda_ext.data import listing, load_dataset
from fdda_ext.engine import (
    Profile,
    RunFolder,
    Stopwatch,
    format_duration,
    format_significant,
    loop,
    train as run_loop,
)
from fdda_ext.errors import UsageError
from fdda_ext.visualization import quartiles, time_interleaved

PROGRAMS = Path(__file__).parent.parent / "python"
#: Arguments for a run of a few seconds.
QUICK = [
    *("--threads=1", "--test_limit=71", "--baselines=[]", "--evaluate_every=4"),
    *("--settings.distillation.steps=6", "--settings.fdda.warmup_iterations=2"),
    *("--settings.fdda.generator.channels=4", "--settings.fdda.batch=8"),
]


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=clocks.KINDS)
def clock(request, tmp_path):
    """Each kind of fake clock, installed for the test."""
    with clocks.running(request.param, tmp_path / "clock"):
        yield request.param


# ---- formatted durations -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0, "0 s"),
        (3e-13, "0.000300 ns"),
        (1e-9, "1.00 ns"),
        (2.5e-6, "2.50 µs"),
        (0.0009996, "1.00 ms"),
        (0.004, "4.00 ms"),
        (0.3, "300 ms"),
        (0.9999, "1.00 s"),
        (12, "12.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1.00 min"),
        (60, "1.00 min"),
        (90, "1.50 min"),
        (3599, "1.00 h"),
        (3590, "59.8 min"),
        (90 * 60, "1.50 h"),
        (1e6, "278 h"),
        (1e7, "2778 h"),
        (math.inf, "inf s"),
    ],
)
def test_durations_have_a_suitable_unit(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.004, "0.00400"), (0.99999, "1.00"), (9.999, "10.0"), (99.95, "100")),
        *((123.4, "123"), (1234.5, "1234"), (-0.25, "-0.250"), (1e-9, "0.00000000100")),
    ],
)
def test_values_keep_their_significant_digits(value, text):
    assert format_significant(value) == text


def test_no_positive_duration_is_shown_as_zero():
    for exponent in range(-15, 9):
        text = format_duration(1.26 * 10.0**exponent)
        assert re.search(r"[1-9]", text), text
        assert "e" not in text, text


def test_a_stopwatch_does_not_run_backwards_nor_in_a_pause(clock):
    watch = Stopwatch(7.0)
    read = [watch.seconds for _ in range(50)]
    watch.pause()
    paused = [watch.seconds for _ in range(50)]
    watch.resume()
    read += paused + [watch.seconds for _ in range(50)]
    assert read[0] >= 7
    assert read == sorted(read)
    assert len(set(paused)) == 1
    assert (read[-1] == 7) == (clock == "still")


# ---- commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The folder of a run with the real clock."""
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("real") / "run"
    train.main([*QUICK, "--no-report", f"--out={out}"])
    torch.set_num_threads(threads)
    return out


def without_times(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of a run without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_a_run_gives_the_same_result_with_any_clock(clock, real, tmp_path):
    out = tmp_path / "run"
    train.main([*QUICK, "--no-report", f"--out={out}"])
    assert without_times(out) == without_times(real)
    for name in ("student", "generator"):
        found, expected = (load_file(f / f"{name}.safetensors") for f in (out, real))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    seconds = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").open()]
    assert seconds == sorted(seconds)
    found, expected = (json.loads((f / "summary.json").read_text()) for f in (out, real))
    assert {k for k in expected if found[k] != expected[k]} <= {"seconds", "peak_memory"}
    # The export and the report also measure times.
    export.main(["--run", str(out), "--profile=1"])
    visualize.main([str(out), "--images=8"])
    assert "quartiles, ms" in (out / "report.html").read_text()


def test_a_stopped_run_resumes_with_any_clock(clock, real, tmp_path):
    out = tmp_path / "run"
    train.main([*QUICK, "--no-report", "--max_time=0", f"--out={out}"])
    assert not (out / "summary.json").exists()
    train.main(["--resume", "--no-report", "--threads=1", f"--out={out}"])
    assert without_times(out) == without_times(real)


def test_profiling_works_with_any_clock(clock, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*QUICK, "--profile=3", f"--out={out}"])
    assert "anything else" in (out / "profile.txt").read_text()
    assert "whole schedule: about" in capsys.readouterr().out


def test_a_profile_that_took_no_time_can_be_shown():
    measured = Profile(torch.device("cpu"))
    measured.seconds["step"] = 0.0
    measured.iterations = [0.0, 0.0]
    console = Console(file=StringIO(), width=80)
    console.print(measured.table())
    assert "mean of 2 iterations: 0 s" in console.file.getvalue()


def test_equal_budgets_work_with_any_clock(clock, tmp_path):
    """Check that a trial gives a schedule share, or refuses the budget, but never crashes."""
    options = ["--method=distill", "--threads=1", "--settings.distillation.steps=12"]
    config, _ = train.parse_arguments(options)
    refusal = ""
    try:
        share = compare.share_in_budget(compare.trial(config, 3e6), 3e7, "distill")
    except UsageError as error:
        refusal, share = str(error), 1.0
    assert not refusal or "expected budget to exceed" in refusal
    assert 1 / 64 <= share <= 64
    if clock == "still":
        assert not refusal
        assert share == 64, "a method that takes no time gets the largest share"


def test_a_method_without_a_schedule_is_not_stretched(clock):
    config, _ = train.parse_arguments(["--method=minmax", "--threads=1"])
    assert compare.share_in_budget(compare.trial(config, 0.1), 1, "minmax") == 1


def test_calls_can_be_timed_with_any_clock(clock):
    times = time_interleaved({"a": lambda: None, "b": lambda: None}, 5)
    assert all(len(seconds) == 5 and min(seconds) >= 0 for seconds in times.values())
    assert (sum(map(sum, times.values())) == 0) == (clock == "still")
    assert len(quartiles(times["a"])) == 3


# ---- the loop -----------------------------------------------------------------------------------


class Counting:
    """A method that counts how often its state was stored."""

    iterations = 40
    part = ""

    def __init__(self):
        self.value = torch.zeros(1)
        self.stored = 0

    def step(self, iteration):
        self.value = self.value + 1
        return {"value": self.value}

    def state_dict(self):
        self.stored += 1
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_checkpoints_follow_the_clock_but_the_last_is_always_written(clock, tmp_path):
    counting = Counting()
    progress = run_loop(counting, RunFolder(tmp_path / "a", "", resume=False), description="a")
    assert progress.iterations == counting.value == 40
    assert (counting.stored == 1) == (clock == "still")
    assert (progress.seconds == 0) == (clock == "still")


def test_one_slow_checkpoint_does_not_delay_the_next_for_days(tmp_path, monkeypatch):
    """Let the disk hang for an hour, which must not delay the next checkpoint for two days."""
    now, stored = [0.0], []

    def save(path, state):
        stored.append(now[0])
        now[0] += 3600.0 if len(stored) == 1 else 0.01

    class Slow(Counting):
        iterations = 100

        def step(self, iteration):
            now[0] += 60.0
            return super().step(iteration)

    monkeypatch.setattr(loop, "save_state", save)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run_loop(Slow(), RunFolder(tmp_path / "a", "", resume=False), description="a")
    assert stored[1] - stored[0] == pytest.approx(3600 + 1800, abs=60)


# ---- files --------------------------------------------------------------------------------------


def test_file_lists_are_correct_with_any_clock(clock, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "CACHE_FROM", 1)
    place = tmp_path / "data" / "val" / "a"
    place.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (20, 20)).save(place / f"{i}.png")
        os.utime(place, (1e9 + i, 1e9 + i))  # the file system's clock may be coarse
        assert len(load_dataset(f"folder:{tmp_path / 'data'}", "test", image_size=16)) == i + 1


# ---- programs -----------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch, capsys):
    """A function that runs a program in this process and returns its output."""
    monkeypatch.syspath_prepend(PROGRAMS)

    def printed(name: str, *arguments: str) -> str:
        path = str(PROGRAMS / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        capsys.readouterr()
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return printed


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("clock", ["still"], indirect=True)
def test_cost_tables_work_when_the_clock_stands_still(clock, program, tmp_path):
    printed = program(
        "table_s2_ptq_cost", "--budget=smoke", "--methods", "lapq", f"--out={tmp_path}"
    )
    (row,) = table(tmp_path / "smoke" / "table_s2.csv")
    (run,) = table(tmp_path / "smoke" / "comparison.csv")
    assert float(row["seconds here"]) == float(run["seconds"])
    assert float(row["seconds here"]) == 0, "the run reads the fake clock"
    assert "| 0 s |" in printed


def test_accuracy_over_time_works_with_any_clock(clock, program, tmp_path):
    program(
        *("table_s3_accuracy_over_time", "--budget=smoke", "--methods", "distill"),
        f"--out={tmp_path}",
    )
    points = table(tmp_path / "smoke" / "curve.csv")
    sevenths = [float(row["sevenths"]) for row in points]
    assert sevenths == sorted(sevenths)
    assert sevenths[-1] == 7
    assert all(0 <= x <= 7 for x in sevenths)
    assert len(points) == 4, "a measurement after every step"


@pytest.mark.parametrize("clock", ["still"], indirect=True)
def test_speeds_are_empty_when_the_clock_stands_still(clock, program, tmp_path):
    program(
        *("section_3_size_and_speed", "--budget=smoke", "--model", "torchvision:mobilenet_v2"),
        f"--out={tmp_path}",
    )
    rows = table(tmp_path / "smoke" / "speed.csv")
    assert all(float(row["ms"]) >= 0 for row in rows)
    assert {row["images a second"] for row in rows} == {""}
    assert (tmp_path / "smoke" / "section_3.png").exists()


def test_every_module_that_reads_a_clock_is_known():
    """Require that every module that reads a clock is listed here, and tested in this file."""
    package = PROGRAMS.parent / "fdda_ext"
    readers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import time\b|from time import)", path.read_text(), re.M)
    }
    assert readers == {
        "commands/compare.py",
        "data/listing.py",
        "engine/duration.py",
        "engine/loop.py",
        "engine/profiling.py",
        "methods/pace.py",
        "visualization/measures.py",
    }
