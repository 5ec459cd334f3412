"""FDDA against its paper: random draws, losses, schedule, learned rounding."""

import gc
import math
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fdda_ext.data import Augmentation
from fdda_ext.deploy import lower
from fdda_ext.engine import Replayed
from fdda_ext.errors import UsageError
from fdda_ext.methods import (
    FDDA,
    DistillationConfig,
    FDDAConfig,
    MethodSettings,
    Problem,
    build_method,
    distillation_loss,
)
from fdda_ext.methods.distillation import ImageSampler, Student
from fdda_ext.methods.zaq import ZAQConfig
from fdda_ext.quantization import QuantizationConfig, bits_table
from fdda_ext.reconstruction import RoundingConfig, share_decided
from fdda_ext.statistics import Distortion
from fdda_ext.synthesis import GeneratorConfig

CLASSES = 6


def teacher() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )
    network.train()
    for _ in range(5):
        network(torch.randn(16, 3, 16, 16))
    return network.eval().requires_grad_(False)


def problem(right: bool | None = None, **quantization) -> Problem:
    """Build a problem; if ``right`` is given, the teacher predicts all labels, or none of them."""
    network = teacher()
    images = torch.randn(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(CLASSES)
    if right is not None:
        # Choose the last layer such that the teacher predicts class k for image k.
        features = network[:-1](images)
        target = torch.eye(CLASSES) * 20
        solution = torch.linalg.lstsq(
            torch.cat([features, torch.ones(CLASSES, 1)], 1), target
        ).solution
        network[-1].weight.copy_(solution[:-1].T)
        network[-1].bias.copy_(solution[-1])
        if not right:
            labels = (labels + 1) % CLASSES
    return Problem(
        network,
        CLASSES,
        images,
        labels,
        Augmentation(crop_scale=(0.8, 1.0), flip=False),
        QuantizationConfig(**quantization),
        seed=0,
    )


def settings(distillation: dict | None = None, **fdda) -> MethodSettings:
    defaults = {
        "generator": GeneratorConfig(channels=8),
        "batch": 8,
        "warmup_iterations": 4,
        "range_iterations": 3,
        "misclassified_iterations": 2,
        "lr_milestones": [5],
    }
    return MethodSettings(
        DistillationConfig(
            **{"steps": 3, "real_batch": 4, "generated_batch": 4, **(distillation or {})}
        ),
        FDDAConfig(**{**defaults, **fdda}),
    )


def test_distillation_loss_is_cross_entropy_plus_weighted_divergence():
    torch.manual_seed(0)
    student, target = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    labels = torch.randint(7, (5,))
    config = DistillationConfig()
    p, q = (target / 20).softmax(1), (student / 20).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1)
    expected = F.cross_entropy(student, labels) + 20 * 20**2 * divergence.mean()
    torch.testing.assert_close(distillation_loss(student, target, labels, config), expected)
    # GDFQ's reduction gives 1/K of that.
    lighter = replace(config, reduction="batch_and_classes", cross_entropy_weight=0.0)
    expected = 20 * 20**2 * divergence.mean() / 7
    torch.testing.assert_close(distillation_loss(student, target, labels, lighter), expected)


def test_default_settings_are_the_published_ones():
    fdda, student = FDDAConfig(), DistillationConfig()
    assert fdda.warmup_iterations == 50 * 200
    assert student.steps == 350 * 200
    assert fdda.range_iterations == 4 * 200
    assert fdda.misclassified_iterations == 5 * 200
    assert (fdda.bns_weight, fdda.distorted_weight, fdda.centralised_weight) == (0.2, 0.9, 0.01)
    assert (fdda.distortion.mean_std, fdda.distortion.variance_std) == (0.5, 1.0)
    assert (fdda.batch, fdda.classes_per_batch) == (16, 1)
    assert (student.temperature, student.weight, student.lr) == (20.0, 20.0, 1e-6)


def test_number_of_steps_and_phases():
    method = FDDA(problem(), settings())
    assert method.iterations == 4 + 3
    students = [it for it in range(7) if "student" in method.step(it)]
    assert students == [4, 5, 6]
    assert method.trainer.steps_done == 3


