"""Methods without real images; the losses of GDFQ, Qimera and ZAQ against their papers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_fdda import CLASSES, problem
from torch.nn import functional as F

from fdda_ext.commands import train
from fdda_ext.deploy import lower
from fdda_ext.errors import UsageError
from fdda_ext.methods import (
    METHODS,
    AdaptiveDeepInversionConfig,
    DeepInversionConfig,
    DistillationConfig,
    DSGConfig,
    GDFQConfig,
    MethodSettings,
    QimeraConfig,
    ZAQConfig,
    ZeroQConfig,
    build_method,
)
from fdda_ext.methods.zaq import channel_relations, feature_discrepancy
from fdda_ext.statistics import capture
from fdda_ext.synthesis import GeneratorConfig, ImageOptimisationConfig, SuperposedGenerator

NAMES = [name for name, method in METHODS.items() if not method.real_images]
TRAINED = [name for name in NAMES if METHODS[name].distils]


def tiny(objective: str = "divergence", **changes) -> MethodSettings:
    shared = {
        "generator": GeneratorConfig(channels=8, latent_dim=16),
        "batch": 6,
        "warmup_iterations": 2,
        "ranges_from": "sampled",
        **changes,
    }
    images = ImageOptimisationConfig(images=7, batch=4, steps=3, jitter=1, keep_best=True)
    return MethodSettings(
        DistillationConfig(
            steps=4, objective=objective, real_batch=0, generated_batch=6, optimizer="adam", lr=1e-3
        ),
        gdfq=GDFQConfig(**shared),
        qimera=QimeraConfig(**shared, mixed_classes=2),
        zaq=ZAQConfig(**{**shared, "student_steps_per_iteration": 2}),
        zeroq=ZeroQConfig(images),
        dsg=DSGConfig(images, noise_images=9),
        di=DeepInversionConfig(images),
        adi=AdaptiveDeepInversionConfig(images, rounds=2),
    )


def test_all_methods_without_real_images_are_tested():
    assert {"noise", "gdfq", "qimera", "zaq", "zeroq", "dsg", "di", "adi"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_real_images_and_labels_do_not_matter(name):
    task = problem()
    other = replace(task, images=torch.full_like(task.images, 7.0), labels=task.labels.flip(0))
    methods = [build_method(name, p, tiny()) for p in (task, other)]
    for method in methods:
        for iteration in range(method.iterations):
            method.step(iteration)
    for key, tensor in methods[0].student.state_dict().items():
        assert torch.equal(tensor, methods[1].student.state_dict()[key]), key


@pytest.mark.parametrize("name", TRAINED)
def test_state_resumes_exactly_and_the_student_is_a_program(name):
    task = problem()
    objective = "discrepancy" if name == "zaq" else "divergence"

    def build():
        return build_method(name, task, tiny(objective))

    whole, halves, resumed = build(), build(), build()
    for iteration in range(whole.iterations):
        whole.step(iteration)
    half = whole.iterations - 2
    for iteration in range(half):
        halves.step(iteration)
    resumed.load_state_dict(halves.state_dict())
    for iteration in range(half, resumed.iterations):
        resumed.step(iteration)
    for key, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[key]), key
    with torch.no_grad():
        assert torch.equal(lower(whole.student)(task.images), whole.student(task.images))


def test_gdfq_generator_loss_is_cross_entropy_and_distance_to_running_statistics():
    settings = tiny()
    weighted = replace(settings.gdfq, bns_weight=0.3, classification_weight=0.7)
    method = build_method("gdfq", problem(), replace(settings, gdfq=weighted))
    losses, images, labels = method.generator_loss(0)
    seen = capture(method.problem.teacher, images)
    terms = []
    for layer, x in zip(seen.layers, seen.inputs, strict=True):
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        terms.append(F.mse_loss(mean, layer.running_mean) + F.mse_loss(variance, layer.running_var))
    bns = torch.stack(terms).mean()
    torch.testing.assert_close(losses["bns"], bns)
    expected = 0.7 * F.cross_entropy(seen.logits, labels) + 0.3 * bns
    torch.testing.assert_close(losses["generator"], expected)


def test_superposition_equals_its_formula():
    torch.manual_seed(0)
    table = torch.randn(CLASSES, 5)
    generator = SuperposedGenerator(CLASSES, 16, GeneratorConfig(channels=4, latent_dim=3), table)
    classes = torch.tensor([[0, 2, 2], [1, 3, 5]])
    weights, noise = torch.rand(2, 3).softmax(1), torch.randn(2, 3, 5)
    latent, shares = generator.superpose(classes, weights, noise)
    for n in range(2):
        expected, share = torch.zeros(3), torch.zeros(CLASSES)
        for s in range(3):
            e = table[classes[n, s]] + noise[n, s]
            e = (e - e.mean()) / (e.var(correction=0) + 1e-5).sqrt()
            expected = expected + weights[n, s] * generator.disentangle(e)
            share[classes[n, s]] += weights[n, s]
        torch.testing.assert_close(latent[n], expected)
        torch.testing.assert_close(shares[n], share)


def test_one_hot_shares_equal_labels():
    generator = SuperposedGenerator(
        CLASSES, 16, GeneratorConfig(channels=4, class_maps=True), torch.randn(CLASSES, 5)
    )
    torch.nn.init.normal_(generator.norm_b.scale.weight)
    latent, labels = torch.randn(4, 100), torch.tensor([0, 3, 3, 1])
    soft = F.one_hot(labels, CLASSES).float()
    torch.testing.assert_close(generator(latent, soft), generator(latent, labels))


@pytest.mark.parametrize(("probability", "mixed"), [(0.0, False), (1.0, True)])
def test_qimera_mixes_with_its_probability(probability, mixed):
    settings = tiny()
    settings = replace(settings, qimera=replace(settings.qimera, mixed_probability=probability))
    method = build_method("qimera", problem(), settings)
    _, shares = method.draw(32)
    torch.testing.assert_close(shares.sum(1), torch.ones(32))
    assert bool((shares.max(1).values < 1).any()) == mixed
    teacher = method.problem.teacher[-1].weight
    assert torch.equal(method.generator.embedding.weight, teacher), (
        "the embedding starts as the classifier's weights"
    )


def test_channel_relations_and_feature_discrepancy_equal_their_formulas():
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    found = channel_relations(p)
    for n in range(2):
        for i in range(3):
            for j in range(3):
                cosine = F.cosine_similarity(p[n, i].flatten(), p[n, j].flatten(), dim=0)
                torch.testing.assert_close(found[n, i, j], cosine)
    one = (channel_relations(p) - channel_relations(q)).abs().mean()
    same = feature_discrepancy([p, p], [q, p])
    torch.testing.assert_close(same, one)  # only the layer that differs has weight
    half = feature_discrepancy([p, p], [q, q])
    torch.testing.assert_close(half, one)


def test_zaq_generator_and_student_have_opposite_losses():
    method = build_method("zaq", problem(), tiny("discrepancy"))
    for iteration in range(3):
        method.step(iteration)
    losses, images, labels = method.generator_loss(3)
    config = method.config
    expected = -losses["output"] - config.feature_weight * losses["features"]
    expected = expected - config.activation_weight * losses["activation"]
    torch.testing.assert_close(losses["generator"], expected)
    student = method.student_loss(images, labels)
    torch.testing.assert_close(
        student, losses["output"] + config.feature_weight * losses["features"]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GDFQConfig(bns_weight=-1.0), "gdfq: expected bns_weight at least 0"),
        (lambda: GDFQConfig(batch=1), "gdfq: expected batch at least 2, got 1"),
        (lambda: QimeraConfig(mixed_probability=2.0), "between 0 and 1, got 2.0"),
        (lambda: QimeraConfig(mixed_classes=0), "qimera: expected mixed_classes at least 1"),
        (lambda: ZAQConfig(generator=GeneratorConfig(class_maps=True)), "zaq: expected class_maps"),
        (
            lambda: build_method("gdfq", problem(), tiny(ranges_from="calibration")),
            "gdfq: expected ranges_from generated or sampled",
        ),
        (
            lambda: build_method("gdfq", problem(), tiny("discrepancy")),
            "objective divergence with this method",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("preset", ["paper", "short"])
def test_presets_set_everything_and_scale(name, preset):
    config, _ = train.parse_arguments([f"--method={name}", f"--preset={preset}"])
    scaled = config.settings.scaled(0.01)
    assert scaled.distillation.steps == round(config.settings.distillation.steps * 0.01)
    assert getattr(scaled, name) != getattr(config.settings, name)
    assert config.settings.distillation.real_batch == 0


def test_train_writes_generated_images(tmp_path):
    out = tmp_path / "run"
    section = "--settings.gdfq."
    train.main(
        [
            *("--method=gdfq", "--baselines=[]", "--threads=1", "--test_limit=71", "--no_report"),
            *("--settings.distillation.steps=3", "--settings.distillation.generated_batch=8"),
            *(f"{section}warmup_iterations=2", f"{section}generator.channels=4"),
            *(f"{section}batch=8", f"--out={out}"),
        ]
    )
    shown = load_file(out / "images.safetensors")
    assert shown["images"].shape[1:] == (3, 32, 32)
    assert shown["images"].shape[0] == shown["labels"].shape[0] > 0
    assert json.loads((out / "summary.json").read_text())["name"] == "gdfq"
