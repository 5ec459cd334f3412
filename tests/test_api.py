"""The Python functions `quantize`, `report`, `evaluate`, `export`, `save` and `restore`."""

import copy
import doctest
import logging
import pickle
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fdda_ext
from fdda_ext import api
from fdda_ext.errors import UsageError
from fdda_ext.methods import METHODS, fitting_share, measure_pace
from fdda_ext.methods.base import Phase

#: Options for short runs.
QUICK = {
    "fdda": {
        "settings.distillation.steps": 4,
        "settings.fdda.warmup_iterations": 2,
        "settings.fdda.generator.channels": 4,
        "settings.fdda.batch": 8,
    },
    "distill": {"settings.distillation.steps": 12},
    "minmax": {},
}


class Net(nn.Module):
    """A user's network: 5 classes, images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 16, 3, stride=2, bias=False)
        self.last_norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.last_norm(self.last(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):  # FDDA needs images that the network classifies correctly
        x, y = some_images(40)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


def some_images(count, seed=0):
    """Return noisy images of five colours, and the colours as labels."""
    random = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [2, 2, 0], [0, 2, 2]])
    labels = torch.arange(count) % 5
    noise = torch.randn(count, 3, 16, 16, generator=random)
    return colours[labels][:, :, None, None] + 0.5 * noise, labels


@pytest.mark.parametrize("method", QUICK)
def test_quantize_evaluate_report_and_export_work_together(method, network, tmp_path):
    before = copy.deepcopy(network.state_dict())
    images, labels = some_images(20)
    options = {"method": method, "options": QUICK[method], "progress": False}
    student = fdda_ext.quantize(network, images, labels, bits="W4A4", minutes=None, **options)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())
    test = some_images(50, seed=1)
    accuracy = fdda_ext.evaluate(student, *test)
    assert accuracy.top1 == 100 * float((student(test[0]).argmax(1) == test[1]).float().mean())
    assert accuracy.top1 > 60
    report = fdda_ext.report(student)
    assert [row.weight_bits for row in report.layers] == [4, 4, 4]
    assert report.weights == 8 * 27 + 16 * 72 + 80
    assert report.weight_bytes == report.weights // 2
    assert f"{method}, W4A4" in str(report)
    assert report.iterations == report.planned
    program = fdda_ext.export(student, tmp_path / "n.safetensors", mean=(0, 0, 0), std=(1, 1, 1))
    with torch.no_grad():
        assert torch.equal(program(test[0]), student(test[0]))
    loaded = fdda_ext.load(tmp_path / "n.safetensors")
    assert fdda_ext.evaluate(loaded, *test) == accuracy


class Stream(IterableDataset):
    """A stream of pairs of an image and its label."""

    def __iter__(self):
        return iter(zip(*some_images(20), strict=True))


@pytest.mark.parametrize(
    "give",
    [
        lambda: (TensorDataset(*some_images(20)),),
        lambda: (DataLoader(TensorDataset(*some_images(20)), batch_size=7),),
        lambda: (Stream(),),
        lambda: ([(x, int(y)) for x, y in zip(*some_images(20), strict=True)],),
        lambda: ((part for part in [some_images(20)]),),
        lambda: (some_images(20)[0], some_images(20)[1].tolist()),
        lambda: (some_images(20)[0].double(), some_images(20)[1].int()),
    ],
    ids=["dataset", "loader", "stream", "pairs", "generator", "list-of-labels", "other-types"],
)
def test_images_are_accepted_in_every_usual_form(give, network):
    options = {"method": "minmax", "minutes": None}
    expected = fdda_ext.quantize(network, *some_images(20), **options).state_dict()
    found = fdda_ext.quantize(network, *give(), **options).state_dict()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_max_images_takes_equally_many_images_of_each_class(network):
    images, labels = some_images(100)
    order = labels.argsort()
    loader = DataLoader(TensorDataset(images[order], labels[order]), batch_size=8)
    found, found_labels, num_classes = api._collect(loader, None, network, torch.device("cpu"), 12)
    assert num_classes == 5
    assert found_labels.bincount().tolist() == [2] * 5
    assert torch.equal(found, images[order][[0, 1, 20, 21, 40, 41, 60, 61, 80, 81]])
    unlabelled = DataLoader(images, batch_size=8)
    found, none, _ = api._collect(unlabelled, None, network, torch.device("cpu"), 12)
    assert torch.equal(found, images[:12])
    assert none is None


def test_only_fdda_needs_labels(network):
    images, labels = some_images(20)
    with pytest.raises(UsageError, match="expected labels with method fdda, got none"):
        fdda_ext.quantize(network, images, minutes=None)
    options = {"method": "distill", "options": QUICK["distill"], "minutes": None, "progress": False}
    answers = network(images).argmax(1)
    student = fdda_ext.quantize(network, images, **options)
    expected = fdda_ext.quantize(network, images, answers, **options)
    assert torch.equal(student(images), expected(images))
    assert [name for name, kind in METHODS.items() if kind.needs_labels] == ["fdda"]


def test_a_student_can_be_saved_restored_copied_and_trained(network, tmp_path):
    images, labels = some_images(20)
    student = fdda_ext.quantize(network, images, labels, method="minmax", bits="W3A5", minutes=None)
    fdda_ext.save(student, tmp_path / "student.safetensors")
    restored = fdda_ext.restore(Net(), tmp_path / "student.safetensors")
    for other in (restored, copy.deepcopy(student)):
        assert torch.equal(other(images), student(images))
        assert fdda_ext.report(other) == fdda_ext.report(student)
    restored(images).sum().backward()
    pickled = pickle.loads(pickle.dumps(student))
    assert torch.equal(pickled(images), student(images))
    with pytest.raises(UsageError, match="pickled.*use fdda_ext.save"):
        fdda_ext.report(pickled)
    with pytest.raises(UsageError, match="a student of Linear"):
        fdda_ext.restore(nn.Linear(2, 2), tmp_path / "student.safetensors")
    with pytest.raises(UsageError, match=r"save: expected student to be from fdda_ext\.quantize"):
        fdda_ext.save(network, tmp_path / "other.safetensors")


def press_at(kind, call, monkeypatch):
    """Simulate Ctrl-C in step number ``call`` of a method."""
    step = kind.step
    calls = []

    def pressed(self, iteration):
        calls.append(iteration)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return step(self, iteration)

    monkeypatch.setattr(kind, "step", pressed)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_returns_the_student_trained_so_far(network, monkeypatch, caplog, tmp_path):
    images, labels = some_images(20)
    options = {"method": "distill", "options": QUICK["distill"], "minutes": None, "progress": False}
    whole = fdda_ext.quantize(network, images, labels, **options)
    with monkeypatch.context() as patched:
        press_at(METHODS["distill"], 5, patched)
        student = fdda_ext.quantize(network, images, labels, **options, out=tmp_path / "run")
    assert fdda_ext.report(student).iterations == 5
    assert "interrupted after 5 of 12 iterations" in caplog.text
    assert fdda_ext.export(student, tmp_path / "n.safetensors") is not None
    resumed = fdda_ext.quantize(
        network, images, labels, **options, out=tmp_path / "run", resume=True
    )
    assert torch.equal(resumed(images), whole(images))


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_before_the_ranges_raises_keyboard_interrupt(network, monkeypatch):
    options = {"settings.zeroq.synthesis.images": 8, "settings.zeroq.synthesis.steps": 20}
    press_at(METHODS["zeroq"], 3, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="before the ranges"):
        fdda_ext.quantize(
            network,
            *some_images(20),
            method="zeroq",
            options=options,
            minutes=None,
            progress=False,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "resnet18"}, r"network to be a torch\.nn\.Module with parameters, got str"),
        ({"network": nn.ReLU()}, "with parameters, got ReLU"),
        ({"images": torch.zeros(3, 16, 16)}, r"images \[n, C, H, W\], got shape \(3, 16, 16\)"),
        ({"images": torch.zeros(0, 3, 16, 16)}, r"got shape \(0, 3, 16, 16\)"),
        ({"images": 3, "labels": None}, "iterable, got int"),
        ({"images": ["a.png"], "labels": None}, r"batches of images .*, got str"),
        ({"images": [], "labels": None}, "at least one image, got none"),
        ({"images": [some_images(4)[0]]}, "labels only with a tensor of images"),
        ({"labels": torch.zeros(20)}, r"20 integers, one for each image, got torch\.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"got torch\.int64 of shape \(3,\)"),
        ({"labels": torch.arange(20)}, "labels between 0 and 4, .* 5 logits, got 0 to 19"),
        ({"bits": "W9A9"}, "bits of the form W4A4.*got W9A9"),
        ({"method": "fda"}, "did you mean fdda"),
        ({"minutes": 0}, "minutes above 0 and finite, got 0"),
        ({"seed": -1}, "seed between 0"),
        ({"device": "cuda:99"}, "device to be available, got cuda:99"),
        ({"device": "tpu"}, "cpu or cuda, got tpu"),
        ({"preset": "long"}, "paper, short, got long"),
        ({"options": {"bits": "W4A4"}}, "bits as an argument only"),
        (
            {"options": {"schedule_share": 0.1}},
            "options .*, training_pixels, got schedule_share",
        ),
        (
            {"options": {"images-per-class": 4}},
            "options .*, training_pixels, got images-per-class",
        ),
        ({"options": {"settings.fdda.rate": 1}}, "unrecognized arguments: --settings.fdda.rate"),
        ({"options": {"settings.brecq.steps": 1}}, "minmax has no settings"),
        ({"max_images": 0}, "max_images at least 1, got 0"),
        ({"resume": True}, "out with resume, got none"),
        ({"mean": (0.5,)}, "mean and std together"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_computed(arguments, message, network):
    images, labels = some_images(20)
    given = {"network": network, "images": images, "labels": labels, "method": "minmax"}
    given |= arguments
    with pytest.raises(UsageError, match=message):
        fdda_ext.quantize(given.pop("network"), given.pop("images"), given.pop("labels"), **given)


class Swish(Net):
    def forward(self, x):
        x = F.silu(self.norm(self.stem(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1).repeat(1, 2))


def test_a_network_without_export_is_refused_unless_exportable_is_false(network):
    images, labels = some_images(20)
    with pytest.raises(UsageError, match="F.silu.*exportable=False"):
        fdda_ext.quantize(Swish(), images, labels, method="minmax")
    student = fdda_ext.quantize(Swish(), images, labels, method="minmax", exportable=False)
    assert "F.silu" in str(fdda_ext.report(student))


def test_evaluate_needs_valid_labels(network):
    images, labels = some_images(20)
    with pytest.raises(UsageError, match="a label for every image, got none"):
        fdda_ext.evaluate(network, images)
    with pytest.raises(UsageError, match="labels between 0 and 4.*got 7"):
        fdda_ext.evaluate(network, images, labels.clone().fill_(7))
    loader = DataLoader(TensorDataset(images, labels), batch_size=6)
    assert fdda_ext.evaluate(network, loader) == fdda_ext.evaluate(network, images, labels)


CPU = torch.device("cpu")


#: Images of the run whose time is measured.
IMAGES = 500


class Clocked:
    """A method with a fake clock.

    Construction takes 2 s and 0.01 s per image. An iteration takes 0.5 s, in each later phase
    four times as long. If phases are prepared, it takes 0.02 s per image, and 1 s to end each.
    """

    def __init__(self, clock, phases, images=0, prepares=False):
        clock.time += 2.0 + 0.01 * images
        self.clock, self.images = clock, images
        self.phases = [Phase(n, prepares) for n in phases]
        self.iterations = sum(phases)

    def step(self, iteration):
        phase = 0
        while iteration >= self.phases[phase].iterations:
            iteration -= self.phases[phase].iterations
            phase += 1
        count, prepares = self.phases[phase]
        self.clock.time += 0.5 * 4**phase
        if prepares:
            self.clock.time += 0.02 * self.images * (iteration == 0) + (iteration + 1 == count)


class Clock:
    time = 0.0

    def __call__(self):
        return self.time


class Schedule:
    def __init__(self, iterations):
        self.iterations = iterations

    def scaled(self, share):
        return Schedule(max(round(self.iterations * share), 1))


@pytest.mark.parametrize("seconds", [60, 300, 3000])
@pytest.mark.parametrize("iterations", [1, 40, 512, 10_000, 70_000])
def test_the_schedule_fits_into_the_time(seconds, iterations):
    clock = Clock()
    share = fitting_share(
        lambda s, n: Clocked(clock, [s.iterations], n),
        Schedule(iterations),
        IMAGES,
        seconds,
        CPU,
        now=clock,
    )
    spent = clock.time
    built = 2 + 0.01 * IMAGES
    planned = Schedule(iterations).scaled(share).iterations
    assert spent + built + 0.5 * planned <= 1.02 * seconds
    if planned < iterations:  # a shortened schedule uses all of the time
        assert spent + built + 0.5 * planned > 0.95 * seconds


@pytest.mark.parametrize("prepares", [False, True])
@pytest.mark.parametrize("share", [0.5, 1, 8])
def test_the_measured_pace_predicts_a_run_with_several_phases(share, prepares):
    class Several(Schedule):
        def scaled(self, share):
            return Several([round(n * share) for n in self.iterations])

    clock, schedule = Clock(), Several([40, 20, 100])

    def build(settings, images):
        return Clocked(clock, settings.iterations, images, prepares)

    pace = measure_pace(build, schedule, IMAGES, 1e9, clock)
    assert clock.time < 60, "the trial is short"
    clock.time = 0.0
    method = build(schedule.scaled(share), IMAGES)
    for iteration in range(method.iterations):
        method.step(iteration)
    assert pace.fixed + pace.whole * share == pytest.approx(clock.time, rel=0.02)


def test_a_trial_ends_in_time():
    clock, schedule = Clock(), Schedule(40)

    def build(settings, images):
        return Clocked(clock, [settings.iterations] * 3, images)

    pace = measure_pace(build, schedule, IMAGES, 10.0, clock)
    assert 10 < clock.time < 11
    assert pace.iterations < 9
    assert pace.whole >= 3 * 40 * 0.5


def test_a_time_too_short_for_any_training_is_refused():
    clock = Clock()
    with pytest.raises(UsageError, match="for more than the 4.50 s of trials and the 2.00 s"):
        fitting_share(lambda s, n: Clocked(clock, [1]), Schedule(9), 1, 3.0, CPU, now=clock)


def test_the_docstring_example_of_quantize_is_correct():
    (example,) = doctest.DocTestFinder().find(api.quantize, "quantize", globs=vars(api).copy())
    assert doctest.DocTestRunner().run(example).failed == 0
    assert len(example.examples) > 3


def test_quantize_without_problems_logs_nothing(network, caplog):
    caplog.set_level(logging.INFO, "fdda_ext")
    images, labels = some_images(20)
    fdda_ext.quantize(network, images, labels, method="minmax", progress=False)
    assert not caplog.text


def test_the_pace_of_a_short_schedule_is_measured():
    clock = Clock()

    def build(settings, images):
        return Clocked(clock, [settings.iterations] if settings.iterations else [], images)

    found = measure_pace(build, Schedule(5), IMAGES, 1e9, clock)
    assert found.iterations == 3
    assert (found.fixed, found.whole) == pytest.approx((2 + 0.01 * IMAGES, 2.5))
    found = measure_pace(build, Schedule(0), IMAGES, 1e9, clock)
    assert (found.fixed, found.iterations) == (pytest.approx(2 + 0.01 * IMAGES), 0)


def test_a_schedule_can_be_stretched_to_the_time():
    clock = Clock()
    share = fitting_share(
        lambda s, n: Clocked(clock, [s.iterations]), Schedule(9), 1, 100.0, CPU, most=64, now=clock
    )
    assert 0.8 * (100 - clock.time) < 2 + 0.5 * 9 * share <= 1.02 * (100 - clock.time)
