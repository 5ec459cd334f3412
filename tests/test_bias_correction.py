"""Bias correction: the means of all results stay those of the float network."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fdda_ext.commands import train
from fdda_ext.data import Augmentation
from fdda_ext.errors import UsageError
from fdda_ext.methods import METHODS, Problem, build_method
from fdda_ext.quantization import (
    QuantizationConfig,
    calibrate,
    correct_biases_,
    float_copy,
    prepare,
)


class Network(nn.Module):
    """Layers with a bias, with a normalisation, and with one that has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 1, bias=False)
        self.plain_norm = nn.BatchNorm2d(8, affine=False)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x + self.norm(self.depthwise(x)).relu()
        x = self.plain_norm(self.second(x)).relu()
        return self.last(x.mean((2, 3)))


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(0)) + 1


def network() -> nn.Module:
    torch.manual_seed(0)
    made = Network().eval()
    for norm in (made.norm, made.plain_norm):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return made


def means(network: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """Return the mean of each channel of the results of modules."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        found[name] = result.transpose(0, 1).flatten(1).mean(1)

    handles = [
        network.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names
    ]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_means_equal_those_of_the_float_network(grid):
    x, names = images(), ["first", "norm", "plain_norm", "last"]
    student = prepare(network(), QuantizationConfig(grid=grid), x)
    calibrate(student, x)
    expected = means(float_copy(student), names, x)
    before = means(student, names, x)
    correct_biases_(student, x)
    found = means(student, names, x)
    for name in names:
        assert (before[name] - expected[name]).abs().max() > 5e-3, "there is something to correct"
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_many_images_are_represented_by_some_at_equal_distances(monkeypatch):
    monkeypatch.setattr("fdda_ext.quantization.bias_correction._PIXELS", 0)
    x = images(48)
    students = []
    for _ in range(2):
        students.append(prepare(network(), QuantizationConfig(), x))
        calibrate(students[-1], x)
    correct_biases_(students[0], x)
    correct_biases_(students[1], x[::3])
    for first, second in zip(*(s.state_dict().values() for s in students), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("method", ["minmax", "distill", "fdda"])
def test_predictions_of_an_untrained_student_become_better(method):
    arguments = train.without_unused([f"--method={method}", "--schedule_share=0.001"])
    config, _ = train.parse_arguments(arguments)
    x, errors = images(), []
    for bias_correction in (False, True):
        task = replace(
            Problem(
                *(network(), 5, x, torch.arange(len(x)) % 5, Augmentation(), QuantizationConfig()),
                seed=0,
                pixel_range=(torch.full((3, 1, 1), -5.0), torch.full((3, 1, 1), 5.0)),
            ),
            bias_correction=bias_correction,
        )
        built = build_method(method, task, config.scheduled)
        with torch.no_grad():
            errors.append(float((built.student(x) - task.teacher(x)).square().mean()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", [n for n, kind in METHODS.items() if not kind.corrects_biases])
def test_methods_that_learn_biases_refuse_it(method):
    with pytest.raises(UsageError, match=f"bias_correction only with methods .*got.* {method}"):
        train.parse_arguments([f"--method={method}", "--bias_correction=true"])


def test_a_baseline_that_learns_biases_refuses_it():
    with pytest.raises(UsageError, match="bias_correction only with methods .*got method qdrop"):
        train.parse_arguments(
            ["--method=minmax", "--baselines=[mse,qdrop]", "--bias_correction=true"]
        )


def test_moving_ranges_refuse_it():
    with pytest.raises(UsageError, match="ranges that are set once, got method fdda"):
        train.parse_arguments(["--method=fdda", "--preset=paper", "--bias_correction=true"])


def test_no_image_is_refused():
    student = prepare(network(), QuantizationConfig(), images())
    with pytest.raises(UsageError, match=r"at least one image .*got shape \(0, 3, 12, 12\)"):
        correct_biases_(student, images()[:0])


def test_learned_rounding_refuses_it():
    rounding = "--settings.distillation.rounding={lr: 0.01}"
    with pytest.raises(UsageError, match="no bias_correction with .*rounding"):
        train.parse_arguments(["--method=distill", "--bias_correction=true", rounding])
