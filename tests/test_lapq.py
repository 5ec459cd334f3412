"""LAPQ: the fit of the exponent, Powell's method, and the method as a whole."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import minimize
from test_bitsplit import problem_of_small_network
from test_fdda import problem
from torch.nn import functional as F

from fdda_ext.commands import train
from fdda_ext.deploy import lower
from fdda_ext.errors import UsageError
from fdda_ext.methods import LAPQConfig, MethodSettings, build_method
from fdda_ext.methods.lapq import Powell, vertex
from fdda_ext.quantization import QuantizationConfig, prepare
from fdda_ext.quantization.student import (
    activation_quantizers,
    collecting,
    set_activation_mode,
)

TINY = LAPQConfig(exponents=3, sweeps=0.5, tolerance=0.1, batch=4)


def settings(**changes) -> MethodSettings:
    return MethodSettings(lapq=replace(TINY, **changes))


def run(method, begin: int = 0, end: int | None = None) -> list[float]:
    end = method.iterations if end is None else end
    return [float(method.step(i)["loss"]) for i in range(begin, end)]


# ---- the fit --------------------------------------------------------------------------------


def test_vertex_of_an_exact_parabola():
    p = torch.linspace(2, 4, 10, dtype=torch.float64)
    assert vertex(p, 0.3 + 0.7 * (p - 2.9) ** 2) == pytest.approx(2.9, abs=1e-9)


def test_without_a_minimum_the_best_measured_exponent_is_taken():
    p = torch.linspace(2, 4, 5, dtype=torch.float64)
    assert vertex(p, -((p - 2.9) ** 2)) == 4.0  # opens downwards; the minimum is at the right end
    assert vertex(p, (p - 5) ** 2) == 4.0  # the vertex is outside the exponents
    assert vertex(p, p) == 2.0  # a line


# ---- Powell's method ------------------------------------------------------------------------


def line(function):
    """Turn a function of a point into the argument that `Powell` takes."""
    return lambda point, direction: lambda t: function(point + t * direction)


def test_powell_agrees_with_scipy():
    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64)
    hessian = root @ root.T + 0.05 * torch.eye(4, dtype=torch.float64)
    target = torch.tensor([1.3, 0.8, 1.1, 0.7], dtype=torch.float64)

    def quadratic(x):
        d = torch.as_tensor(x, dtype=torch.float64) - target
        return float(d @ hessian @ d)

    start = torch.ones(4, dtype=torch.float64)
    powell = Powell(start, quadratic(start), reach=2.0, tolerance=1e-6)
    values = [powell.value]
    for _ in range(8 * 5):
        powell.step(line(quadratic))
        values.append(powell.value)
    assert all(b <= a for a, b in itertools.pairwise(values))
    theirs = minimize(quadratic, start.numpy(), method="Powell", options={"xtol": 1e-8})
    torch.testing.assert_close(powell.point, torch.from_numpy(theirs.x), atol=1e-3, rtol=0)
    assert powell.value == quadratic(powell.point)
    eye = torch.eye(4, dtype=torch.float64)
    assert not torch.equal(powell.directions, eye), "Powell's method has a new direction"


def test_a_new_direction_is_the_displacement_of_the_sweep():
    """Use a narrow valley along the diagonal: the displacement replaces the steepest axis."""

    def valley(x):
        return float((x[0] - x[1]) ** 2 * 100 + (x.sum() - 3) ** 2)

    start = torch.tensor([0.5, 0.6], dtype=torch.float64)
    powell = Powell(start, valley(start), reach=1.0, tolerance=1e-6)
    for _ in range(2):
        powell.step(line(valley))
    way = powell.point - start
    steepest = powell.steepest
    kept = torch.eye(2, dtype=torch.float64)[1 - steepest]
    beyond, fall = valley(start + 2 * way), valley(start) - powell.value
    bend = 2 * (valley(start) - 2 * powell.value + beyond) * (fall - powell.fall) ** 2
    turns = beyond < valley(start) and bend < powell.fall * (valley(start) - beyond) ** 2
    powell.step(line(valley))
    assert turns
    if steepest == 1:
        kept = torch.eye(2, dtype=torch.float64)[0]
    torch.testing.assert_close(powell.directions[-1], way)
    torch.testing.assert_close(powell.directions[0], kept)


def test_multipliers_stay_positive_and_no_step_is_taken_uphill():
    powell = Powell(torch.tensor([0.2, 1.0], dtype=torch.float64), 1.2, reach=5.0, tolerance=1e-3)
    for _ in range(9):
        powell.step(line(lambda x: float(x.sum())))
    assert powell.point.min() >= 0.05 - 1e-12
    assert powell.value == pytest.approx(0.1, abs=1e-2)
    before = powell.point
    powell.value = -math.inf
    powell.step(line(lambda x: float(x.sum())))
    assert torch.equal(powell.point, before)


# ---- the method -----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_the_loss_is_the_student_s_and_never_rises_in_the_search(grid):
    task = problem_of_small_network(weight_bits=3, activation_bits=3, grid=grid)
    method = build_method("lapq", task, settings(sweeps=1.0))
    losses = run(method)
    search = losses[method.config.exponents :]
    assert all(b <= a for a, b in itertools.pairwise(search))
    assert search[-1] < search[0]
    with torch.no_grad():
        logits = method.student(task.images)
    assert search[-1] == pytest.approx(float(F.cross_entropy(logits, task.labels)), rel=1e-5)
    point = method.powell.point
    for ranges, multiplier in zip(method.ranges, point, strict=True):
        found = ranges.low.clone(), ranges.high.clone()
        ranges.set(float(multiplier))
        assert torch.equal(ranges.low, found[0]) and torch.equal(ranges.high, found[1])
    with torch.no_grad():
        assert torch.equal(method.student(task.images), logits), "the student has the best point"


def test_the_cache_does_not_change_the_losses():
    task = problem_of_small_network()
    methods = [
        build_method("lapq", task, settings(cache_megabytes=size, sweeps=0.3)) for size in (0, 64)
    ]
    assert run(methods[0]) == run(methods[1])


def test_ranges_of_an_exponent_are_those_of_the_lp_rule():
    task = problem_of_small_network()
    method = build_method("lapq", task, settings(bias_correction=False))
    method._set_exponent(3.0)
    config = QuantizationConfig(weight_range="lp", activation_range="lp", lp_exponent=3.0)
    expected = prepare(task.teacher, config, task.images[:1])
    # Activations are collected with weights quantized at the first exponent.
    first = replace(config, lp_exponent=TINY.least_exponent)
    seen = prepare(task.teacher, first, task.images[:1])
    with torch.no_grad(), collecting(activation_quantizers(seen)) as histograms:
        seen(task.images)
    for quantizer, histogram in zip(activation_quantizers(expected), histograms, strict=True):
        quantizer.calibrate(histogram)
    set_activation_mode(expected, "quantize")
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, method.student.state_dict()[key]), key


def test_bias_correction_keeps_mean_outputs():
    """Compare mean outputs of the first and the last layer with those of the float network."""
    task = problem(weight_bits=2)
    method = build_method("lapq", task, settings())
    layer = method.student.get_submodule("0")
    norm = method.student.get_submodule("1")
    with torch.no_grad():
        layer_weight = layer.weight_quantizer(layer.weight)
        exact = F.conv2d(task.images, layer.weight, padding=1).mean((0, 2, 3))
        rounded = F.conv2d(task.images, layer_weight, padding=1).mean((0, 2, 3))
    moved = norm.running_mean - task.teacher[1].running_mean
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(rounded - moved, exact, atol=1e-5, rtol=1e-4)
    last = method.student.get_submodule("8")
    with torch.no_grad():
        features = task.teacher[:-1](task.images).mean(0)
        error = (last.weight_quantizer(last.weight) - last.weight) @ features
    torch.testing.assert_close(task.teacher[8].bias - last.bias, error, atol=1e-5, rtol=1e-4)


def test_state_resumes_exactly_and_the_student_is_a_program():
    task = problem_of_small_network(weight_bits=3, activation_bits=3)

    def build():
        return build_method("lapq", task, settings(sweeps=0.6))

    whole = build()
    run(whole)
    for stop in (2, 7):  # among the exponents, and within the sweep
        halves, resumed = build(), build()
        run(halves, 0, stop)
        resumed.load_state_dict(halves.state_dict())
        run(resumed, stop)
        for key, tensor in whole.student.state_dict().items():
            assert torch.equal(tensor, resumed.student.state_dict()[key]), key
    with torch.no_grad():
        assert torch.equal(lower(whole.student)(task.images), whole.student(task.images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exponents": 2}, "exponents at least 3, got 2"),
        ({"sweeps": -1.0}, "sweeps at least 0"),
        ({"batch": 0}, "batch at least 1"),
        ({"reach": 0.0}, "reach above 0"),
        ({"tolerance": float("nan")}, "tolerance above 0"),
        ({"least_exponent": 4.0}, "largest_exponent above least_exponent, got 4.0 and 4.0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UsageError, match=f"lapq: expected {message}"):
        LAPQConfig(**change)


@pytest.mark.parametrize("preset", ["paper", "short"])
def test_presets_set_everything_and_scale(preset):
    config, _ = train.parse_arguments(["--method=lapq", f"--preset={preset}"])
    chosen = config.settings.lapq
    scaled = config.settings.scaled(0.1).lapq
    assert (scaled.exponents, scaled.sweeps) == (3, chosen.sweeps * 0.1)
    assert (chosen == LAPQConfig()) == (preset == "paper")
