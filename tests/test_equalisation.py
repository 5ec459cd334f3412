"""Equalisation: the same function, and similar ranges for all channels of an activation."""

import copy
from dataclasses import replace

import pytest
import torch
from test_graphs import problem, run
from torch import Tensor, nn

from fdda_ext.commands import train
from fdda_ext.deploy import lower
from fdda_ext.errors import UsageError
from fdda_ext.methods import METHODS, Problem
from fdda_ext.models import load_model
from fdda_ext.quantization import QuantizationConfig, calibrate, float_copy
from fdda_ext.quantization.equalisation import EqualisedReLU6, equalise_
from fdda_ext.quantization.prepare import activations, trace_unpadded


def images(count: int = 8, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def conv(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution and a BN whose channels have very different ranges."""
    norm = nn.BatchNorm2d(outputs)
    nn.init.uniform_(norm.weight, 0.02, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    nn.init.uniform_(norm.running_mean, -0.3, 0.3)
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        norm,
    ]


class Bottleneck(nn.Module):
    """An inverted residual block, as in MobileNetV2."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(*conv(8, 16), activation(), *conv(16, 16, 3, 16), activation(), *conv(16, 8))
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def network(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        *(*conv(3, 8, 3), activation(), *conv(8, 8), Bottleneck(activation)),
        *(Bottleneck(activation), *conv(8, 16), activation()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    ]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def equalised(model: nn.Module, x: Tensor, strength: float = 1.0):
    """Return the equalised network, its quantized nodes, and how many of them are equalised."""
    graph = trace_unpadded(model, x)
    nodes = activations(graph, QuantizationConfig())
    return graph, nodes, equalise_(graph, nodes, x, strength)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        # All but the image and the pooled features.
        ("glyphs_mobilenet", 23),
        ("glyphs_resnet", 9),
        ("torchvision:regnet_x_400mf", 67),
        # Without the last feature map, whose positions the classifier reads separately.
        ("torchvision:vgg11", 9),
    ],
)
def test_networks_compute_the_same(name, tensors, strength):
    torch.manual_seed(0)
    model = load_model(name, weights="default" if "glyphs" in name else None).eval()
    x = images(size=32 if "glyphs" in name else 64)
    graph, _, count = equalised(model, x, strength)
    assert count == tensors
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-4)


def channel_norms(graph, nodes, x: Tensor) -> dict[str, Tensor]:
    """Return the 8-norm of each channel of the quantized tensors, over values that are not 0."""
    found = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n in nodes:
                rows = result.double().transpose(0, 1).flatten(1)
                total = rows.abs().pow(8).sum(1) / (rows != 0).sum(1)
                found[n.name] = total.pow(1 / 8)
            return result

    with torch.no_grad():
        Watch(graph).run(x)
    return found


def test_channels_get_the_same_range():
    x = images()
    graph, nodes, count = equalised(network(), x)
    assert count == len(nodes) == 9  # without the image and the pooled features
    norms = {name: norm[norm > 0] for name, norm in channel_norms(graph, nodes, x).items()}
    for name in ("_2", "_5_block_2", "_5_block_5", "_6_block_2", "_6_block_5", "_9"):
        largest = norms[name].max()
        torch.testing.assert_close(
            norms[name] / largest, torch.ones_like(norms[name]), rtol=1e-4, atol=0
        )
    # The tensors that additions connect share scales, so only their geometric mean is the same.
    chain = torch.stack([norms[name] for name in ("_4", "_5_add", "_6_add")]).log().mean(0)
    torch.testing.assert_close(chain, chain[0].expand_as(chain), rtol=0, atol=1e-5)


def test_linear_bottlenecks_have_mean_zero():
    x = images()
    graph, _, _ = equalised(network(), x, 0.5)

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.name in ("_4", "_5_add", "_6_add"):
                torch.testing.assert_close(
                    result.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0
                )
                watched.append(n.name)
            return result

    watched = []
    with torch.no_grad():
        Watch(graph).run(x)
    assert len(watched) == 3


def test_networks_without_normalisation_stay_the_same():
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ]
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    x = images()
    graph, _, count = equalised(model, x)
    assert count == 4
    for module in graph.modules():
        if isinstance(module, EqualisedReLU6):
            module.exact = True
    torch.testing.assert_close(graph(x), model(x))


def test_a_padded_layer_gets_no_shift():
    torch.manual_seed(0)
    layers = [*conv(3, 8), *conv(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    x = images()
    graph, _, count = equalised(model, x)
    assert count == 2
    torch.testing.assert_close(graph(x), model(x))


def test_relu6_clips_the_student_at_6_and_the_float_network_where_it_did():
    model, x = network(nn.ReLU6), 6 * images()
    given = Problem(
        model, 5, x, torch.arange(8) % 5, None, QuantizationConfig(), 0, equalisation=1.0
    )
    student = given.student()
    clips = [m for m in student.modules() if isinstance(m, EqualisedReLU6)]
    assert len(clips) == 6
    with torch.no_grad():
        torch.testing.assert_close(float_copy(student)(x), model(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(student(x), model(x), rtol=1e-4, atol=1e-4)
    wide = torch.full((1, len(clips[0].scale), 1, 1), 100.0)
    assert bool((clips[0](wide) == 6).all())
    exact = next(m for m in float_copy(student).modules() if isinstance(m, EqualisedReLU6))
    assert torch.equal(exact(wide).flatten(), 6 * exact.scale)
    assert bool((exact.scale >= 1).all())
    calibrate(student, x)
    with torch.no_grad():
        assert torch.equal(lower(student)(x), student(x))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_channels_that_are_always_zero_keep_their_scale(activation):
    model, x = network(activation), images()
    model[1].bias.fill_(-100)
    model[1].weight.fill_(0)
    graph, _, count = equalised(model, x)
    assert count == 9
    assert torch.equal(graph.get_submodule("1").bias, model[1].bias)
    torch.testing.assert_close(graph(x), model(x))


def test_an_outlier_that_the_next_layer_undoes_costs_nothing():
    plain = load_model("glyphs_resnet", weights="default").eval().requires_grad_(False)
    model = copy.deepcopy(plain)
    for name, module in model.named_modules():
        if name.endswith(".bn1"):
            module.weight[0] *= 200
            module.bias[0] *= 200
        elif name.endswith(".conv2"):
            module.weight[:, 0] /= 200
    x = images(32)

    def error(model: nn.Module, strength: float | None) -> float:
        given = replace(problem(model), images=x, quantization=QuantizationConfig(8, 8))
        student = replace(given, equalisation=strength).student()
        calibrate(student, x)
        with torch.no_grad():
            expected = plain(x)
            return float((student(x) - expected).norm() / expected.norm())

    assert error(model, None) > 2 * error(plain, None)
    assert error(model, 0.5) == pytest.approx(error(plain, 0.5), rel=0.02)
    assert error(plain, 0.5) < error(plain, None)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.real_images])
def test_every_method_with_real_images_trains_an_equalised_student(name):
    student = run(name, network(nn.ReLU6), equalisation=0.5)
    assert any(isinstance(m, EqualisedReLU6) for m in student.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--equalisation=1.5"], "expected equalisation between 0 and 1, got 1.5"),
        (
            ["--method=gdfq", "--equalisation=0.5"],
            "only with methods that use real images, got method gdfq",
        ),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train.main([*arguments, f"--out={tmp_path / 'out'}"])
