"""Preparation of library networks with random weights, of small structures, and refusals."""

import pathlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fdda_ext.errors import UsageError
from fdda_ext.models import load_model
from fdda_ext.quantization import (
    QuantizationConfig,
    bits_table,
    calibrate,
    prepare,
    render_bits,
)
from fdda_ext.quantization.layers import FixedBatchNorm2d

TABLES = pathlib.Path(__file__).parent / "bits"
NETWORKS = {
    "resnet18": "torchvision:resnet18",
    "mobilenet_v2": "torchvision:mobilenet_v2",
    "regnetx_006": "timm:regnetx_006",
    "mobilenet_w1": "pytorchcv:mobilenet_w1",
}
CONFIGS = {
    "deploy_w4a4": {},
    "deploy_w5a5_ends8": {"weight_bits": 5, "activation_bits": 5, "first_last_bits": 8},
    "paper_w4a4": {"grid": "paper"},
    "paper_w5a5_ends8": {
        "grid": "paper",
        "weight_bits": 5,
        "activation_bits": 5,
        "first_last_bits": 8,
    },
}


def settle(network: nn.Module, size: int = 64) -> nn.Module:
    """Set the running statistics from random images, and all BN shifts to 1.

    Then most values pass the ReLUs. Otherwise a deep random network amplifies every perturbation.
    """
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # plain mean over batches
            nn.init.ones_(module.bias)
    with torch.no_grad():
        network(torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)))
    return network.eval()


def load(spec: str) -> nn.Module:
    torch.manual_seed(0)
    network = load_model(spec, weights=None, num_classes=10)
    if spec == "pytorchcv:mobilenet_w1":  # its 7x7 pooling needs images of 224x224
        network.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return settle(network)


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def named_network(request) -> tuple[str, nn.Module]:
    return request.param, load(NETWORKS[request.param])


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def config(name: str) -> QuantizationConfig:
    return QuantizationConfig(weight_range="minmax", activation_range="minmax", **CONFIGS[name])


@pytest.mark.parametrize("config_name", sorted(CONFIGS))
def test_networks_have_the_expected_bits_and_finite_gradients(named_network, images, config_name):
    name, network = named_network
    student = prepare(network, config(config_name), images[:1])
    expected = (TABLES / f"{name}_{config_name}.txt").read_text()
    assert render_bits(bits_table(student)) + "\n" == expected

    calibrate(student, images)
    logits = student(images[:2])
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    for parameter_name, parameter in student.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    assert set(network.state_dict()) <= set(student.state_dict())


def test_inputs_of_all_layers_are_on_their_grids(named_network, images):
    _, network = named_network
    student = prepare(network, config("deploy_w4a4"), images[:1])
    calibrate(student, images)
    quantizers = dict(student.activation_quantizers.named_children())
    checked = []

    def hook_for(row):
        quantizer = quantizers[row.input]

        def hook(module, inputs):
            scale, zero = quantizer.scale.detach(), quantizer.zero_point
            codes = (inputs[0] / scale).round() + zero
            assert codes.min() >= 0
            assert codes.max() <= 2**row.input_bits - 1
            assert torch.equal((codes - zero) * scale, inputs[0])
            checked.append(row.name)

        return hook

    rows = bits_table(student)
    for row in rows:
        student.get_submodule(row.name).register_forward_pre_hook(hook_for(row))
    with torch.no_grad():
        student(images)
    assert checked == [row.name for row in rows]


@torch.no_grad()
def test_eight_bits_keep_the_logits(named_network, images):
    _, network = named_network
    eight = QuantizationConfig(weight_bits=8, activation_bits=8, weight_range="minmax")
    student = prepare(network, eight, images[:1])
    calibrate(student, images)
    expected = network(images)
    assert (student(images) - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize(
    "spec",
    [
        "torchvision:shufflenet_v2_x0_5",  # split, shuffle, concatenation
        "torchvision:densenet121",  # concatenation before normalisation
        "torchvision:regnet_y_400mf",  # squeeze and excitation
        "timm:resnet26d",  # average pooling in shortcuts
        "timm:mobilenetv3_small_100",  # hard swish, timm's own Linear
        "timm:tf_efficientnet_lite0",  # padding that depends on the image's size
        "pytorchcv:preresnet18",  # normalisation before convolution
    ],
)
def test_every_layer_of_other_structures_has_a_quantized_input(spec):
    torch.manual_seed(0)
    size = 224 if spec.startswith("pytorchcv") else 64
    network = settle(load_model(spec, weights=None), size)
    images = torch.randn(2, 3, size, size)
    eight = QuantizationConfig(weight_bits=8, activation_bits=8, weight_range="minmax")
    student = prepare(network, eight, images[:1])
    calibrate(student, images)
    assert all(row.input_bits is not None for row in bits_table(student))
    with torch.no_grad():
        expected = network(images)
        error = (student(images) - expected).norm() / expected.norm()
    assert error < 0.1


# ---- small structures -----------------------------------------------------------------------


class Block(nn.Module):
    """A normalised convolution followed by a given module."""

    def __init__(self, behind: nn.Module | None = None, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.bn = nn.BatchNorm2d(channels)
        self.behind = behind or nn.Identity()

    def forward(self, x):
        return self.behind(F.relu(self.bn(self.conv(x))))


def table(network: nn.Module, **changes) -> list[tuple]:
    student = prepare(network, QuantizationConfig(**changes), torch.zeros(1, 3, 16, 16))
    return [(r.name, r.input, r.input_bits, r.input_signed, r.output) for r in bits_table(student)]


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def test_values_keep_their_grid_through_pooling_padding_and_reshaping():
    behind = nn.Sequential(
        nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3), head(8)
    )
    assert table(Block(behind))[1][:4] == ("behind.3", "relu", 4, False)


def test_first_last_bits_apply_to_the_first_and_the_last_activation():
    network = Block(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), head(8)))
    student = prepare(network, QuantizationConfig(first_last_bits=7), torch.zeros(1, 3, 16, 16))
    bits = {n: q.grid.bits for n, q in student.activation_quantizers.named_children()}
    assert bits == {"x": 8, "relu": 7, "behind_2": 7, "behind_3_0": 8}
    assert [r.weight_bits for r in bits_table(student)] == [7, 4, 7]


