"""Run folder, checkpoints, loop and evaluation."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from fdda_ext.engine import (
    BatchSource,
    RunFolder,
    evaluate,
    load_state,
    read_student,
    save_state,
    train,
    write_student,
)
from fdda_ext.errors import UsageError


def test_state_round_trip_keeps_structure_types_and_bits(tmp_path):
    shared = torch.randn(3)
    state = {
        "a": {0: torch.randn(2, 3).t(), 1: [torch.tensor(3, dtype=torch.int64), None, "x", 0.1]},
        "same": [shared, shared],
        "on": True,
        "empty": torch.empty(0),
    }
    save_state(tmp_path / "s.safetensors", state)
    loaded = load_state(tmp_path / "s.safetensors")
    assert list(loaded["a"]) == [0, 1]
    assert torch.equal(loaded["a"][0], state["a"][0])
    assert loaded["a"][1][0].dtype == torch.int64
    assert loaded["a"][1][1:] == [None, "x", 0.1]
    assert loaded["on"] is True
    assert loaded["empty"].shape == (0,)
    assert torch.equal(loaded["same"][0], shared)


def test_optimizer_state_survives(tmp_path):
    def build():
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        return layer, torch.optim.Adam(layer.parameters(), lr=0.1)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()

    layer, optimizer = build()
    step(layer, optimizer)
    save_state(tmp_path / "o.safetensors", {"l": layer.state_dict(), "o": optimizer.state_dict()})
    step(layer, optimizer)
    other, other_optimizer = build()
    loaded = load_state(tmp_path / "o.safetensors")
    other.load_state_dict(loaded["l"])
    other_optimizer.load_state_dict(loaded["o"])
    step(other, other_optimizer)
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("keep", [0, 7, 8, 60, 0.5, 0.999])
def test_truncated_state_is_refused_in_one_sentence(tmp_path, keep):
    path = tmp_path / "s.safetensors"
    save_state(path, {"a": torch.randn(100)})
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(UsageError, match="whole state file") as caught:
        load_state(path)
    assert "\n" not in str(caught.value)


def test_state_of_another_format_is_refused(tmp_path):
    write_student(tmp_path / "x.safetensors", nn.Linear(2, 2), {"model": "m"})
    with pytest.raises(UsageError, match=r"got .* of format fdda_ext\.student"):
        load_state(tmp_path / "x.safetensors")
    save_state(tmp_path / "y.safetensors", {})
    with pytest.raises(UsageError, match="student file"):
        read_student(tmp_path / "y.safetensors")


def test_run_folder_protects_what_it_holds(tmp_path):
    folder = RunFolder(tmp_path / "a", "seed: 0\n", resume=False)
    assert folder.summary() is None
    with pytest.raises(UsageError, match="give --resume"):
        RunFolder(tmp_path / "a", "seed: 0\n", resume=False)
    with pytest.raises(UsageError, match="'seed: 1' instead of 'seed: 0'"):
        RunFolder(tmp_path / "a", "seed: 1\n", resume=True)
    folder.finish({"top1": 1.0})
    assert RunFolder(tmp_path / "a", "seed: 0\n", resume=True).summary() == {"top1": 1.0}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="holds other files"):
        RunFolder(tmp_path / "b", "seed: 0\n", resume=True)
    with pytest.raises(UsageError, match="got the file"):
        RunFolder(tmp_path / "b" / "mine.txt", "seed: 0\n", resume=False)


class Walk:
    """A random walk: its end shows whether every step was taken once and in order."""

    iterations = 30

    def __init__(self, stop_at=None):
        self.position = torch.zeros(4)
        self.random = torch.Generator().manual_seed(0)
        self.stop_at = stop_at

    def step(self, iteration):
        if iteration == self.stop_at:
            raise KeyboardInterrupt
        self.position = self.position * 0.9 + torch.randn(4, generator=self.random)
        return {"norm": self.position.norm()}

    def state_dict(self):
        return {"position": self.position, "random": self.random.get_state()}

    def load_state_dict(self, state):
        self.position = state["position"]
        self.random.set_state(state["random"])


def test_interrupted_training_ends_like_an_uninterrupted_one(tmp_path):
    whole = Walk()
    train(whole, RunFolder(tmp_path / "a", "", resume=False), description="a", log_every=1)
    folder = RunFolder(tmp_path / "b", "", resume=False)
    with pytest.raises(KeyboardInterrupt):
        train(Walk(stop_at=17), folder, description="b", checkpoint_seconds=0.0, log_every=1)
    resumed = Walk()
    progress = train(resumed, folder, description="b", log_every=1)
    assert progress.iterations == 30
    assert torch.equal(whole.position, resumed.position)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(30))


def test_time_limit_stops_and_a_later_call_goes_on(tmp_path):
    folder = RunFolder(tmp_path / "a", "", resume=False)
    first = train(Walk(), folder, description="a", max_seconds=0.0)
    assert first.iterations == 0
    walk = Walk()
    assert train(walk, folder, description="a").iterations == 30
    whole = Walk()
    train(whole, RunFolder(tmp_path / "b", "", resume=False), description="b")
    assert torch.equal(walk.position, whole.position)


def test_metrics_after_the_last_checkpoint_are_dropped(tmp_path):
    folder = RunFolder(tmp_path / "a", "", resume=False)
    with pytest.raises(KeyboardInterrupt):
        train(Walk(stop_at=9), folder, description="a", checkpoint_seconds=1e9, log_every=1)
    with folder.metrics.open("a") as file:
        file.write('{"iteration": 9, "nor')  # a line that the kill cut short
    train(Walk(), folder, description="a", log_every=1)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(30))


def test_evaluate_counts_top1_and_top5():
    logits = torch.eye(10)[torch.tensor([3, 4, 5, 6])] * 5 - torch.arange(10.0) * 0.1
    data = [(logits[0], 3), (logits[1], 0), (logits[2], 9), (logits[3], 6)]
    for _ in range(2):  # the second pass reads the kept batches
        accuracy = evaluate(nn.Identity(), BatchSource(data, batch_size=3))
        assert (accuracy.top1, accuracy.top5, accuracy.count) == (50.0, 75.0, 4)


def test_evaluate_refuses_labels_beyond_the_network_and_empty_data():
    with pytest.raises(UsageError, match="labels below the network's 3 classes, got 7"):
        evaluate(nn.Identity(), BatchSource([(torch.zeros(3), 7)]))
    with pytest.raises(UsageError, match="at least one image"):
        BatchSource([])


def test_command_line_shows_a_mistake_in_one_line():
    program = (
        "from fdda_ext.engine import run_command\nfrom fdda_ext.errors import UsageError\n"
        "def main():\n    raise UsageError('train: expected x above 0, got -1')\n"
        "run_command(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: train: expected x above 0, got -1\n"
    assert done.stdout == ""


class Diverging(Walk):
    def step(self, iteration):
        return {"loss": torch.tensor(float("nan") if iteration >= 20 else 1.0)}


def test_a_run_that_diverges_is_no_result(tmp_path):
    folder = RunFolder(tmp_path / "a", "", resume=False)
    with pytest.raises(UsageError, match="walk: expected a finite loss, got nan for loss in itera"):
        train(Diverging(), folder, description="walk")


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "a", "seed: 0", resume=False)
    state = {"config": folder.fingerprint, "trainable": Walk().state_dict(), "seconds": 1.0}
    for change in (
        {},
        {"iterations": 31},
        {"iterations": -5},
        {"iterations": 3, "trainable": {"position": torch.zeros(4)}},
        {"iterations": 3, "config": "another"},
    ):
        save_state(folder.checkpoint, {**state, **change})
        with pytest.raises(UsageError, match="expected .*a/c"):
            train(Walk(), folder, description="walk")
    folder.metrics.write_bytes(b'[1]\n"x"\n\xff\n{"iteration": 2, "norm": 1.0}\n')
    save_state(folder.checkpoint, {**state, "iterations": 29})
    assert train(Walk(), folder, description="walk").iterations == 30
    assert [json.loads(line)["iteration"] for line in folder.metrics.open()] == [2, 29]


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    for write, read in (
        (lambda: save_state(path, {"a": torch.ones(100)}), load_state),
        (lambda: write_student(path, nn.Linear(9, 9), {"model": "m"}), read_student),
    ):
        write()
        read(path)
        data = bytearray(path.read_bytes())
        data[-7] ^= 4
        path.write_bytes(data)
        with pytest.raises(UsageError, match="changed after it was written"):
            read(path)


def test_a_damaged_summary_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "a", "seed: 0", resume=False)
    for text in ("{", "[]", "{}"):
        (folder.path / "summary.json").write_text(text)
        with pytest.raises(UsageError, match="run: expected .*a/"):
            folder.summary()


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    folder = RunFolder(tmp_path / "a", "seed: 0", resume=False)
    with (
        folder.lock(),
        pytest.raises(UsageError, match="no other process to train in .*a, got one that does"),
    ):
        train(Walk(), folder, description="walk")
    assert train(Walk(), folder, description="walk").iterations == 30


def test_a_full_disk_is_one_sentence(tmp_path):
    code = (
        "import resource, torch; resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from fdda_ext.engine import run_command, save_state; from pathlib import Path;"
        f"path = Path({str(tmp_path / 's')!r});"
        "run_command(lambda: save_state(path, {'a': torch.zeros(9999)}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: expected to write and read files, got: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "s").exists()