class Recomputed(Replayed):
    """A stand-in for a CUDA graph: a replay repeats the captured call on the same memory."""

    def _capture(self, step, inputs):
        before = None if self._random is None else self._random.get_state()
        self._inputs = [x.clone() for x in inputs]
        self._outputs = step(*self._inputs)
        self._gradients = [parameter.grad for parameter in self._parameters]
        if self._random is not None:
            self._random.set_state(before)  # a capture draws no random numbers
        self._graph = SimpleNamespace(replay=lambda: self.recompute(step))

    def recompute(self, step):
        for name, value in step(*self._inputs).items():
            self._outputs[name].copy_(value)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient.copy_(parameter.grad)


def test_replayed_steps_get_their_inputs_and_leave_their_gradients():
    """Check inputs, gradients and random numbers of replays on the CPU; test_cuda.py has graphs."""
    chosen = settings({"steps": 8}, warmup_iterations=10, misclassified_iterations=6)
    task = problem(right=True)
    launched = FDDA(task, chosen)
    with (
        mock.patch("fdda_ext.methods.alternating.Replayed", Recomputed),
        mock.patch("fdda_ext.methods.distillation.Replayed", Recomputed),
    ):
        replayed = FDDA(task, chosen)
    for iteration in range(launched.iterations):
        expected = launched.step(iteration)
        with mock.patch.object(Problem, "replays", True):
            found = replayed.step(iteration)
        assert found == expected
        # Steps are captured again when classes without a correct centre are no longer drawn.
        assert replayed.replayed_generator.is_captured == (iteration % 6 > 2 or iteration >= 9)
        assert replayed.trainer.replayed.is_captured == (iteration >= 13)
    assert torch.equal(launched.random.get_state(), replayed.random.get_state())
    for one, other in zip(
        launched.student.parameters(), replayed.student.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_a_failed_capture_names_the_option_to_disable_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock())
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock())
    for context in ("device_of", "graph"):
        monkeypatch.setattr(torch.cuda, context, lambda *_, **__: nullcontext())

    calls = []

    def step() -> dict:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return {}

    replayed = Replayed([torch.zeros(1)])
    for _ in range(3):
        replayed(step)
    with pytest.raises(UsageError, match=r"expected cuda_graphs false .* stream is capturing"):
        replayed(step)


def test_a_deleted_method_frees_its_steps_at_once():
    """Require this without the garbage collector: a graph holds the memory of a whole step."""
    method = FDDA(problem(), settings())
    steps = [weakref.ref(method.trainer.replayed), weakref.ref(method.replayed_generator)]
    gc.disable()
    try:
        del method
        assert [step() for step in steps] == [None, None]
    finally:
        gc.enable()


def test_generator_loss_is_the_weighted_sum_of_its_terms():
    method = FDDA(problem(), settings())
    metrics, images, labels = method.generator_step(0)
    assert images.shape == (8, 3, 16, 16)
    assert not images.requires_grad
    assert labels.shape == (8,)
    expected = (
        metrics["classification"]
        + 0.2 * metrics["bns"]
        + 0.9 * metrics["distorted"]
        + 0.01 * metrics["centralised"]
    )
    torch.testing.assert_close(metrics["generator"], expected)


@pytest.mark.parametrize("name", ["bns", "centralised", "distorted", "classification"])
def test_each_generator_loss_falls_when_it_is_trained_alone(name):
    names = ("bns", "centralised", "distorted", "classification")
    weights = {f"{other}_weight": float(other == name) for other in names}
    # Use less noise than published, since its variance is the minimum of the distorted loss.
    chosen = settings(**weights, lr=5e-3, lr_milestones=[], distortion=Distortion(0.01, 0.01))
    method = FDDA(problem(right=True), chosen)
    values = [float(method.generator_step(i)[0][name]) for i in range(60)]
    assert sum(values[-10:]) < 0.8 * sum(values[:10])


@pytest.mark.parametrize("classes_per_batch", [1, 2, 4])
def test_batch_b_has_the_given_number_of_different_classes(classes_per_batch):
    method = FDDA(problem(), settings(classes_per_batch=classes_per_batch))
    classes = method.draw_classes(0)
    assert classes.unique().numel() == classes.numel() == classes_per_batch


