"""ZeroQ, DSG and DeepInversion: losses against formulas, optimisation of images, mixed bits."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_fdda import CLASSES, problem
from torch.nn import functional as F

from fdda_ext.commands import evaluate, train
from fdda_ext.deploy import lower
from fdda_ext.engine import load_state, save_state
from fdda_ext.errors import UsageError
from fdda_ext.methods import (
    AdaptiveDeepInversionConfig,
    DeepInversionConfig,
    DistillationConfig,
    DSGConfig,
    MethodSettings,
    ZeroQConfig,
    build_method,
)
from fdda_ext.methods.deepinversion import jensen_shannon
from fdda_ext.methods.dsg import gram_distance
from fdda_ext.quantization import QuantizationConfig, bits_table, prepare
from fdda_ext.statistics import (
    LayerStatistics,
    capture,
    feature_distance,
    image_alignment,
    total_variation,
)
from fdda_ext.synthesis import ImageOptimisation, ImageOptimisationConfig
from fdda_ext.synthesis.image_optimisation import shift_and_mirror

NAMES = ["zeroq", "dsg", "di", "adi"]


def settings(steps: int = 0, synthesis: dict | None = None, **sections) -> MethodSettings:
    images = ImageOptimisationConfig(**{"images": 5, "batch": 3, "steps": 2, **(synthesis or {})})
    kinds = {
        "zeroq": ZeroQConfig,
        "dsg": DSGConfig,
        "di": DeepInversionConfig,
        "adi": AdaptiveDeepInversionConfig,
    }
    defaults = {"dsg": {"noise_images": 7}, "adi": {"rounds": 2}}
    return MethodSettings(
        DistillationConfig(steps=steps, real_batch=0, generated_batch=4, optimizer="adam", lr=1e-3),
        **{
            name: kind(images, **{**defaults.get(name, {}), **sections.get(name, {})})
            for name, kind in kinds.items()
        },
    )


def statistics(channels: tuple[int, ...]) -> LayerStatistics:
    return LayerStatistics(
        [torch.randn(1, c) for c in channels], [torch.rand(1, c) + 0.5 for c in channels]
    )


# ---- losses ---------------------------------------------------------------------------------


def plain_alignment(x, mean, variance, margins=(0.0, 0.0)):
    """Return the alignment loss of one image ``[C, H, W]`` in one layer."""
    total = 0.0
    for c in range(len(x)):
        values = x[c].flatten()
        m = values.mean()
        s = (values.var() + 1e-6).sqrt() if len(values) > 1 else torch.tensor(1e-3)
        total += max(abs(m - mean[c]) - margins[0], 0) ** 2
        total += max(abs(s - (variance[c] + 1e-6).sqrt()) - margins[1], 0) ** 2
    return total


@pytest.mark.parametrize("margins", [None, [[0.3, 0.1], [0.02, 0.5]]])
def test_alignment_equals_its_formula_for_every_image_and_layer(margins):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 4, 5, 5), torch.randn(3, 2, 1, 1)]
    targets = statistics((4, 2))
    found = image_alignment(inputs, targets, None if margins is None else torch.tensor(margins))
    for n in range(3):
        for layer in range(2):
            expected = plain_alignment(
                inputs[layer][n],
                targets.means[layer][0],
                targets.variances[layer][0],
                margins[layer] if margins else (0.0, 0.0),
            )
            torch.testing.assert_close(found[n, layer], expected)


def test_inside_the_margins_there_is_neither_loss_nor_gradient():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    loss = image_alignment([x], statistics((4,)), torch.tensor([[9.0, 9.0]])).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(loss.detach()) == 0 and not gradient.any()


def test_feature_distance_is_a_sum_of_norms_with_a_finite_gradient_at_0():
    torch.manual_seed(0)
    inputs = [torch.randn(3, 4, 5, 5), torch.randn(3, 2, 3, 3)]
    running = statistics((4, 2))
    expected = torch.zeros(())
    for layer, x in enumerate(inputs):
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        distance = (variance - running.variances[layer]).norm()
        expected += (10, 1)[layer] * (distance + (mean - running.means[layer]).norm())
    torch.testing.assert_close(feature_distance(inputs, running, 10.0), expected)

    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    variance, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0, keepdim=False)
    match = LayerStatistics([mean[None]], [variance[None]])
    (gradient,) = torch.autograd.grad(feature_distance([x], match, 1.0), x)
    assert gradient.isfinite().all()


def test_total_variation_equals_its_formula_and_is_0_for_a_constant():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5)
    expected = sum(
        math.sqrt(
            sum(
                float(x[n, c, i, j] - x[n, c, i + down, j + right]) ** 2
                for n in range(2)
                for c in range(3)
                for i in range(4 - down)
                for j in range(max(-right, 0), 5 - max(right, 0))
            )
        )
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1))
    )
    torch.testing.assert_close(float(total_variation(x)), expected)
    constant = torch.full((2, 3, 4, 4), 0.7, requires_grad=True)
    flat = total_variation(constant)
    assert float(flat.detach()) < 1e-5
    assert torch.autograd.grad(flat, constant)[0].isfinite().all()


def test_jensen_shannon_equals_its_formula_and_lies_between_0_and_ln_2():
    torch.manual_seed(0)
    a, b = torch.randn(4, 6) * 5, torch.randn(4, 6) * 5
    p, q = (a / 3).softmax(1), (b / 3).softmax(1)
    m = (p + q) / 2
    expected = 0.5 * ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean()
    torch.testing.assert_close(jensen_shannon(a, b), expected)
    torch.testing.assert_close(jensen_shannon(a, a), torch.tensor(0.0), atol=1e-6, rtol=0)
    far = torch.eye(6)[:4] * 1e3
    torch.testing.assert_close(jensen_shannon(far, far.flip(0)), torch.tensor(math.log(2)))


def test_gram_distance_is_zero_for_the_same_images_and_differentiable():
    torch.manual_seed(0)
    images, noise = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(gram_distance(noise, noise), torch.tensor(0.0), atol=1e-5, rtol=0)
    images.requires_grad_()
    distance = gram_distance(images, noise)
    assert 0 < float(distance.detach()) <= 4
    assert torch.autograd.grad(distance, images)[0].isfinite().all()


# ---- the methods' losses --------------------------------------------------------------------


def seen_by(method, images):
    seen = capture(method.problem.teacher, images)
    layers = [(torch.zeros(3), torch.ones(3))]
    layers += [(layer.running_mean, layer.running_var) for layer in seen.layers]
    return seen, [images, *seen.inputs], layers


def test_zeroq_loss_is_the_alignment_of_images_and_layers():
    method = build_method("zeroq", problem(), settings())
    images = torch.randn(3, 3, 16, 16)
    _, inputs, layers = seen_by(method, images)
    expected = sum(
        plain_alignment(x[n], mean, variance)
        for x, (mean, variance) in zip(inputs, layers, strict=True)
        for n in range(3)
    )
    found = method.image_loss(images, torch.zeros(3, dtype=torch.int64))["images"]
    torch.testing.assert_close(found, expected / 3)


def test_dsg_without_margins_and_own_layers_equals_zeroq():
    method = build_method("dsg", problem(), settings(dsg={"own_layer_weight": 0.0}))
    zeroq = build_method("zeroq", problem(), settings())
    images, labels = torch.randn(3, 3, 16, 16), torch.zeros(3, dtype=torch.int64)
    assert method.image_loss(images, labels)["images"] < zeroq.image_loss(images, labels)["images"]
    method.margins.zero_()
    torch.testing.assert_close(
        method.image_loss(images, labels)["images"], zeroq.image_loss(images, labels)["images"]
    )


def test_dsg_own_layers_alternate_from_image_to_image():
    method = build_method("dsg", problem(), settings())
    method.images = torch.zeros(3, 3, 16, 16)  # the next batch begins with image 3
    images = torch.randn(2, 3, 16, 16)
    _, inputs, layers = seen_by(method, images)
    expected = 0.0
    for n in range(2):
        for layer, (x, target) in enumerate(zip(inputs, layers, strict=True)):
            own = layer - 1 == (3 + n) % 2
            margins = method.margins[layer].tolist()
            expected += (1 + own) * plain_alignment(x[n], *target, margins)
    found = method.image_loss(images, torch.zeros(2, dtype=torch.int64))["images"]
    torch.testing.assert_close(found, expected / 2)


def test_dsg_margins_are_quantiles_over_noise_images():
    method = build_method("dsg", problem(), settings(dsg={"quantile": 0.8, "noise_images": 5}))
    random = method.problem.random()
    noise = torch.cat([method.noise(count, random) for count in (3, 2)])
    _, inputs, layers = seen_by(method, noise)
    assert method.margins[0].tolist() == [0, 0]
    for x, (mean, variance), margin in zip(inputs[1:], layers[1:], method.margins[1:], strict=True):
        off_mean = (x.mean((2, 3)) - mean).abs()
        off_std = ((x.var((2, 3)) + 1e-6).sqrt() - (variance + 1e-6).sqrt()).abs()
        torch.testing.assert_close(margin[0], off_mean.flatten().quantile(0.8))
        torch.testing.assert_close(margin[1], off_std.flatten().quantile(0.8))


def test_dsg_options_add_their_terms():
    method = build_method("dsg", problem(), settings(dsg={"priors": True, "spatial": True}))
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 4, 2])
    before = method.random.get_state()
    losses = method.image_loss(images, labels)
    method.random.set_state(before)
    logits = method.problem.teacher(images)
    priors = 2 * F.cross_entropy(logits, labels) + 0.01 * total_variation(images)
    priors += 0.01 * images.flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(losses["priors"], priors)
    spatial = gram_distance(images, method.noise(3, method.random)) / 2
    torch.testing.assert_close(losses["spatial"], spatial)
    torch.testing.assert_close(losses["images"], losses["alignment"] + priors + spatial)


def test_deep_inversion_loss_is_the_weighted_sum_of_its_terms():
    method = build_method("di", problem(), settings(di={"feature_weight": 0.3}))
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 4, 2])
    losses = method.image_loss(images, labels)
    seen = capture(method.problem.teacher, images)
    expected = F.cross_entropy(seen.logits, labels)
    expected = expected + 0.3 * feature_distance(seen.inputs, method.running, 10.0)
    expected = expected + 1e-4 * total_variation(images)
    expected = expected + 1e-5 * images.flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(losses["images"], expected)


def test_adaptive_images_compete_with_the_student_from_the_second_round_on():
    method = build_method("adi", problem(), settings(steps=2))
    plain = build_method("di", problem(), settings())
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 4, 2])
    expected = plain.image_loss(images, labels)["images"]
    torch.testing.assert_close(method.image_loss(images, labels)["images"], expected)
    first_round = 2  # iterations of its only batch
    for iteration in range(first_round + 1):
        metrics = method.step(iteration)
    assert "student" in metrics, "half of the student steps come before the second round"
    losses = method.image_loss(images, labels)
    with torch.enable_grad():  # with gradients the student sums floats, as in the loss
        competition = 1 - jensen_shannon(method.student(images), method.problem.teacher(images))
    torch.testing.assert_close(losses["competition"], competition)
    torch.testing.assert_close(losses["images"], expected + 0.2 * competition)


# ---- the mechanism --------------------------------------------------------------------------


def optimisation(count: int = 2, pixel_range=None, may_mirror=True, **changes):
    return ImageOptimisation(
        ImageOptimisationConfig(**changes),
        count,
        (3, 8, 8),
        torch.Generator().manual_seed(0),
        pixel_range,
        may_mirror,
    )


def test_shifts_roll_and_mirror_the_whole_batch():
    images = torch.arange(2 * 3 * 5 * 6).view(2, 3, 5, 6).float()
    random = torch.Generator().manual_seed(0)
    rolls = {(dy, dx): images.roll((dy, dx), (2, 3)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    seen = set()
    for _ in range(300):
        found = shift_and_mirror(images, 1, True, random)
        seen |= {
            (*offset, flipped)
            for offset, rolled in rolls.items()
            for flipped in (False, True)
            if torch.equal(found, rolled.flip(3) if flipped else rolled)
        }
    assert len(seen) == 18


def test_the_coarse_steps_see_half_the_resolution():
    images = optimisation(steps=3, coarse_steps=2, schedule="cosine")
    sizes = []
    while not images.finished:
        shown = images.show()
        sizes.append(shown.shape[-1])
        images.step(shown.square().sum())
    assert sizes == [4, 4, 8]


def test_the_cosine_schedule_restarts_at_each_resolution():
    images = optimisation(
        steps=10, coarse_steps=4, schedule="cosine", warmup_steps=2, lr=0.5, start_std=1.0
    )
    rates = []
    while not images.finished:
        images.step(images.show().square().sum())
        rates.append(images.optimizer.param_groups[0]["lr"])
    half = 0.5 * (1 + math.cos(math.pi / 4))
    expected = [0.25, 0.5, 0.5, 0.25, 0.25, 0.5, 0.5, 0.5 * half, 0.25, 0.5 * (1 - half)]
    assert rates == pytest.approx(expected)


def test_the_plateau_schedule_ends_at_its_minimum():
    images = optimisation(steps=40, patience=3, lr=0.5)
    while not images.finished:
        images.step(images.show().sum() * 0 + 1)  # a constant loss
    assert images.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_pixels_stay_in_their_range():
    ends = (torch.full((3, 1, 1), -0.5), torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1))
    images = optimisation(steps=5, clip=True, start_std=2.0, pixel_range=ends)
    while not images.finished:
        images.step(-images.show().sum())
    assert (images.result >= -0.5).all()
    assert images.result.amax((0, 2, 3)).tolist() == [0.5, 1.0, 2.0]
    free = optimisation(steps=5, start_std=2.0, pixel_range=ends)
    assert free.pixels.min() < -0.5, "without clip, pixels may leave their range"


def test_the_best_images_are_kept():
    images = optimisation(steps=4, keep_best=True)
    seen = []
    for loss in (3.0, 1.0, 2.0, 5.0):
        seen.append(images.pixels.detach().clone())
        images.step(images.show().sum() * 0 + images.show().mean() * 1e-3 + loss)
    assert torch.equal(images.result, seen[1])


# ---- the schedule ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_and_ranges_are_set_without_a_student_step(name):
    method = build_method(name, problem(), settings(synthesis={"steps": 40, "lr": 0.1}))
    losses = [float(method.step(i)["images"]) for i in range(method.iterations)]
    batches = len(method.batch_sizes)
    assert len(losses) == 40 * batches
    for begin in range(0, len(losses), 40):
        assert losses[begin + 39] < 0.9 * losses[begin]
    assert method.trainer.steps_done == 0
    assert method.images.shape == (5, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(lower(method.student)(method.images), method.student(method.images))


def test_classes_are_balanced_and_zeroq_takes_labels_from_the_teacher():
    method = build_method("di", problem(), settings(synthesis={"images": 15, "batch": 4}))
    counts = torch.bincount(method.labels, minlength=CLASSES)
    assert counts.sum() == 15 and counts.min() == 2 and counts.max() == 3
    assert method.batch_sizes == [4, 4, 4, 3]
    zeroq = build_method("zeroq", problem(), settings())
    for iteration in range(zeroq.iterations):
        zeroq.step(iteration)
    assert torch.equal(zeroq.labels, zeroq.problem.teacher(zeroq.images).argmax(1))


def test_rounds_share_images_and_student_steps():
    chosen = settings(steps=5, synthesis={"images": 6, "batch": 2}, adi={"rounds": 3})
    method = build_method("adi", problem(), chosen)
    kinds = ["s" if "student" in method.step(i) else "i" for i in range(method.iterations)]
    assert "".join(kinds) == "iis" + "iiss" + "iiss"
    assert method.trainer.steps_done == 5


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("zeroq", {"zeroq": {"average_bits": 4.0}}),
        ("dsg", {"dsg": {"priors": True, "spatial": True}}),
        ("adi", {}),
    ],
)
def test_a_run_stopped_anywhere_ends_with_the_same_bits(name, sections, tmp_path):
    chosen = settings(
        steps=3,
        synthesis={"images": 6, "steps": 4, "coarse_steps": 1, "jitter": 2, "keep_best": True},
        **sections,
    )

    def build():
        task = problem(weight_range="minmax", activation_range="minmax")
        return build_method(name, task, chosen)

    whole = build()
    for iteration in range(whole.iterations):
        save_state(tmp_path / f"{iteration}", whole.state_dict())
        whole.step(iteration)
    for begin in range(whole.iterations):
        resumed = build()
        resumed.load_state_dict(load_state(tmp_path / f"{begin}"))
        for iteration in range(begin, resumed.iterations):
            resumed.step(iteration)
        assert torch.equal(whole.images, resumed.images)
        assert torch.equal(whole.labels, resumed.labels)
        for key, tensor in whole.student.state_dict().items():
            assert torch.equal(tensor, resumed.student.state_dict()[key]), (begin, key)


# ---- mixed precision ------------------------------------------------------------------------


@torch.no_grad()
def test_sensitivity_is_the_divergence_of_one_quantized_layer():
    method = build_method("zeroq", problem(), settings(zeroq={"candidate_bits": [2, 8]}))
    method.images = torch.randn(5, 3, 16, 16)
    found = method.sensitivity()
    teacher = method.problem.teacher
    target = teacher(method.images).softmax(1)
    for bits in (2, 8):
        student = prepare(teacher, QuantizationConfig(weight_bits=bits), method.images[:1])
        for name in ("0", "3", "8"):
            one = copy.deepcopy(teacher)
            layer = student.get_submodule(name)
            one.get_submodule(name).weight.copy_(layer.weight_quantizer(layer.weight))
            logits = one(method.images).log_softmax(1)
            expected = (target * (target.log() - logits)).sum(1).mean()
            assert found[name][bits] == pytest.approx(float(expected), rel=1e-3, abs=1e-7)
            assert found[name][8] < found[name][2]


def test_average_bits_are_kept_and_used_by_the_student():
    method = build_method("zeroq", problem(), settings(zeroq={"average_bits": 4.5}))
    for iteration in range(method.iterations):
        method.step(iteration)
    rows = bits_table(method.student)
    sizes = [math.prod(row.weight_shape) for row in rows]
    spent = sum(size * row.weight_bits for size, row in zip(sizes, rows, strict=True))
    assert spent <= 4.5 * sum(sizes)
    assert len({row.weight_bits for row in rows}) > 1
    assert method.quantization.layer_bits == {row.name: row.weight_bits for row in rows}
    with torch.no_grad():
        assert torch.equal(lower(method.student)(method.images), method.student(method.images))


def test_a_run_writes_its_images_and_a_student_of_the_chosen_bits(tmp_path):
    out = tmp_path / "run"
    section = "--settings.zeroq."
    train.main(
        [
            *("--method=zeroq", "--baselines=[]", "--threads=1", "--test_limit=71", "--no_report"),
            *(f"{section}synthesis.images=8", f"{section}synthesis.steps=2"),
            *(f"{section}average_bits=3.5", f"--out={out}"),
        ]
    )
    shown = load_file(out / "images.safetensors")
    assert shown["images"].shape == (8, 3, 32, 32) and shown["labels"].shape == (8,)
    top1 = json.loads((out / "summary.json").read_text())["top1"]
    measured = evaluate.run(evaluate.EvaluateConfig(run=str(out), test_limit=71))
    assert measured.top1 == top1


# ---- bad settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageOptimisationConfig(images=0), "synthesis: expected images at least 1, got 0"),
        (lambda: ImageOptimisationConfig(coarse_steps=500), "coarse_steps at least 0 and below"),
        (lambda: ImageOptimisationConfig(lr=math.inf), "synthesis: expected lr above 0 and finite"),
        (lambda: ImageOptimisationConfig(betas=[0.9]), "betas to be two numbers"),
        (lambda: DSGConfig(quantile=1.1), "dsg: expected quantile between 0 and 1, got 1.1"),
        (lambda: DSGConfig(noise_images=0), "dsg: expected noise_images at least 1"),
        (lambda: DeepInversionConfig(feature_weight=-1.0), "di: expected feature_weight"),
        (lambda: AdaptiveDeepInversionConfig(rounds=1), "adi: expected rounds at least 2, got 1"),
        (lambda: AdaptiveDeepInversionConfig(length_weight=-1.0), "adi: expected length_weight"),
        (lambda: ZeroQConfig(candidate_bits=[1]), "zeroq: expected candidate_bits between 2 and 8"),
        (lambda: ZeroQConfig(average_bits=1.5), "zeroq: expected average_bits at least"),
        (
            lambda: build_method("adi", problem(), settings(adi={"rounds": 9})),
            "adi: expected images at least 9, one for each round, got 5",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_schedules_scale_with_their_phases():
    config = ImageOptimisationConfig(steps=3000, coarse_steps=2000, patience=260, warmup_steps=100)
    scaled = replace(ZeroQConfig(), synthesis=config).scaled(0.1).synthesis
    assert (scaled.steps, scaled.coarse_steps) == (300, 200)
    assert (scaled.patience, scaled.warmup_steps) == (26, 10)
    assert config.scaled(1e-6).coarse_steps == 0
