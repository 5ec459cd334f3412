"""Bit-Split: every step against its formula, and the student with the integers that it found."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_fdda import problem
from test_prepare_zoo import load
from test_quantization import small_network
from torch import Tensor, nn

from fdda_ext.commands import train
from fdda_ext.deploy import lower
from fdda_ext.errors import UsageError
from fdda_ext.methods import BitSplitConfig, MethodSettings, build_method
from fdda_ext.methods.bitsplit import Planes, Responses
from fdda_ext.methods.channel_scales import channel_steps, fold_channel_scales_, input_of
from fdda_ext.methods.patches import patches, rows
from fdda_ext.quantization.grid import Grid
from fdda_ext.quantization.ranges import Histogram, RangeRule
from fdda_ext.quantization.tracing import trace

TINY = BitSplitConfig(views=3, positions=20, statistics_views=0, rounds=5)


def settings(**changes) -> MethodSettings:
    return MethodSettings(bitsplit=replace(TINY, **changes))


def weights(groups: int = 2, m: int = 3, n: int = 70) -> Tensor:
    random = torch.Generator().manual_seed(0)
    w = torch.randn(groups, m, n, generator=random, dtype=torch.float64)
    w[0, 0] = 0  # an output whose weights are all 0
    return w


def weight_error(planes: Planes) -> Tensor:
    return (planes.weight - planes.alpha[..., None] * planes.v).square().sum(2)


def problem_of_small_network(**quantization):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    task = problem(**quantization)
    network = small_network().requires_grad_(False)
    return replace(task, teacher=network, num_classes=5, images=images, labels=torch.arange(4))


# ---- steps A and B --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_a_fixed_point_and_no_worse_than_the_full_range(bits):
    w = weights()
    planes = Planes(w, bits)
    planes.round()
    largest = 2 ** (bits - 1) - 1
    alpha = (w.abs().amax(2, keepdim=True) / largest).clamp_min(1e-30)
    start = (w - alpha * (w / alpha).round()).square().sum(2)
    assert (weight_error(planes) <= start + 1e-12).all()
    q = planes.integers
    assert torch.equal(q, q.round())
    assert q.abs().max() <= largest
    torch.testing.assert_close(q * planes.scale[..., None], planes.alpha[..., None] * planes.v)
    # Both the integers and the scale are fixed points.
    scale = planes.scale[..., None]
    assert torch.equal((w / scale).round().clamp(-largest, largest), q)
    refit = (w * q).sum(2) / (q * q).sum(2)
    torch.testing.assert_close(refit[w.any(2)], planes.scale[w.any(2)])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_half_steps_of_step_b_never_increase_the_error(bits):
    planes = Planes(weights(), bits)
    planes.round()
    last = weight_error(planes)
    for _ in range(10):
        planes.fit(planes.weight, planes.v)
        after_scale = weight_error(planes)
        assert (after_scale <= last + 1e-9).all()
        alpha = planes.alpha
        planes.fit = lambda *_: 0.0  # changes only the digits
        planes.split(1)
        del planes.fit
        assert torch.equal(planes.alpha, alpha)
        last = weight_error(planes)
        assert (last <= after_scale + 1e-9).all()
    assert planes.integers.abs().max() <= 2 ** (bits - 1) - 1


# ---- step C ---------------------------------------------------------------------------------


def known(planes: Planes, dead: bool = False) -> tuple[Responses, Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    groups, _, n = planes.weight.shape
    x = torch.randn(groups, 200, n, generator=random, dtype=torch.float64)
    x[..., 1:] += x[..., :-1]  # correlated
    if dead:
        x[..., 5] = 0
    float_x = x + 0.1 * torch.randn(x.shape, generator=random, dtype=torch.float64)
    responses = Responses(planes.weight)
    for part in range(0, 200, 80):
        responses.add(x[:, part : part + 80], float_x[:, part : part + 80])
    return responses, x, float_x


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_half_steps_of_step_c_never_increase_the_plain_error(bits):
    planes = Planes(weights(), bits)
    planes.round()
    planes.split(50)
    responses, x, float_x = known(planes, dead=True)
    y = float_x @ planes.weight.transpose(1, 2)

    def error() -> Tensor:
        fitted = x @ (planes.alpha[..., None] * planes.v).transpose(1, 2)
        return (y - fitted).square().sum(1)

    dead = planes.v[..., 5].clone()
    torch.testing.assert_close(responses.error(planes), error())
    first = last = error()
    products = planes.v @ responses.gram
    for _ in range(4):
        planes.fit(responses.cross, products)
        for i in (None, *range(bits - 1)):
            if i is not None:
                responses._improve(planes, i, products)
                torch.testing.assert_close(products, planes.v @ responses.gram)
            assert (error() <= last + 1e-9).all()
            last = error()
    assert last.sum() < 0.8 * first.sum()
    assert planes.integers.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.equal(planes.v[..., 5], dead), "an input that is always 0 changes no digit"


def test_a_sweep_of_step_c_minimises_the_error_in_every_coordinate():
    """Compare with coordinate descent that tries all three digits."""
    planes = Planes(weights(1, 2, 70), 3)
    planes.round()
    responses, x, float_x = known(planes)
    y = float_x[0] @ planes.weight[0].T
    plain = planes.digits.clone()
    for m, n in itertools.product(range(2), range(70)):
        errors = []
        for digit in (-1.0, 0.0, 1.0):
            plain[1, 0, m, n] = digit
            v = plain[0, 0, m] + plain[1, 0, m] / 2
            errors.append(float((y[:, m] - planes.alpha[0, m] * (x[0] @ v)).square().sum()))
        plain[1, 0, m, n] = errors.index(min(errors)) - 1.0
    responses._improve(planes, 1, planes.v @ responses.gram)
    assert torch.equal(planes.digits, plain)


def test_step_c_with_an_identity_input_equals_step_b():
    planes, split = (Planes(weights(1, 4, 70), 3) for _ in range(2))
    for p in (planes, split):
        p.round()
    responses = Responses(planes.weight)
    eye = torch.eye(70)[None]
    responses.add(eye, eye)
    responses.reconstruct(planes, 7)
    split.split(7)
    assert torch.equal(planes.digits, split.digits)
    torch.testing.assert_close(planes.alpha, split.alpha)


def test_damping_adds_the_weighted_error_of_the_weights():
    planes = Planes(weights(), 3)
    responses, x, _ = known(planes)
    planes.round()
    plain = responses.error(planes)
    responses.damp(0.5)
    strength = 0.5 * x.square().sum(1).mean(1)
    torch.testing.assert_close(
        responses.error(planes), plain + strength[:, None] * weight_error(planes)
    )


def test_products_of_float32_rows_agree_with_float64():
    planes = Planes(weights(), 4)
    _, x, float_x = known(planes)
    exact, single = Responses(planes.weight), Responses(planes.weight)
    for part in range(0, 200, 40):
        rows_of_part = [y[:, part : part + 40].float() for y in (x, float_x)]
        exact.add(*(y.double() for y in rows_of_part))
        single.add(*rows_of_part)
    for name in ("gram", "cross", "energy"):
        found, expected = getattr(single, name), getattr(exact, name)
        assert found.dtype == torch.float64
        assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("views", [0, 2])
def test_layers_read_views_of_the_student_and_of_the_float_network(compensate, views):
    task = problem_of_small_network()
    method = build_method("bitsplit", task, settings(compensate=compensate, views=views))
    images = torch.cat(list(method._views(views, task.random())))
    added = []

    def add(self: Responses, x: Tensor, float_x: Tensor) -> None:
        added.append((x, float_x))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Responses, "add", add)
        patch.setattr(Responses, "reconstruct", lambda *_: None)
        patch.setattr(Responses, "error", lambda *_: torch.zeros(1))
        for iteration, node in enumerate(method.layers):
            layer = method.student.get_submodule(str(node.target))
            if isinstance(layer, nn.Linear):
                continue
            before = method.random.get_state()
            student, teacher = (
                input_of(network, str(node.target), images)
                for network in (method.student, task.teacher)
            )
            method.step(iteration)
            method.random.set_state(before)
            positions = torch.rand(
                len(images), node.meta["shape"][2:].numel(), generator=method.random
            )
            positions = positions.argsort(1)[:, :20]
            ((x, float_x),) = added
            added.clear()
            expected = student if compensate else teacher
            torch.testing.assert_close(x, patches(layer, expected, positions))
            torch.testing.assert_close(float_x, patches(layer, teacher, positions))
            assert torch.equal(x, float_x) != (compensate and iteration > 0)


# ---- patches --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 4, (1, 3), padding="same", groups=4, dilation=2, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2, bias=False),
        nn.Conv2d(4, 8, (2, 3), (2, 1), (0, 2), (1, 2), padding_mode="circular", bias=False),
        nn.Conv2d(4, 2, (2, 4), padding="same", groups=2, bias=False),
        nn.Linear(4, 6, bias=False),
    ],
)
def test_patches_times_weights_give_the_output_of_the_layer(layer):
    x = torch.randn(3, 4, 6, 5) if isinstance(layer, nn.Conv2d) else torch.randn(3, 4)
    with torch.no_grad():
        found = patches(layer, x) @ rows(layer, layer.weight).transpose(1, 2)
        y = layer(x).flatten(2) if x.dim() == 4 else layer(x)[..., None]
        torch.testing.assert_close(
            found.transpose(1, 2).flatten(0, 1), y.transpose(0, 1).flatten(1)
        )
        if x.dim() == 4:
            positions = torch.tensor([[3, 0], [1, 2], [5, 4]])
            some = patches(layer, x, positions).unflatten(1, (3, 2))
            every = patches(layer, x).unflatten(1, (3, -1))
            for n in range(3):
                assert torch.equal(some[:, n], every[:, n, positions[n]])


# ---- activations and statistics -------------------------------------------------------------


def test_lloyd_ends_in_a_fixed_point_and_is_no_worse_than_the_full_range():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).relu()
    histogram = Histogram()
    histogram.update(x)
    grid = Grid("unsigned", 3)
    low, high = histogram.find_range(grid, RangeRule("lloyd"))
    assert low == 0
    values, counts = histogram.values_and_counts()
    values, counts = values.double(), counts.double()

    def quantized(s: float) -> Tensor:
        return (values / s).round().clamp(0, 7)

    s = high / 7
    q = quantized(s)
    refit = float((counts * values * q).sum() / (counts * q * q).sum())
    assert s == pytest.approx(refit, rel=1e-6)
    errors = [
        float((counts * (values - t * quantized(t)) ** 2).sum()) for t in (s, float(x.max()) / 7)
    ]
    assert errors[0] < errors[1]


def test_renewed_statistics_are_those_of_the_batches():
    method = build_method("bitsplit", problem(), settings(statistics_views=1, batch=6))
    for iteration in range(method.iterations):
        method.step(iteration)
    student = method.student
    norm = student.get_submodule("1")
    seen = []
    handle = norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    before = norm.running_mean.clone()
    method._renew_statistics()
    handle.remove()
    assert not torch.equal(before, norm.running_mean), "other views have other statistics"
    variance, mean = torch.var_mean(seen[0], (0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    kept = build_method("bitsplit", problem(), settings())
    for iteration in range(kept.iterations):
        kept.step(iteration)
    assert torch.equal(
        kept.student.get_submodule("1").running_mean, problem().teacher[1].running_mean
    )


# ---- the method -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_the_student_rounds_to_the_integers_found(bits, grid):
    task = problem_of_small_network(weight_bits=bits, grid=grid, weight_range="minmax")
    method = build_method("bitsplit", task, settings())
    for iteration in range(method.iterations):
        metrics = method.step(iteration)
        assert all(value.isfinite() for value in metrics.values())
    largest = 2 ** (bits - 1) - 1
    for node in method.layers:
        layer = method.student.get_submodule(str(node.target))
        quantized = layer.weight_quantizer(layer.weight)
        torch.testing.assert_close(quantized, layer.weight, atol=1e-6, rtol=1e-5)
        if grid == "deploy":
            assert layer.weight_quantizer.codes(layer.weight).abs().max() <= largest
    if grid == "deploy":
        with torch.no_grad():
            assert torch.equal(lower(method.student)(task.images), method.student(task.images))


def test_reconstruction_reduces_the_error_of_responses():
    errors = []
    for rounds in (0, 20):
        method = build_method(
            "bitsplit", problem_of_small_network(weight_bits=3), settings(rounds=rounds)
        )
        errors.append([float(method.step(i)["error"]) for i in range(method.iterations)])
    assert all(after <= before * 1.001 for before, after in zip(*errors, strict=True))
    assert sum(errors[1]) < 0.9 * sum(errors[0])


def test_state_resumes_exactly():
    task = problem_of_small_network(weight_bits=3)

    def build():
        return build_method("bitsplit", task, settings(statistics_views=2))

    whole, halves, resumed = build(), build(), build()
    for iteration in range(whole.iterations):
        whole.step(iteration)
    for iteration in range(4):
        halves.step(iteration)
    resumed.load_state_dict(halves.state_dict())
    for iteration in range(4, resumed.iterations):
        resumed.step(iteration)
    for key, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[key]), key


def test_scales_per_channel_are_fixed_points_and_no_worse_than_one_scale():
    x = torch.rand(3, 5, 8, 8, generator=torch.Generator().manual_seed(0)) ** 3
    x *= torch.tensor([1.0, 0.1, 10.0, 0.0, 1.0])[:, None, None]
    steps = channel_steps(x, 4)
    assert steps[3] == 0
    error = 0.0
    for channel, step in enumerate(steps.tolist()):
        values = x[:, channel].double()
        if step:
            q = (values / step).round().clamp(0, 15)
            assert float((values * q).sum() / (q * q).sum()) == pytest.approx(step, rel=1e-5)
            error += float((values - step * q).square().sum())
    for step in torch.linspace(0.01, 1, 100):
        assert error < float((x - step * (x / step).round().clamp(0, 15)).square().sum())


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:regnetx_006", "groups"])
@torch.no_grad()
def test_folding_channel_scales_does_not_change_the_float_output(spec):
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    if spec == "groups":
        layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2))
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    else:
        network = load(spec)
    before = network(images)
    traced = trace(network, images[:1])
    scales = fold_channel_scales_(traced, images, 4)
    count = {"torchvision:resnet18": 8, "timm:regnetx_006": 32, "groups": 1}[spec]
    assert len(scales) == count
    assert all(float(s.std()) > 0.05 and float(s.min()) > 0 for s in scales.values())
    torch.testing.assert_close(traced(images), before, rtol=1e-3, atol=1e-3 * float(before.std()))
    torch.testing.assert_close(network(images), before)
    # All channels that are not dead have the same scale now.
    for name in scales:
        steps = channel_steps(input_of(traced, name, images), 4)
        alive = steps[(steps > 0) & (scales[name] > 0.011)]
        torch.testing.assert_close(alive, alive.mean().expand_as(alive), rtol=2e-2, atol=0)


def test_channel_scales_are_in_the_student_and_its_file():
    clipped = problem()
    clipped.teacher[2] = clipped.teacher[5] = nn.ReLU6()
    with pytest.raises(UsageError, match=r"channel_scales false, .* \(not ReLU6\), got true"):
        build_method("bitsplit", clipped, settings(channel_scales=True))
    task = problem()
    plain, scaled = (
        build_method("bitsplit", task, settings(channel_scales=on)) for on in (False, True)
    )
    assert list(plain.student.state_dict()) == list(scaled.student.state_dict())
    for iteration in range(scaled.iterations):
        scaled.step(iteration)
    rebuilt = task.student()
    rebuilt.load_state_dict(scaled.student.state_dict())
    with torch.no_grad():
        expected = scaled.student(task.images)
        assert torch.equal(rebuilt(task.images), expected)
        assert torch.equal(lower(rebuilt)(task.images), expected)


def test_views_mix_the_classes():
    """Check batches and statistics with images that are sorted by class."""
    task = problem()
    images = torch.cat([task.images.mul(0.1).add(k)[:4] for k in range(4)])
    task = replace(task, images=images, labels=torch.arange(4).repeat_interleave(4))
    method = build_method("bitsplit", task, settings(batch=4, statistics_views=40))
    for batch in method._views(1, method.random):
        assert len(batch.mean((1, 2, 3)).round().unique()) > 1
    every = torch.cat(list(method._views(1, method.random)))
    assert sorted(every.mean((1, 2, 3)).round().tolist()) == [k for k in range(4) for _ in range(4)]
    method._renew_statistics()
    norm = method.student.get_submodule("1")
    x = torch.nn.functional.conv2d(
        torch.cat(list(method._views(8, method.random))),
        method.student.get_submodule("0").weight,
        padding=1,
    )
    share = norm.running_var / x.var((0, 2, 3))
    assert float(share.mean()) > 0.7, "batches of few classes would give about 0.1"


@pytest.mark.parametrize(
    "change",
    [
        {"views": -1},
        {"positions": 0},
        {"rounds": -1},
        {"damping": float("nan")},
        {"batch": 1},
        {"cache_megabytes": -1},
    ],
)
def test_bad_settings_are_refused(change):
    with pytest.raises(UsageError, match=f"bitsplit: expected {next(iter(change))} at least"):
        BitSplitConfig(**change)


@pytest.mark.parametrize("preset", ["paper", "short"])
def test_presets_set_everything_and_scale(preset):
    config, _ = train.parse_arguments(["--method=bitsplit", f"--preset={preset}"])
    chosen = config.settings.bitsplit
    assert config.settings.scaled(0.1).bitsplit.rounds == round(chosen.rounds * 0.1)
    assert (chosen == BitSplitConfig()) == (preset == "paper")
