"""The presets with published settings: complete, correct, and able to run."""

from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import fdda_ext
from fdda_ext.commands import train
from fdda_ext.data import Augmentation
from fdda_ext.errors import UsageError
from fdda_ext.methods import Problem, build_method
from fdda_ext.models import load_model

FOLDER = Path(fdda_ext.__file__).parent / "presets" / "imagenet"
#: Network, float top-1, and top-1 of W4A4 and W5A5, each without and with 8-bit ends.
PUBLISHED = {
    "resnet18": ("pytorchcv:resnet18", 71.47, (68.88, 69.76, 70.56, 70.86)),
    "mobilenetv1": ("pytorchcv:mobilenet_w1", 73.39, (63.75, 65.76, 70.26, 71.76)),
    "mobilenetv2": ("torchvision:mobilenet_v2", 72.49, (68.38, 69.32, 71.63, 71.99)),
    "regnetx600mf": ("pytorchcv:regnetx006", 75.04, (68.96, 70.33, 73.62, 74.00)),
}
SETTINGS = [
    (4, None, "w4a4-f4l4"),
    (4, 8, "w4a4-f8l8"),
    (5, None, "w5a5-f5l5"),
    (5, 8, "w5a5-f8l8"),
]
PRESETS = [
    (f"{network}-{suffix}", model, bits, ends, top1, full)
    for network, (model, full, tops) in PUBLISHED.items()
    for (bits, ends, suffix), top1 in zip(SETTINGS, tops, strict=True)
]


def test_there_are_sixteen_imagenet_presets():
    assert sorted(p.stem for p in FOLDER.glob("*")) == sorted(name for name, *_ in PRESETS)


@pytest.mark.parametrize(("name", "model", "bits", "ends", "top1", "full"), PRESETS)
def test_every_setting_is_the_published_one(name, model, bits, ends, top1, full):
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"{top1:.2f} %; float network: {full:.2f} %" in text
    config, stored = train.parse_arguments([f"--config=imagenet/{name}", "--data=imagenet:/x"])
    assert (config.model, config.weights, config.method) == (model, "default", "fdda")
    q = config.quantization
    assert (q.weight_bits, q.activation_bits, q.first_last_bits) == (bits, bits, ends)
    assert (q.grid, q.weight_range, q.activation_range) == ("paper", "minmax", "minmax")
    assert config.images_per_class == 1
    student = config.settings.distillation
    assert (student.steps, student.real_batch, student.generated_batch) == (350 * 200, 16, 16)
    assert (student.temperature, student.weight, student.reduction) == (20, 20, "batch")
    assert (student.cross_entropy_weight, student.optimizer, student.lr) == (1, "sgd", 1e-6)
    assert (student.weight_decay, student.cosine_half_period) == (1e-4, 100 * 200)
    assert student.frozen_scales
    fdda = config.settings.fdda
    assert (fdda.batch, fdda.classes_per_batch, fdda.student_steps_per_iteration) == (16, 1, 1)
    weights = (fdda.bns_weight, fdda.centralised_weight, fdda.distorted_weight)
    assert (*weights, fdda.classification_weight) == (0.2, 0.01, 0.9, 1.0)
    assert (fdda.distortion.mean_std, fdda.distortion.variance_std) == (0.5, 1.0)
    assert (fdda.lr, fdda.lr_milestones) == (1e-3, [100 * 200, 200 * 200, 300 * 200])
    assert (fdda.warmup_iterations, fdda.misclassified_iterations) == (50 * 200, 5 * 200)
    assert (fdda.ranges_from, fdda.range_iterations, fdda.generated_crop) == (
        "generated",
        4 * 200,
        0.5,
    )
    generator = fdda.generator
    assert (generator.latent_dim, generator.channels, generator.hidden_eps) == (100, 128, 0.8)
    assert not generator.class_maps
    assert yaml.safe_load(stored)["data"] == "imagenet:/x"


@cache
def random_network(model: str) -> nn.Module:
    """Build a random network with statistics of random images, without which signals vanish."""
    torch.manual_seed(0)
    network = load_model(model, weights="none", num_classes=2).requires_grad_(False).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network(torch.randn(2, 3, 224, 224))
    return network.eval()


# Presets with five bits differ only in the number of bits.
@pytest.mark.parametrize("name", [name for name, *_ in PRESETS if "w4a4" in name])
def test_presets_run_two_iterations_on_random_images(name):
    config, _ = train.parse_arguments(
        [
            f"--config=imagenet/{name}",
            # Only the second iteration has a student step.
            "--settings.fdda.warmup_iterations=1",
            "--settings.fdda.range_iterations=1",
            "--settings.distillation.steps=1",
            # These sizes take a second on one core.
            "--settings.fdda.generator.channels=2",
            "--settings.fdda.batch=2",
            "--settings.distillation.real_batch=1",
            "--settings.distillation.generated_batch=1",
        ]
    )
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    teacher = random_network(config.model)
    with torch.no_grad():  # choose labels such that at least one prediction is correct
        first = int(teacher(images[:1]).argmax())
    labels = torch.tensor([first, 1 - first])
    problem = Problem(teacher, 2, images, labels, Augmentation(), config.quantization, seed=0)
    method = build_method("fdda", problem, config.settings)
    assert method.iterations == 2
    for iteration in range(2):
        metrics = method.step(iteration)
        assert all(value.isfinite() for value in metrics.values())
    assert "student" in metrics
    gradients = [p.grad for p in method.student.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.any() for g in gradients)


def test_the_environment_gives_the_path_of_imagenet(monkeypatch, tmp_path):
    monkeypatch.delenv("IMAGENET", raising=False)
    with pytest.raises(UsageError, match="PATH in the environment variable IMAGENET, got"):
        train.main(["--config=imagenet/resnet18-w4a4-f4l4", f"--out={tmp_path / 'run'}"])
    monkeypatch.setenv("IMAGENET", str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="absent, which is not one"):
        train.main(["--config=imagenet/resnet18-w4a4-f4l4", f"--out={tmp_path / 'run'}"])


def test_a_configuration_file_may_name_its_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: paper\nseed: 3\n")
    config, _ = train.parse_arguments([f"--config={path}"])
    assert (config.seed, config.settings.fdda.warmup_iterations) == (3, 10_000)
    config, _ = train.parse_arguments([f"--config={path}", "--preset=short"])
    assert config.settings.fdda.warmup_iterations == 300
    path.write_text("preset: papr\n")
    with pytest.raises(UsageError, match="preset to be one of paper, short, got papr"):
        train.parse_arguments([f"--config={path}"])
    with pytest.raises(UsageError, match="imagenet/resnet19"):
        train.parse_arguments(["--config=imagenet/resnet19"])