def test_misclassified_classes_are_pulled_to_noise_then_no_longer_drawn():
    method = FDDA(problem(right=True), settings())
    assert method.num_correct == CLASSES
    method.centres.correct[:4] = False
    method.num_correct = 2
    metrics = [method.generator_step(0)[0] for _ in range(20)]
    # L_C is 0 for classes without a correct centre, about 4 of 6 draws.
    zero = sum(float(m["centralised"]) == 0 for m in metrics)
    assert 0 < zero < 20
    assert all(float(m["distorted"]) > 0 for m in metrics)
    late = torch.cat([method.draw_classes(2) for _ in range(50)])
    assert set(late.tolist()) == {4, 5}
    assert set(torch.cat([method.draw_classes(1) for _ in range(80)]).tolist()) == set(range(6))


def test_teacher_that_gets_every_image_wrong_is_refused():
    with pytest.raises(UsageError, match="classifies some calibration images correctly"):
        FDDA(problem(right=False), settings())


def test_ranges_move_only_in_the_range_phase():
    method = FDDA(problem(grid="paper"), settings())

    def ranges():
        return {
            name: tensor.clone()
            for name, tensor in method.student.state_dict().items()
            if "activation" in name or "quantizer" in name
        }

    seen = []
    for iteration in range(method.iterations):
        before = ranges()
        method.step(iteration)
        after = ranges()
        seen.append(any(not torch.equal(before[name], after[name]) for name in before))
    assert seen[:3] == [True, True, True]
    assert seen[3] is False


def test_student_learns_and_keeps_its_running_statistics():
    method = FDDA(
        problem(right=True),
        settings(
            {"steps": 60, "optimizer": "adam", "lr": 1e-3, "cosine_half_period": None},
            ranges_from="calibration",
        ),
    )
    before = {n: b.clone() for n, b in method.student.named_buffers() if "running" in n}
    losses = [float(m["student"]) for i in range(64) if "student" in (m := method.step(i))]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert before
    for name, buffer in method.student.named_buffers():
        if name in before:
            assert torch.equal(buffer, before[name])


