"""Options of the user: each is used by the method, or refused."""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from fdda_ext.commands import train
from fdda_ext.data import calibration_set
from fdda_ext.errors import UsageError
from fdda_ext.methods import METHODS, MethodSettings, Problem, build_method, why_unused
from fdda_ext.models import load_model
from fdda_ext.quantization import QuantizationConfig


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--method=mse", "--quantization.weight_range=minmax"], "mse always uses mse"),
        (["--method=mse", "--settings.fdda.lr=1e-3"], "mse has no settings"),
        (["--method", "brecq", "--settings.fdda.lr", "1e-3"], "brecq reads only settings.brecq"),
        (["--method=lapq", "--quantization.lp_exponent=2"], "lapq tries exponents itself"),
        (["--method=lapq", "--quantization.scale_gradient=none"], "does not learn ranges"),
        (["--method=minmax", "--max-time=3"], "minmax has no training"),
        (["--method=mse", "--schedule-share=0.5"], "mse has no training"),
        (["--method=brecq", "--precision=bfloat16"], "without CUDA graphs"),
        (["--method=gdfq", "--images-per-class=4"], "gdfq uses no real images"),
        (["--method=zeroq", "--augmented-images=40"], "zeroq uses no real images"),
        (["--quantization.momentum=0.5"], "sets every range at once"),
        (["--quantization.percentile=99"], "no range is found by percentile"),
        (["--quantization.lp_exponent=3"], "no range is found by lp"),
        (["--quantization.grid=paper", "--quantization.image_bits=4"], "grid paper has none"),
        (["--settings.fdda.range_iterations=4"], "settings.fdda.ranges_from generated"),
        (
            ["--settings.distillation.frozen_scales=true", "--settings.distillation.scale_lr=1"],
            "frozen_scales",
        ),
        (
            ["--method=zeroq", "--settings.distillation.lr=1"],
            "no student step is taken with settings.distillation.steps 0",
        ),
    ],
)
def test_option_that_nothing_uses_is_refused_with_the_reason(arguments, reason):
    alone = [*arguments, "--baselines=[]"]
    with pytest.raises(UsageError, match="expected options that method .* uses, got") as caught:
        train.parse_arguments(alone)
    assert reason in str(caught.value)
    option = next(a for a in arguments[::-1] if a.startswith("--")).partition("=")[0]
    assert option[2:].replace("-", "_") in str(caught.value)
    # The other options are fine.
    train.parse_arguments(train.without_unused(alone))


def test_option_that_a_baseline_uses_is_accepted():
    options = ["--method=mse", "--baselines=[distill]", "--quantization.weight_range=minmax"]
    train.parse_arguments(options)
    train.parse_arguments(["--method=minmax", "--quantization.weight_range=minmax"])
    with pytest.raises(UsageError, match="always uses mse"):
        train.parse_arguments(["--method=mse", "--quantization.weight_range=minmax"])


def test_unused_option_of_a_configuration_file_is_a_warning(tmp_path, caplog):
    path = tmp_path / "mine.yaml"
    path.write_text("settings:\n  fdda:\n    lr: 0.001\nseed: 3\n")
    config, _ = train.parse_arguments(["--method=brecq", f"--config={path}"])
    assert config.seed == 3
    assert "settings.fdda.lr in a configuration file is not used" in caplog.text
    assert "seed" not in caplog.text


def test_unused_options_are_removed_with_their_values():
    given = ["--method", "mse", "--max_time", "3", "--seed=1", "--keep_best", "--evaluate_every=4"]
    kept = train.without_unused([*given, "--baselines=[]"])
    assert kept == ["--method", "mse", "--seed=1", "--baselines=[]"]


@pytest.fixture(scope="module")
def problem():
    images, labels = calibration_set("glyphs")
    from fdda_ext.data import Augmentation

    teacher = load_model("glyphs_resnet").requires_grad_(False)
    return Problem(teacher, 71, images, labels, Augmentation(), QuantizationConfig(), 0)


class Recorder:
    """Settings that record which sections are read."""

    def __init__(self, settings):
        self.settings, self.read = settings, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.settings, name)


def quick(name):
    """Return the method's short preset with almost no steps."""
    config, _ = train.parse_arguments([f"--method={name}", "--baselines=[]"])
    return config.settings.scaled(1 / 600)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_the_sections_that_it_declares(name, problem):
    recorder = Recorder(quick(name))
    build_method(name, problem, recorder)
    assert recorder.read == set(METHODS[name].sections)


#: Another value for some fields of the quantization.
OTHERS = {
    "weight_range": {"weight_range": "lsq"},
    "activation_range": {"activation_range": "lsq"},
    "image_bits": {"image_bits": 3},
    "pooled_bits": {"pooled_bits": 3},
}


@pytest.mark.parametrize("field", OTHERS)
@pytest.mark.parametrize("name", ["minmax", "mse", "noise", "lapq", "distill", "bitsplit"])
def test_a_field_of_the_quantization_changes_the_student_unless_it_is_called_unused(
    name, field, problem
):
    settings = quick(name)
    changed = replace(problem, quantization=replace(problem.quantization, **OTHERS[field]))
    students = [build_method(name, p, settings).student.state_dict() for p in (problem, changed)]
    same = all(torch.equal(a, b) for a, b in zip(*(s.values() for s in students), strict=True))
    reason = why_unused(
        f"quantization.{field}", name, METHODS[name], settings, changed.quantization
    )
    if name != "bitsplit":  # Bit-Split sets activation ranges only in its last iteration
        assert same == (reason is not None)
    else:
        assert reason is None


def test_every_section_belongs_to_a_method():
    declared = {section for kind in METHODS.values() for section in kind.sections}
    assert declared == {f.name for f in fields(MethodSettings)}
    assert all(is_dataclass(getattr(MethodSettings(), name)) for name in declared)
    assert why_unused("seed", "mse", METHODS["mse"], MethodSettings(), QuantizationConfig()) is None
