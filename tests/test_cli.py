"""The command lines: results, resumption after a kill, mistakes."""

import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fdda_ext.commands import evaluate, train
from fdda_ext.engine import read_student, run_command, write_student
from fdda_ext.errors import UsageError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
#: Arguments for a short run: a small generator, few steps, few test images.
QUICK = [
    "--no-report",
    "--threads=1",
    "--test_limit=71",
    "--settings.distillation.steps=6",
    "--settings.fdda.warmup_iterations=3",
    "--settings.fdda.generator.channels=4",
    "--settings.fdda.batch=8",
]


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """The folder of a run that stopped before its first iteration, and what the run printed."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main([*QUICK, "--baselines=[]", "--max_time=0", f"--out={out}"])
    return out, printed.getvalue()


@pytest.fixture
def stopped(stopped_run, tmp_path):
    """A copy of the folder of a stopped run."""
    return Path(shutil.copytree(stopped_run[0], tmp_path / "run"))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fdda_ext.train", *QUICK, *arguments]


def call(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"fdda_ext.{module}", *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


def test_train_writes_a_complete_run_folder_that_evaluate_reads(tmp_path):
    out = tmp_path / "run"
    train.main([*QUICK, "--bits=W3A5", "--seed=4", f"--out={out}"])
    for name in ("metrics.jsonl", "centres.safetensors", "generator.safetensors", "table.txt"):
        assert (out / name).stat().st_size > 0, name
    assert list((out / "tensorboard").glob("events*"))
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["quantization"]["weight_bits"] == 3
    assert config["quantization"]["activation_bits"] == 5
    assert config["seed"] == 4
    assert "conv1" in (out / "bits.txt").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["name"] == "fdda"
    assert summary["images"] == 71
    for folder in (out, *(out / "baselines" / name for name in ("minmax", "mse", "distill"))):
        stored = json.loads((folder / "summary.json").read_text())
        measured = evaluate.run(evaluate.EvaluateConfig(run=str(folder), test_limit=71))
        assert measured.top1 == stored["top1"]
    table = (out / "table.txt").read_text()
    assert all(row in table for row in ("float", "minmax", "mse", "distill", "fdda"))


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path):
    options = ["--baselines=[]", "--settings.distillation.steps=20", "--seed=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.main([*QUICK, *options, f"--out={whole}"])
    # The process kills itself before it writes its fifth checkpoint, so one iteration is lost.
    program = (
        "import functools, os, signal, sys\n"
        "from fdda_ext import quantizing\n"
        "from fdda_ext.commands import train as command\n"
        "from fdda_ext.engine import loop\n"
        "written = []\n"
        "def save_state(path, state, save=loop.save_state):\n"
        "    if len(written) == 4:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    written.append(save(path, state))\n"
        "loop.save_state = save_state\n"
        "quantizing.train = functools.partial(quantizing.train, checkpoint_seconds=0.0)\n"
        "command.main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *QUICK, *options, f"--out={killed}"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (killed / "checkpoint.safetensors").exists()
    with pytest.raises(UsageError, match="--resume"):
        evaluate.main(["--run", str(killed)])
    train.main(["--resume", f"--out={killed}", "--threads=1"])
    for name in ("student.safetensors", "generator.safetensors"):
        expected, resumed = load_file(whole / name), load_file(killed / name)
        assert expected.keys() == resumed.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, resumed[key]), key


def test_profile_shows_stages_and_does_not_train(tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*QUICK, "--profile=3", f"--out={out}"])
    table = (out / "profile.txt").read_text()
    for stage in ("generator: backward", "student: forward", "anything else"):
        assert stage in table
    assert "whole schedule: about" in capsys.readouterr().out
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "generator: teacher" for event in events)
    assert not (out / "checkpoint.safetensors").exists()
    with pytest.raises(UsageError, match="a method that trains, got method mse"):
        train.main(["--threads=1", "--profile=3", "--method=mse", f"--out={tmp_path / 'other'}"])


def test_print_config_prints_a_valid_config_file(tmp_path):
    printed = call("train", "--preset", "paper", "--print_config")
    assert printed.returncode == 0, printed.stderr
    path = tmp_path / "mine.yaml"
    path.write_text(printed.stdout)
    config, _ = train.parse_arguments([f"--config={path}", "--bits=W5A5"])
    assert config.settings.distillation.lr == 1e-6
    assert config.quantization.grid == "paper"
    assert config.quantization.weight_bits == 5
    config, _ = train.parse_arguments(["--seed=3", "--bits", "W3A2", "--config", str(path)])
    assert config.seed == 3, "arguments override the file in any order"
    assert (config.quantization.weight_bits, config.quantization.activation_bits) == (3, 2)
    config, _ = train.parse_arguments(["--bits=W3A2", "--quantization.weight_bits=6"])
    assert (config.quantization.weight_bits, config.quantization.activation_bits) == (6, 2)


def test_paper_preset_is_the_default_of_every_setting():
    config, _ = train.parse_arguments(["--preset=paper"])
    from fdda_ext.methods import MethodSettings

    assert config.settings.fdda == MethodSettings().fdda
    published = MethodSettings().distillation
    for name in ("steps", "lr", "temperature", "weight", "reduction", "cosine_half_period"):
        assert getattr(config.settings.distillation, name) == getattr(published, name)


@pytest.mark.parametrize("module", ["train", "evaluate", "pretrain"])
def test_help_shows_examples(module, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"fdda_ext.{module}").main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"python -m fdda_ext.{module}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=fda"], "did you mean fdda"),
        (["--baselines=[foo]"], "got foo"),
        (["--baselines=foo"], 'key "baselines": Expected a list. Got value: foo$'),
        (["--settings.distillation.rounding.lr=-1"], "^rounding: .*lr above 0 and finite, got -1"),
        (["--settings.distillation.rounding.lr=x"], 'rounding.lr": Expected a float. Got value: x'),
        (["--bits=W9A4"], "got W9A4"),
        (["--preset=long"], "paper, short, got long"),
        (["--seed=x"], "seed"),
        (["--seed=-5"], "seed between 0 and .*got -5"),
        (["--seed=9223372036854775808"], "seed between 0 and .*got 9223372036854775808"),
        (["--threads=0"], "threads between 1 and this machine's .*got 0"),
        (["--threads=100000"], "threads between 1 and this machine's .*got 100000"),
        (["--device=banana"], "cpu or cuda, got banana"),
        (["--device=cpu:x"], "cpu or cuda, got cpu:x"),
        (["--device=cuda:99"], "available, got cuda:99"),
        (["--preset", "--seed=1"], "argument"),
        (["--split=train"], "split"),
        (["--settings.distillation.generated_batch=0"], "generated_batch above 0 .*got 0"),
        (["--settings.distillation.lr=.inf"], "lr above 0 and finite, got inf"),
        (["--settings.distillation.weight=.nan"], "weight at least 0 and finite, got nan"),
        (["--settings.fdda.bns_weight=.inf"], "bns_weight at least 0 and finite, got inf"),
        (["--settings.fdda.distortion.mean_std=.nan"], "mean_std at least 0 and finite, got nan"),
        (["--nonsense=1"], "nonsense"),
        (["--data=folder:/absent"], "/absent, which is not one"),
        (["--weights=/absent"], "default, none or a file, got /absent"),
        (["--model=glyphs_resnt"], "did you mean glyphs_resnet"),
        (["--data=digits"], "data of the 71 classes"),
        (["--quantization.weight_bits=9"], "weight_bits between 2 and 8, got 9"),
        (["--settings.fdda.batch=1"], "batch at least 2, got 1"),
        (["--images_per_class=99"], "at least 99 calibration"),
        (["--resume"], "--out, the run to continue, with --resume"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_folder(arguments, message, tmp_path):
    out = [] if arguments == ["--resume"] else [f"--out={tmp_path / 'run'}"]
    with pytest.raises(UsageError, match=message) as caught:
        train.main([*arguments, *out])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_empty_out_is_refused():
    with pytest.raises(UsageError, match="out to be a folder, got an empty name"):
        train.main(["--out="])


def test_random_weights_depend_only_on_the_seed():
    def weights(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # another state of the global generator
        problem = train.build_problem(train.TrainConfig(weights="none", seed=seed))[0]
        return problem.teacher.state_dict()["conv1.weight"]

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_a_method_is_not_its_own_baseline():
    config, _ = train.parse_arguments(["--method=mse", "--baselines=[minmax,mse,minmax]"])
    assert config.baselines == ["minmax"]


def test_distillation_is_a_baseline_of_methods_with_a_student_step():
    for method, baselines in (
        ("fdda", ["minmax", "mse", "distill"]),
        ("distill", ["minmax", "mse"]),
        ("qdrop", ["minmax", "mse"]),
        ("zeroq", ["minmax", "mse"]),
    ):
        assert train.parse_arguments([f"--method={method}"])[0].baselines == baselines


def test_generated_batch_may_be_larger_than_the_generator_batch(tmp_path):
    train.main(
        [*QUICK, "--baselines=[]", f"--out={tmp_path / 'run'}"]
        + ["--settings.distillation.generated_batch=12"]
    )
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_mistake_ends_the_process_with_status_2_and_no_traceback(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("method: fdda\n")
    (tmp_path / "run" / "student.safetensors").write_bytes(b"cut")
    (tmp_path / "long.yaml").write_text("- no: settings\n" * 1000)
    small = ["--baselines", "[]", "--test_limit", "71"]
    for module, arguments in (
        ("train", ["--bits", "four"]),
        ("train", ["--config", str(tmp_path / "long.yaml")]),
        ("train", ["--settings.fdda.generator.channels", "100000000", *small]),
        ("train", ["--out", str(tmp_path / "run")]),
        ("evaluate", ["--run", str(tmp_path / "run")]),
        ("evaluate", ["--run", str(tmp_path / "absent")]),
        ("evaluate", []),
        ("pretrain", ["--model", "glyphs_resnet"]),
    ):
        main = importlib.import_module(f"fdda_ext.{module}").main
        with pytest.raises(SystemExit) as ended:
            run_command(functools.partial(main, arguments))
        message = capsys.readouterr().err
        assert ended.value.code == 2, (module, arguments, message)
        assert len(message.strip().splitlines()) == 1, message
        assert len(message) < 800, message
        assert message.startswith("error: ")
    done = call("evaluate", "--run", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_max_time_stops_the_run_and_it_resumes_only_with_the_same_configuration(
    stopped_run, stopped
):
    out = stopped
    assert "--resume" in stopped_run[1]
    assert not (out / "summary.json").exists()
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(UsageError, match="config.yaml.* to be unchanged since the run began"):
        train.main(["--resume", f"--out={out}", "--threads=1"])
    (out / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match="no --preset with --resume.*got paper"):
        train.main(["--resume", f"--out={out}", "--preset=paper"])
    train.main(["--resume", f"--out={out}", "--threads=1", "--no-report"])
    assert (out / "summary.json").exists()
    # --resume of a finished run only shows it.
    train.main(["--resume", f"--out={out}", "--threads=1", "--no-report"])
    (out / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(UsageError, match="config.yaml.* to be unchanged since the run began"):
        train.main(["--resume", f"--out={out}", "--threads=1"])
    (out / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="decode"):
        train.main(["--resume", f"--out={out}", "--threads=1"])


def test_evaluate_says_that_a_run_is_unfinished(stopped, capsys):
    evaluate.main([f"--run={stopped}", "--test_limit=71"])
    assert "is unfinished" in " ".join(capsys.readouterr().out.split())


def test_a_truncated_checkpoint_is_refused(stopped):
    out = stopped
    path = out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match="complete state file"):
        train.main(["--resume", f"--out={out}", "--threads=1"])
    assert not (out / "summary.json").exists()


def test_evaluate_refuses_bad_options_and_students(tmp_path):
    out = tmp_path / "run"
    quick = ["--threads=1", "--test_limit=71", "--no-report"]
    train.main([*quick, "--method=minmax", "--baselines=[]", f"--out={out}"])
    for arguments, message in (
        ([f"--run={out}", "--data=digits"], "data with the network's 71 classes, got 10"),
        (["--model=glyphs_resnet", "--weights=none", "--data="], "data not to be empty"),
        (["--model=glyphs_resnet", "--image_size=0"], "image_size not to be empty or 0"),
        (["--model=glyphs_resnet", "--test_limit=0"], "test_limit at least 1, got 0"),
        (["--model=glyphs_resnet", "--device=foo"], "cpu or cuda, got foo"),
        (["--model=glyphs_resnet", "--split=train"], "split"),
        (["--run="], "run not to be empty"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate.main(arguments)
    for change in ({"model": "glyphs_mobilenet"}, {"model": 5}, {"num_classes": 3}, {}):
        state, recipe = read_student(out / "student.safetensors")
        student = torch.nn.Module()
        for name, tensor in state.items():
            student.register_buffer(name.replace(".", "/"), tensor)
        student.state_dict = lambda state=state: state
        kept = recipe if change else {}
        write_student(tmp_path / "other.safetensors", student, {**kept, **change})
        with pytest.raises(UsageError, match="student that its recipe describes|model") as caught:
            evaluate.main([f"--run={tmp_path / 'other.safetensors'}"])
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)


def test_runs_killed_at_random_moments_end_like_an_uninterrupted_run():
    """Kill runs FDDA_KILLS times, 1 by default."""
    kills = os.environ.get("FDDA_KILLS", "1")
    script = Path(__file__).parents[1] / "python" / "kill_and_resume.py"
    done = subprocess.run(
        [sys.executable, str(script), f"--kills={kills}"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{kills} kills: ")
