"""Run folders, checkpoints, the training loop, and evaluation."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from fdda_ext.engine import (
    BatchSource,
    RunFolder,
    decode_workers,
    diagnose,
    evaluate,
    load_state,
    must_fit,
    read_student,
    restore_random,
    save_state,
    train,
    write_student,
)
from fdda_ext.engine.interrupt import held_interrupt
from fdda_ext.errors import UnreadableImageError, UsageError


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


def test_optimizer_state_round_trip(tmp_path):
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
def test_truncated_state_is_refused_in_one_line(tmp_path, keep):
    path = tmp_path / "s.safetensors"
    save_state(path, {"a": torch.randn(100)})
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(UsageError, match="complete state file") as caught:
        load_state(path)
    assert "\n" not in str(caught.value)


def test_state_of_another_format_is_refused(tmp_path):
    write_student(tmp_path / "x.safetensors", nn.Linear(2, 2), {"model": "m"})
    with pytest.raises(UsageError, match=r"got .* of format fdda_ext\.student"):
        load_state(tmp_path / "x.safetensors")
    save_state(tmp_path / "y.safetensors", {})
    with pytest.raises(UsageError, match="student file"):
        read_student(tmp_path / "y.safetensors")


def test_run_folder_protects_its_content(tmp_path):
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
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.yaml.tmp").write_text("se")  # an incomplete file of a killed process
    RunFolder(tmp_path / "c", "seed: 0\n", resume=False)
    with pytest.raises(UsageError, match="got the file"):
        RunFolder(tmp_path / "b" / "mine.txt", "seed: 0\n", resume=False)


class Walk:
    """A random walk, whose end shows whether every step was made once and in order."""

    iterations = 30
    part = "walking"

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


def test_time_limit_stops_and_a_later_call_continues(tmp_path):
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
        file.write('{"iteration": 9, "nor')  # an incomplete line
    train(Walk(), folder, description="a", log_every=1)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(30))


def test_a_run_can_resume_on_another_kind_of_device(tmp_path, caplog):
    RunFolder(tmp_path / "a", "seed: 0\ndevice: cpu\n", resume=False)
    folder = RunFolder(tmp_path / "a", "seed: 0\ndevice: cuda\n", resume=True)
    assert folder.fingerprint == RunFolder(tmp_path / "b", "seed: 0\n", resume=False).fingerprint
    assert "device: cpu" in (tmp_path / "a" / "config.yaml").read_text()
    first, second, other = (torch.Generator().manual_seed(i) for i in range(3))
    restore_random(first, second.get_state())
    assert torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))
    assert not caplog.records
    cuda_state = torch.arange(16, dtype=torch.uint8)  # seed and offset
    restore_random(first, cuda_state)
    restore_random(second, cuda_state)
    restore_random(other, cuda_state + 1)
    assert "another kind of device" in caplog.text
    numbers = torch.rand(3, generator=first)
    assert torch.equal(numbers, torch.rand(3, generator=second))
    assert not torch.equal(numbers, torch.rand(3, generator=other))


class Images:
    """A data set of given images, in which None is a damaged image."""

    def __init__(self, items):
        self.items = items
        self.labels = torch.tensor([label for _, label in items])

    def __len__(self):
        return len(self.items)

    def pixels(self, index):
        if self.items[index][0] is None:
            raise UnreadableImageError(f"image {index} cannot be read")
        return self.items[index][0]

    def normalise(self, pixels):
        return pixels.float()


def test_evaluate_counts_top1_and_top5():
    logits = torch.eye(10)[torch.tensor([3, 4, 5, 6])] * 5 - torch.arange(10.0) * 0.1
    data = [(logits[0], 3), (logits[1], 0), (logits[2], 9), (logits[3], 6)]
    for _ in range(2):  # the second pass reads the kept batches
        accuracy = evaluate(nn.Identity(), BatchSource(Images(data), batch_size=3))
        assert (accuracy.top1, accuracy.top5, accuracy.count) == (50.0, 75.0, 4)


def test_evaluate_refuses_labels_beyond_the_network_and_empty_data():
    with pytest.raises(UsageError, match="labels between 0 and 2, .* 3 logits, got 7"):
        evaluate(nn.Identity(), BatchSource(Images([(torch.zeros(3), 7)])))
    with pytest.raises(UsageError, match="at least one image"):
        BatchSource(Images([]))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_named_and_skipped_up_to_the_limit(workers, caplog):
    good = (torch.tensor([1, 0], dtype=torch.uint8), 0)
    source = Images([good, (None, 0), (None, 1), good, (None, 1)])
    batches = BatchSource(source, batch_size=2, workers=workers, max_unreadable=3)
    accuracy = evaluate(nn.Identity(), batches)
    assert (accuracy.count, accuracy.top1) == (2, 100.0)
    assert [r.message for r in caplog.records] == [
        f"image {i} cannot be read; it is skipped" for i in (1, 2, 4)
    ]
    with pytest.raises(UsageError, match="^image 2 cannot be read, after 1 others; raise --max"):
        evaluate(nn.Identity(), BatchSource(source, 2, workers, max_unreadable=1))
    with pytest.raises(UsageError, match="^image 1 cannot be read; raise --max_unreadable"):
        evaluate(nn.Identity(), BatchSource(source, 2, workers))
    with pytest.raises(UsageError, match="one readable image, got 1 damaged ones"):
        evaluate(nn.Identity(), BatchSource(Images([(None, 0)]), max_unreadable=1))


def test_accuracy_over_time_is_in_the_metrics(tmp_path, monkeypatch):
    whole, measured = Walk(), Walk()
    train(whole, RunFolder(tmp_path / "a", "", resume=False), description="a")
    folder = RunFolder(tmp_path / "b", "", resume=False)

    now = [1000.0]  # a clock that moves only during evaluations
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def measure(bar):
        now[0] += 20
        source = Images([(torch.tensor([1.0, 0.0]), 0)])
        accuracy = evaluate(nn.Identity(), BatchSource(source), label="testing", bar=bar)
        return {"top1": accuracy.top1}

    options = {"evaluation": measure, "evaluate_every": 7, "log_every": 100}
    with pytest.raises(KeyboardInterrupt):  # later evaluations are repeated
        train(Walk(stop_at=16), folder, description="b", checkpoint_seconds=1e9, **options)
    progress = train(measured, folder, description="b", **options)
    assert progress.seconds == 0, "evaluations do not count as training"
    assert torch.equal(whole.position, measured.position)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [x["iteration"] for x in lines if "top1" in x] == [6, 13, 20, 27]
    seconds = [x["seconds"] for x in lines]
    assert seconds == sorted(seconds)


def test_the_error_for_too_little_memory_names_the_setting_to_lower():
    with (
        pytest.raises(
            UsageError,
            match=r"expected a.b 16 to fit in memory, got .*; "
            "lower a.b from 16 to 8$",
        ),
        must_fit(a__b=16, c=9, d=1),
    ):
        torch.empty(1 << 60)
    with pytest.raises(UsageError, match="lower image_size"), must_fit(batch=1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="other"), must_fit(batch=16):
        raise RuntimeError("other")

    class Hungry(nn.Module):
        def forward(self, x):
            return torch.empty(1 << 60)

    with pytest.raises(UsageError, match="lower test_batch from 3 to 1"):
        evaluate(Hungry(), BatchSource(Images([(torch.zeros(3), 0)] * 3)))


class Templates(nn.Module):
    """A network that classifies 8x8 images by the nearest of K templates."""

    def __init__(self, templates):
        super().__init__()
        self.templates = templates.flatten(1)

    def forward(self, x):
        return -torch.cdist(x.flatten(1), self.templates)


class Noisy:
    """Noisy templates of the classes as images, normalised with the mean and std of ImageNet."""

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def __init__(self, classes=20):
        random = torch.Generator().manual_seed(0)
        self.templates = torch.rand(classes, 3, 8, 8, generator=random)
        self.templates[:, 1] = 0.5
        self.templates[:, 2] = 1 - self.templates[:, 0]  # swapping red and blue gives a negative
        self.labels = torch.arange(classes).repeat_interleave(10)
        noise = torch.randn(len(self.labels), 3, 8, 8, generator=random)
        values = (self.templates[self.labels] + 0.05 * noise).clamp(0, 1)
        self.stored = (values * 255).to(torch.uint8)

    def __len__(self):
        return len(self.labels)

    def pixels(self, index):
        return self.stored[index]

    def normalise(self, pixels):
        values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return (values - self.mean) / self.std


def test_a_float_network_that_guesses_is_diagnosed():
    source = Noisy()
    right = source.normalise(source.templates)
    assert diagnose(Templates(right), source, 20) is None
    offset = Templates(source.normalise(source.templates.roll(1, 0)))
    assert "the order of the classes" in diagnose(offset, source, 20)
    flipped = diagnose(Templates(right.flip(1)), source, 20)
    assert "the colour order" in flipped
    raw = diagnose(Templates(source.templates * 255), source, 20)
    assert "--preprocessing.mean=[0,0,0] --preprocessing.std=[0.003922," in raw
    constant = nn.Sequential(nn.Flatten(), nn.Linear(192, 20))
    nn.init.zeros_(constant[1].weight)
    assert "all get class" in diagnose(constant, source, 20)
    random = Templates(torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert "the likely cause is" in diagnose(random, source, 20)


def test_worker_processes_decode_images_only_for_a_gpu(monkeypatch):
    for cores, workers in ({5}, 1), (set(range(64)), 8):  # cores that taskset allows
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        assert decode_workers(None, "cuda:0", True) == workers
    assert decode_workers(None, "cuda", False) == 0
    assert decode_workers(None, "cpu", True) == 0
    assert decode_workers(3, "cpu", False) == 3
    assert decode_workers(0, "cuda", True) == 0


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


def test_a_run_that_diverges_ends_with_an_error(tmp_path):
    folder = RunFolder(tmp_path / "a", "", resume=False)
    with pytest.raises(UsageError, match="walk: expected a finite loss, got nan for loss in itera"):
        train(Diverging(), folder, description="walk")


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
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


def test_a_flipped_bit_is_detected(tmp_path):
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


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    folder = RunFolder(tmp_path / "a", "seed: 0", resume=False)
    with (
        folder.lock(),
        pytest.raises(UsageError, match="no other process to train in .*a, got one that does"),
    ):
        train(Walk(), folder, description="walk")
    assert train(Walk(), folder, description="walk").iterations == 30


def test_a_full_disk_gives_a_one_line_error(tmp_path):
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


def test_folder_of_a_run_that_computed_nothing_is_removed(tmp_path):
    path = tmp_path / "new" / "deeper" / "run"
    folder = RunFolder(path, "seed: 0\n", resume=False)
    RunFolder(path / "baselines" / "mse", "seed: 0\n", resume=True)
    (path / "metrics.jsonl").touch()
    with pytest.raises(UsageError, match="wrong"), folder.removed_if_unused():
        raise UsageError("wrong")
    assert list(tmp_path.iterdir()) == []
    RunFolder(path, "seed: 0\n", resume=False)  # the same command works again


@pytest.mark.parametrize("result", ["checkpoint.safetensors", "baselines/mse/summary.json"])
def test_folder_with_a_result_stays_after_an_error(tmp_path, result):
    folder = RunFolder(tmp_path / "run", "seed: 0\n", resume=False)
    (folder.path / result).parent.mkdir(parents=True, exist_ok=True)
    (folder.path / result).write_text("{}")
    with pytest.raises(KeyboardInterrupt), folder.removed_if_unused():
        raise KeyboardInterrupt
    assert (folder.path / result).exists()


def test_folder_of_another_run_is_never_removed(tmp_path):
    RunFolder(tmp_path / "run", "seed: 0\n", resume=False)
    resumed = RunFolder(tmp_path / "run", "seed: 0\n", resume=True)
    with pytest.raises(UsageError), resumed.removed_if_unused():
        raise UsageError("wrong")
    assert (tmp_path / "run" / "config.yaml").exists()


class Interrupted(Walk):
    """A walk that presses Ctrl-C in one step."""

    def step(self, iteration):
        if iteration == self.stop_at:
            signal.raise_signal(signal.SIGINT)
        return super().step(-1)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_training_after_a_whole_iteration(tmp_path):
    whole = Walk()
    train(whole, None, description="walk", show=False)
    cut = Interrupted(stop_at=12)
    progress = train(cut, None, description="walk", show=False)
    assert (progress.iterations, progress.interrupted) == (13, True)
    # The stopped run is stored and resumes to the same result.
    folder = RunFolder(tmp_path / "run", "seed: 0\n", resume=False)
    progress = train(Interrupted(stop_at=12), folder, description="walk", show=False)
    assert (progress.iterations, progress.interrupted) == (13, True)
    resumed = Walk()
    progress = train(resumed, folder, description="walk", show=False)
    assert (progress.iterations, progress.interrupted) == (30, False)
    assert torch.equal(resumed.position, whole.position)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_interrupts_at_once():
    with held_interrupt() as pressed:
        assert not pressed()
        signal.raise_signal(signal.SIGINT)
        assert pressed()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