def test_image_and_pooled_bits_are_settings():
    rows = table(Block(head(8)), image_bits=6, pooled_bits=5)
    assert [row[2] for row in rows] == [6, 5]


def test_joint_norm_and_activation_become_two_nodes():
    pytest.importorskip("timm")
    from timm.layers import BatchNormAct2d

    network = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8), head(8))
    settle(network, 16)
    student = prepare(network, QuantizationConfig(), torch.zeros(1, 3, 16, 16))
    assert type(student.get_submodule("1")) is FixedBatchNorm2d
    targets = [str(node.target) for node in student.graph.nodes]
    assert targets.index("1.act") == targets.index("1") + 1
    x = torch.randn(2, 3, 16, 16)
    float_student = prepare(network, QuantizationConfig(weight_bits=8), x)
    torch.testing.assert_close(float_student(x), network(x), rtol=0.1, atol=0.05)


class InPlace(Block):
    """A network that changes tensors in place and uses them afterwards."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        F.relu(y, inplace=True)
        z = y.mul_(2)
        z.add_(y)
        return self.behind(y)


def test_in_place_operations_keep_their_meaning():
    network = settle(InPlace(head(8)), 16)
    x = torch.randn(2, 3, 16, 16)
    student = prepare(network, QuantizationConfig(weight_bits=8), x)
    torch.testing.assert_close(student(x), network(x), rtol=0.05, atol=0.05)
    for node in student.graph.nodes:
        assert not str(node.target).endswith("_")
        assert not node.kwargs.get("inplace")


class ThroughView(Block):
    def forward(self, x):
        y = self.bn(self.conv(x))
        y[:, :4].mul_(-3)
        return self.behind(y)


class DataDependent(Block):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = DataDependent()

    def forward(self, x):
        return self.block(x)


class Functional(Block):
    def forward(self, x):
        return F.conv2d(super().forward(x), self.conv.weight.transpose(0, 1))


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 2)


class TwoInputs(Block):
    def forward(self, x, y):
        return super().forward(x + y)


class TwoOutputs(Block):
    def forward(self, x):
        return super().forward(x), x


def with_norm_of_the_batch() -> nn.Module:
    network = Block()
    network.bn = nn.BatchNorm2d(8, track_running_stats=False)
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Block(nn.ConvTranspose2d(8, 8, 3)), r"got behind \(ConvTranspose2d\); use nn.Upsample"),
        (Block(nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 3))), r"behind.1 \(Conv1d\); use a"),
        (Block(nn.Sequential(nn.Flatten(2), nn.LSTM(196, 4))), r"got behind.1 \(LSTM\)"),
        (Inner(), r"got block \(DataDependent\), test_prepare_zoo.py:\d+, which branches on the"),
        (Functional(), r"got F.conv2d in Functional, test_prepare_zoo.py:\d+; make it a module"),
        (Block(OwnForward(8, 8, 3)), r"forward of torch.nn, got behind \(OwnForward\)"),
        (TwoInputs(), "take one tensor, got 2 inputs"),
        (TwoOutputs(), "return one tensor, got tuple"),
        (ThroughView(), "compute the same when traced by torch.fx, got other outputs"),
        (with_norm_of_the_batch(), r"running statistics, got bn \(BatchNorm2d\) without"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), "Conv2d or Linear layer, got none"),
    ],
)
def test_networks_that_cannot_be_quantized_are_refused(network, message):
    with pytest.raises(UsageError, match=message):
        prepare(network, QuantizationConfig(), torch.zeros(1, 3, 16, 16))


def test_paper_grid_needs_a_relu():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), head(8))
    with pytest.raises(UsageError, match="ReLU or ReLU6 with grid paper, got none"):
        table(network, grid="paper")
    assert table(network)[1][:4] == ("3.2", "_3_0", 8, True)


def test_example_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match=r"accept images of shape \(1, 16, 16\)"):
        prepare(Block(), QuantizationConfig(), torch.zeros(1, 1, 16, 16))
