"""Several ranks against one: losses, statistics, centres, accuracy, resumption, a lost rank."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import distributed_worker as worker
import pytest
import torch

from fdda_ext import distribution, methods
from fdda_ext.engine import RunFolder
from fdda_ext.errors import UsageError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WORKER = str(Path(worker.__file__))
#: Limit in seconds for a process that hangs; a slow machine needs minutes.
PATIENCE = 1800


def start(processes: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start ranks with the environment variables of torchrun, which itself would take longer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **ENVIRONMENT,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
    }
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> SimpleNamespace:
    """Results of a training that two ranks begin, one continues and three end."""
    path = tmp_path_factory.mktemp("distributed")
    folder = path / "run"
    found = SimpleNamespace(folder=folder)
    pair = start(2, WORKER, str(path / "2.json"), str(folder), "1")
    found.pair = [(p.communicate(timeout=PATIENCE), p.returncode) for p in pair]
    with pytest.raises(KeyboardInterrupt):
        worker.run(folder, worker.Interrupted(14))
    three = start(3, WORKER, str(path / "3.json"), str(folder))
    found.three = [(p.communicate(timeout=PATIENCE), p.returncode) for p in three]
    found.one = worker.everything()
    assert (path / "2.json").exists(), found.pair
    assert (path / "3.json").exists(), found.three
    found.several = {n: json.loads((path / f"{n}.json").read_text()) for n in (2, 3)}
    return found


def compare_losses(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Compare to 1e-5, except a few student losses: an activation may be rounded differently."""
    jumps = 0
    for values, wanted in zip(found, expected, strict=True):
        assert values.keys() == wanted.keys()
        for name, value in values.items():
            if name == "student" and value != pytest.approx(wanted[name], rel=1e-5):
                jumps += 1
                assert value == pytest.approx(wanted[name], rel=1e-2)
            else:
                assert value == pytest.approx(wanted[name], rel=1e-5, abs=1e-9), name
    assert jumps <= 5


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", ["fdda, paper grid", "fdda, deploy grid", "distill"])
def test_losses_are_those_of_one_process_with_the_same_batch(stages, name, processes):
    one, several = stages.one[name], stages.several[processes][name]
    assert several["alike"] == processes, "all ranks have the same weights"
    assert len(one["losses"]) == len(several["losses"]) == 20
    compare_losses(several["losses"], one["losses"])
    assert several["ranges"] == pytest.approx(one["ranges"], rel=1e-5)
    moved, expected = torch.tensor(several["moved"]), torch.tensor(one["moved"])
    assert expected.norm() > 0
    assert (moved - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("processes", [2, 3])
def test_pooled_moments_and_their_gradients_are_those_of_the_whole_batch(stages, processes):
    one, several = stages.one["moments"], stages.several[processes]["moments"]
    for name, values in one.items():
        expected = torch.tensor(values, dtype=torch.float64)
        found = torch.tensor(several[name], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("processes", [2, 3])
def test_centres_and_accuracy_equal_those_of_one_process(stages, processes):
    several = stages.several[processes]
    assert several["centres"] == stages.one["centres"]
    assert several["accuracies"] == stages.one["accuracies"]
    assert several["refusal"] == "test: expected nothing, got something"


def test_a_lost_process_ends_the_others_with_a_message(stages):
    ((_, message), status), (_, killed) = stages.pair
    assert killed == -signal.SIGKILL
    assert status == 2
    assert message.startswith(
        "error (rank 0 of 2): distributed: expected all 2 processes to run to the end, got one"
    )
    assert "--resume, on any number of processes" in message
    assert len(message.splitlines()) == 1


def test_a_run_resumes_with_another_number_of_processes(stages):
    for (_, message), status in stages.three:
        assert (status, message) == (0, "")
    whole = worker.Interrupted()
    for iteration in range(whole.iterations):
        whole.step(iteration)
    expected = worker.weights(whole.method)
    assert (torch.tensor(stages.several[3]["end"]) - expected).norm() < 1e-4 * expected.norm()
    lines = [json.loads(x) for x in (stages.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(20)), (
        "each iteration is written once"
    )
    losses = stages.one["fdda, paper grid"]["losses"]
    compare_losses([{k: x[k] for k in v} for x, v in zip(lines, losses, strict=True)], losses)
    progress = [out for (out, _), _ in stages.three]
    assert "fdda" in progress[0]
    assert progress[1:] == ["", ""]


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_torchrun_trains_and_one_process_writes(tmp_path):
    out = tmp_path / "run"
    done = torchrun(
        2,
        *("-m", "fdda_ext.train", "--threads=1", "--test_limit=71", "--test_batch=30"),
        *("--settings.distillation.steps=2", "--settings.fdda.warmup_iterations=2"),
        *("--settings.fdda.generator.channels=4", "--settings.fdda.batch=8"),
        *("--evaluate_every=2", "--keep_best", "--baselines=[minmax]", "--no_report"),
        f"--out={out}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("last step of training") == 1
    assert "; 2 processes" in " ".join(done.stdout.split())
    assert len(list((out / "tensorboard").glob("events*"))) == 1
    assert json.loads((out / "summary.json").read_text())["images"] == 71
    for name in ("student", "generator", "centres", "best"):
        assert (out / f"{name}.safetensors").exists()
    iterations = [json.loads(x)["iteration"] for x in (out / "metrics.jsonl").open()]
    assert iterations == sorted(iterations)
    measured = [json.loads(x) for x in (out / "metrics.jsonl").open() if "top1" in x]
    assert [m["images"] for m in measured] == [71]


def test_threads_of_the_group_end_with_it(tmp_path):
    """A thread that runs while the interpreter ends can abort the process."""
    program = """
    import torch
    from contextlib import suppress
    from pathlib import Path
    from fdda_ext.distribution import joined

    def gloo_threads():
        names = ""
        for path in Path("/proc/self/task").glob("*/comm"):
            with suppress(OSError):  # the thread has ended
                names += path.read_text()
        return names.count("gloo")

    with joined():
        torch.distributed.all_reduce(torch.zeros(1))
        before = gloo_threads()
        import torch._dynamo
    assert before > gloo_threads() == 0, (before, gloo_threads())
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    done = torchrun(2, str(tmp_path / "program.py"))
    assert done.returncode == 0, done.stderr


def test_sigterm_from_torchrun_is_explained(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, time\n"
        "from fdda_ext import distribution\n"
        "with distribution.joined():\n"
        "    if distribution.rank() == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    time.sleep({PATIENCE})\n"
    )
    done = torchrun(2, str(program))
    assert done.returncode != 0
    assert "error (rank 0 of 2): distributed: ended by SIGTERM" in done.stderr
    assert "--resume, on any number of processes" in done.stderr


def test_shares_of_a_batch_are_as_equal_as_possible(monkeypatch):
    for rank in range(3):
        monkeypatch.setattr(distribution, "world_size", lambda: 3)
        monkeypatch.setattr(distribution, "rank", lambda rank=rank: rank)
        assert distribution.shares(16) == [6, 5, 5]
        assert (
            distribution.shard(list(range(16)))
            == list(range(16))[[0, 6, 11][rank] :][: [6, 5, 5][rank]]
        )
        assert distribution.share_of(16) == [6, 5, 5][rank] / 16
        with pytest.raises(UsageError, match="one image for each of the 3 processes, got 2; raise"):
            distribution.shard([1, 2])


def test_bad_devices_and_methods_are_refused_with_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UsageError, match="device to be cpu or cuda with several .*got cuda:0"):
        distribution.local_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="a GPU for every process of a machine, got 1 GPU"):
        distribution.local_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distribution.local_device("cuda") == "cuda:1"
    assert distribution.local_device("cpu") == "cpu"
    alone = type("Alone", (methods.MinMax,), {"distributed": False})
    monkeypatch.setitem(methods.METHODS, "alone", alone)
    with pytest.raises(UsageError, match=r"several processes can run \(fdda, .*, got alone"):
        methods.method_class("alone")
    assert methods.method_class("fdda") is methods.FDDA


def test_damaged_images_are_counted_over_all_processes(monkeypatch):
    """Exceed the limit only with the damaged images of all ranks together."""
    source = worker.BatchSource(worker.Logits(), 10, max_unreadable=1)
    monkeypatch.setattr(
        "fdda_ext.engine.evaluation.total_counts", lambda *counts: [*counts[:3], counts[3] + 2]
    )
    with pytest.raises(UsageError, match="at most 1 damaged images, got 2; raise --max"):
        worker.evaluate(worker.nn.Identity(), source)


def test_a_process_with_other_weights_is_refused(monkeypatch, tmp_path):
    from fdda_ext.commands import train

    other = RunFolder(tmp_path / "a", "", resume=False, inputs="x").fingerprint
    monkeypatch.setattr(train, "from_first", lambda make: other)
    with pytest.raises(UsageError, match="weights and images of the first process on all proc"):
        train._open_folder(tmp_path / "a", "", True, "y")