class Reads(TorchDispatchMode):
    """A mode that records operators that would wait for a GPU: they read values of tensors."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if any(waiting in name for waiting in self.WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_an_iteration_does_not_wait_for_a_gpu():
    method = FDDA(problem(right=True), settings({"optimizer": "adam"}))
    with Reads() as reads:
        for iteration in range(method.iterations):
            # Two reads do not count: one per run at the end of the range phase, and Adam's count
            # of steps, which is a tensor on the CPU.
            with (
                mock.patch("fdda_ext.methods.alternating.set_activation_mode"),
                mock.patch.object(torch.optim.Adam, "step"),
            ):
                method.step(iteration)
        assert reads.found == []
        method.centres.correct.sum().item()
        assert reads.found == ["_local_scalar_dense"], "this read is recorded"


def test_bfloat16_is_close_and_trained_parameters_stay_in_float32():
    exact = FDDA(problem(right=True), settings())
    rough = FDDA(replace(problem(right=True), precision=torch.bfloat16), settings())
    for iteration in range(exact.iterations):
        expected, found = exact.step(iteration), rough.step(iteration)
        for name, value in expected.items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], value, rtol=0.1, atol=0.05)
    assert not torch.equal(expected["generator"], found["generator"])
    parameters = [*rough.generator.parameters(), *rough.student.parameters()]
    assert {p.dtype for p in parameters} == {torch.float32}


def test_learning_rate_follows_the_published_half_periods():
    network = problem().student()
    student = Student(
        network, teacher(), DistillationConfig(steps=70_000, cosine_half_period=20_000)
    )
    for steps, factor in ((0, 1), (10_000, 0.5), (20_000, 0), (40_000, 1), (70_000, 0.5)):
        student.steps_done = steps
        assert student.rate_factor() == pytest.approx(factor, abs=1e-9)
    student.config = replace(student.config, cosine_half_period=None)
    student.steps_done = 35_000
    assert student.rate_factor() == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


def test_sampler_draws_batches_of_different_images():
    task = problem()
    sampler = ImageSampler(task, 4, task.random())
    first = sampler.next()[1]
    second = sampler.next()[1]
    assert first.unique().numel() == second.unique().numel() == 4


def test_unknown_method_names_the_nearest():
    with pytest.raises(UsageError, match="got fda; did you mean fdda"):
        build_method("fda", problem(), settings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes_per_batch": 3}, "classes_per_batch to divide batch"),
        ({"batch": 1}, "batch at least 2, got 1"),
        ({"lr": 0.0}, "lr above 0"),
        ({"bns_weight": -1.0}, "bns_weight at least 0 and finite, got -1.0"),
        ({"range_iterations": 9}, "range_iterations between 1 and warmup_iterations"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        settings(**change)


def test_the_student_may_see_only_generated_images():
    method = FDDA(problem(right=True), settings({"real_batch": 0}))
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    shown, shown_labels = method.student_images(images, labels)
    assert shown.shape == images.shape and torch.equal(shown_labels, labels)
    method = FDDA(problem(right=True), settings({"real_batch": 2}))
    shown, shown_labels = method.student_images(images, labels)
    assert shown.shape[0] == 6 and torch.equal(shown_labels[2:], labels)


def test_rounding_is_learned_instead_of_weights():
    rounding = RoundingConfig(lr=0.1, weight=10.0, first_beta=10.0)
    task = problem(right=True)
    distillation = {"steps": 120, "weight": 0.01, "rounding": rounding}

    def build():
        return FDDA(task, settings(distillation))

    def run(method, begin=0, end=None):
        for iteration in range(begin, end or method.iterations):
            method.step(iteration)

    whole, half, resumed = build(), build(), build()
    before = {n: m.weight.clone() for n, m in half.student.named_modules() if hasattr(m, "weight")}
    curves = [whole.step(iteration) for iteration in range(whole.iterations)]
    assert float(curves[-1]["decided"]) >= 0.999 > float(curves[4]["decided"])
    assert float(curves[-1]["regulariser"]) < 1 and "regulariser" not in curves[4]
    run(half, end=50)
    resumed.load_state_dict(half.state_dict())
    run(resumed, begin=50)
    for key, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[key]), key
    moved = 0
    for row in bits_table(whole.student):
        layer = whole.student.get_submodule(row.name)
        quantizer = layer.weight_quantizer
        assert torch.equal(quantizer(layer.weight), layer.weight)
        distance = quantizer.position(layer.weight) - quantizer.position(before[row.name])
        inside = quantizer.codes(before[row.name]).abs() < quantizer.grid.quant_max
        assert float(distance[inside].abs().max()) < 1 + 1e-4
        moved += int((distance[inside].abs() > 0.5 + 1e-4).sum())
    assert moved > 0, "some weights are not rounded to the nearest"
    assert share_decided(whole.trainer.soft) >= 0.999
    norms = [m for m in whole.student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.weight.grad is not None for norm in norms)
    with torch.no_grad():
        assert torch.equal(lower(whole.student)(task.images), whole.student(task.images))


@pytest.mark.parametrize(
    ("name", "distillation", "quantization", "message"),
    [
        ("fdda", {}, {"grid": "paper", "weight_range": "minmax"}, "weight_range other than minmax"),
        ("fdda", {"objective": "discrepancy"}, {}, "objective divergence with this method"),
        ("zaq", {"objective": "discrepancy"}, {}, "rounding null with the objective discrepancy"),
    ],
)
def test_settings_that_exclude_learned_rounding_are_refused(
    name, distillation, quantization, message
):
    config = settings({**distillation, "rounding": RoundingConfig()})
    config = replace(config, zaq=ZAQConfig(generator=config.fdda.generator))
    with pytest.raises(UsageError, match=message):
        build_method(name, problem(right=True, **quantization), config)


def test_bad_distillation_settings_are_refused():
    for change in ({"temperature": 0.0}, {"real_batch": -1}, {"cosine_half_period": -1}):
        with pytest.raises(UsageError, match=f"distillation: expected {next(iter(change))}"):
            DistillationConfig(**change)
