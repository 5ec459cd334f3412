"""Configuration, quantizers, calibration, and properties of a whole student."""

import copy
import math
import pickle

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
    parse_bits,
    prepare,
    project_scales_,
    scale_parameters,
    set_activation_mode,
)
from fdda_ext.quantization.grid import paper_quantize
from fdda_ext.quantization.layers import QuantizedAveragePool, QuantizedConv2d, QuantizedLinear
from fdda_ext.quantization.quantizer import (
    LearnedActivationQuantizer,
    LearnedWeightQuantizer,
    PaperActivationQuantizer,
    PaperWeightQuantizer,
)
from fdda_ext.quantization.ranges import RangeRule
from fdda_ext.quantization.student import activation_quantizers

RULES = ("minmax", "mse", "lp", "lsq", "percentile")


class SmallNetwork(nn.Module):
    """A network with a residual block, a linear bottleneck and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 16, 1)
        self.bn3 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.bn4 = nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 8, 1)
        self.bn5 = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(16, 12, 3, stride=2)
        self.bn6 = nn.BatchNorm2d(12)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.bn2(self.conv2(x)) + x)
        y = F.relu6(self.bn3(self.expand(x)))
        y = F.relu6(self.bn4(self.depthwise(y)))
        y = self.bn5(self.project(y))
        x = F.relu(self.bn6(self.last(torch.cat([x, y], 1))), inplace=True)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.fc(self.drop(x))


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = SmallNetwork()
    network.train()
    for _ in range(20):
        network(torch.randn(16, 3, 16, 16))
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.5)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return small_network()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def student_of(network, images, **config):
    student = prepare(network, QuantizationConfig(**config), images[:1])
    calibrate(student, images)
    return student


# ---- configuration --------------------------------------------------------------------------


def test_parse_bits():
    assert parse_bits("W4A4") == (4, 4)
    assert parse_bits("w2a8") == (2, 8)
    for bad in ("W4", "4/4", "W1A4", "W4A9", "W44A4", ""):
        with pytest.raises(UsageError, match="of the form W4A4"):
            parse_bits(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 1}, "weight_bits between 2 and 8, got 1"),
        ({"activation_bits": 9}, "activation_bits between 2 and 8, got 9"),
        ({"activation_bits": None}, "activation_bits between 2 and 8, got None"),
        ({"first_last_bits": 16}, "first_last_bits between 2 and 8, got 16"),
        ({"layer_bits": {"conv1": 9}}, "layer_bits between 2 and 8, got 9 for conv1"),
        ({"grid": "integer"}, "grid to be one of deploy, paper, got integer"),
        ({"weight_range": "max"}, "weight_range to be one of minmax, mse"),
        ({"activation_range": "kl"}, "activation_range to be one of"),
        ({"percentile": 50.0}, "percentile above 50 and at most 100, got 50.0"),
        ({"lp_exponent": 0.0}, "lp_exponent above 0, got 0.0"),
        ({"momentum": 1.0}, "momentum at least 0 and below 1, got 1.0"),
        ({"scale_gradient": "yes"}, "scale_gradient to be one of lsq, none, got yes"),
    ],
)
def test_bad_configuration_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        QuantizationConfig(**change)


# ---- inputs on grids ------------------------------------------------------------------------


def assert_on_grid(x, quantizer):
    """Require that each value is exactly on the quantizer's grid."""
    scale, zero = quantizer.scale.detach(), quantizer.zero_point.detach().round()
    codes = (x / scale).round() + zero
    assert codes.min() >= quantizer.quant_min
    assert codes.max() <= quantizer.quant_max
    assert torch.equal((codes - zero) * scale, x)


def check_inputs_on_their_grids(student, images):
    """Check the inputs of all convolutions and linear layers; return the number of layers."""
    quantizers = dict(student.activation_quantizers.named_children())
    seen = []

    def hook_for(row):
        def hook(module, inputs):
            seen.append(row.name)
            assert_on_grid(inputs[0].detach(), quantizers[row.input])

        return hook

    handles = [
        student.get_submodule(row.name).register_forward_pre_hook(hook_for(row))
        for row in bits_table(student)
    ]
    student(images)
    for handle in handles:
        handle.remove()
    return len(seen)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("rule", RULES)
def test_inputs_and_weights_of_every_layer_are_on_their_grids(network, images, bits, rule):
    student = student_of(
        network,
        images,
        weight_bits=bits,
        activation_bits=bits,
        weight_range=rule,
        activation_range=rule,
    )
    assert check_inputs_on_their_grids(student, images * 1.5) == 7
    for module in student.modules():
        if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
            quantizer = module.weight_quantizer
            quantized = quantizer(module.weight).detach().flatten(1)
            codes = quantized / quantizer.scale.detach()[:, None]
            assert (codes - codes.round()).abs().max() < 1e-4
            assert codes.min() >= -(2 ** (bits - 1)) - 1e-4
            assert codes.max() <= 2 ** (bits - 1) - 1 + 1e-4
            for channel in quantized:
                assert channel.unique().numel() <= 2**bits


def test_inputs_stay_on_their_grids_in_training(network, images):
    student = student_of(network, images, learn_zero_points=True, scale_gradient="none")
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    student.train()  # has no effect: statistics are fixed and there is no dropout
    for _ in range(15):
        optimizer.zero_grad()
        F.mse_loss(student(images), network(images)).backward()
        optimizer.step()
        project_scales_(student)
    assert check_inputs_on_their_grids(student, images) == 7


def test_global_pooling_has_a_quantized_input(network, images):
    student = student_of(network, images)
    modules = dict(student.named_modules())
    pools = [n for n in student.graph.nodes if str(n.target).startswith("average_pools.")]
    (node,) = (n for n in pools if isinstance(modules[n.target], QuantizedAveragePool))
    assert node.args[0].target == "activation_quantizers.relu_2"


def test_bits_table_of_the_small_network(network, images):
    rows = bits_table(student_of(network, images))
    assert [(r.name, r.kind, r.input, r.input_bits, r.input_signed, r.output) for r in rows] == [
        ("conv1", "conv 3x3", "x", 8, True, "relu 4 unsigned"),
        ("conv2", "conv 3x3", "relu", 4, False, "relu_1 4 unsigned"),
        ("expand", "conv 1x1", "relu_1", 4, False, "relu6 4 unsigned"),
        ("depthwise", "depthwise 3x3", "relu6", 4, False, "relu6_1 4 unsigned"),
        ("project", "conv 1x1", "relu6_1", 4, False, "cat 4 signed"),
        ("last", "conv 3x3 /2", "cat", 4, True, "relu_2 4 unsigned"),
        ("fc", "linear", "adaptive_avg_pool2d", 8, False, "float (output)"),
    ]


@torch.no_grad()
@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_bits_of_single_layers_can_be_set(network, images, grid):
    layer_bits = {"conv1": 5, "depthwise": 2}
    student = student_of(network, images, first_last_bits=8, layer_bits=layer_bits, grid=grid)
    rows = bits_table(student)
    assert [row.weight_bits for row in rows] == [5, 4, 4, 2, 4, 4, 8]
    for bad, hint in (("depthwize", "got depthwize; did you mean depthwise?"), ("bn1", "got bn1")):
        with pytest.raises(UsageError, match=f"layer_bits of convolutions .* {hint}"):
            student_of(network, images, layer_bits={bad: 3}, grid=grid)


def test_eight_bits_stay_close_and_more_bits_are_closer(network, images):
    expected = network(images)
    errors = []
    for bits in (3, 4, 6, 8):
        for grid in ("deploy", "paper"):
            student = student_of(network, images, weight_bits=bits, activation_bits=bits, grid=grid)
            errors.append(float((student(images) - expected).norm() / expected.norm()))
    assert errors[-1] < 0.03
    assert errors[-2] < 0.03
    assert errors[0::2] == sorted(errors[0::2], reverse=True)
    assert errors[1::2] == sorted(errors[1::2], reverse=True)


# ---- the teacher, gradients, state ----------------------------------------------------------


@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_the_teacher_does_not_change(images, grid):
    network = small_network().requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    logits = network(images)
    student = student_of(network, images, grid=grid)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(images).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert torch.equal(network(images), logits)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    own = {t.data_ptr() for t in student.state_dict().values()}
    assert not own & {t.data_ptr() for t in network.state_dict().values()}


@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_the_teacher_s_state_loads_into_the_student(images, grid):
    student = prepare(small_network(0), QuantizationConfig(grid=grid), images[:1])
    other = small_network(1)
    result = student.load_state_dict(other.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all("quantizer" in key for key in result.missing_keys)
    set_activation_mode(student, "float")
    for name, parameter in other.named_parameters():
        assert torch.equal(student.get_parameter(name), parameter)


@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_gradients_reach_weights_norms_and_scales(network, images, grid):
    student = student_of(network, images, grid=grid, learn_zero_points=True)
    F.cross_entropy(student(images), torch.arange(24) % 5).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if "zero_point" not in name:
            assert parameter.grad.abs().sum() > 0, name
    names = [name for name, _ in student.named_parameters() if name.endswith("scale")]
    # Weights: seven. Activations: image, three ReLU, two ReLU6, concatenation, pooled features.
    assert len(names) == (7 + 8 if grid == "deploy" else 0)
    assert len(scale_parameters(student)) == (len(names) + 2 if grid == "deploy" else 0)


@pytest.mark.parametrize("grid", ["deploy", "paper"])
@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_state_round_trip_is_exact(network, images, grid, rule, tmp_path):
    from fdda_ext.engine import read_student, write_student

    config = {"grid": grid, "weight_range": rule, "activation_range": rule}
    student = student_of(network, images, **config)
    write_student(tmp_path / "student.safetensors", student, {})
    state, _ = read_student(tmp_path / "student.safetensors")
    again = prepare(small_network(7), QuantizationConfig(**config), images[:1])
    again.load_state_dict(state)
    assert torch.equal(again(images), student(images))
    assert torch.equal(copy.deepcopy(student)(images), student(images))


def test_mode_is_part_of_the_state(network, images):
    student = prepare(network, QuantizationConfig(), images[:1])
    set_activation_mode(student, "observe")
    student(images)
    again = prepare(network, QuantizationConfig(), images[:1])
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(images), student(images))
    for a, b in zip(activation_quantizers(again), activation_quantizers(student), strict=True):
        assert a.mode == b.mode == "observe"
        assert torch.equal(a.high, b.high)


def test_statistics_stay_fixed_in_training_mode(network, images):
    student = student_of(network, images)
    before = {n: b.clone() for n, b in student.named_buffers() if "running" in n}
    logits = student(images)
    student.train()
    assert torch.equal(student(images), logits)
    assert before
    assert all(torch.equal(b, before[n]) for n, b in student.named_buffers() if n in before)


# ---- activation quantizers ------------------------------------------------------------------


def build_activation(grid: str, signed: bool):
    if grid == "paper":
        return PaperActivationQuantizer(4, RangeRule("minmax"))
    return LearnedActivationQuantizer(4, signed, RangeRule("minmax"))


@pytest.mark.parametrize("grid", ["deploy", "paper"])
@pytest.mark.parametrize("updates", [1, 2, 10, 50])
def test_moving_range_starts_at_zero_and_is_not_corrected(grid, updates):
    quantizer = build_activation(grid, signed=True)
    quantizer.mode = "observe"
    x = torch.linspace(-1.5, 3.0, 100)
    for _ in range(updates):
        quantizer(x)
    assert quantizer.low.item() == pytest.approx((1 - 0.9**updates) * -1.5, rel=1e-5)
    assert quantizer.high.item() == pytest.approx((1 - 0.9**updates) * 3.0, rel=1e-5)


def test_moving_range_is_used_in_the_pass_that_moves_it():
    quantizer = build_activation("paper", signed=False)
    quantizer.mode = "observe"
    x = torch.linspace(0, 3.0, 100)
    y = quantizer(x)
    assert torch.equal(y, paper_quantize(x, torch.tensor(0.0), quantizer.high, 4))
    assert y.max().item() == pytest.approx(0.3, rel=1e-5)
    quantizer.mode = "quantize"
    assert torch.equal(quantizer(x), y)
    quantizer.mode = "float"
    assert quantizer(x) is x


def test_signed_activations_represent_zero_and_both_ends():
    quantizer = build_activation("deploy", signed=True)
    quantizer.low.fill_(-1.0)
    quantizer.high.fill_(2.0)
    quantizer.range_changed()
    assert quantizer.scale.item() == pytest.approx(0.2)
    assert quantizer.zero_point.item() == 5
    y = quantizer.quantize(torch.tensor([-9.0, -1.0, 0.0, 2.0, 9.0]))
    torch.testing.assert_close(y, torch.tensor([-1.0, -1.0, 0.0, 2.0, 2.0]))


def test_paper_gradient_is_the_identity_even_outside_the_range():
    quantizer = build_activation("paper", signed=False)
    quantizer.high.fill_(1.0)
    x = torch.linspace(-2, 4, 50, requires_grad=True)
    grad = torch.randn(50)
    quantizer.quantize(x).backward(grad)
    assert torch.equal(x.grad, grad)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    weight_quantizer = PaperWeightQuantizer(weight, 4, RangeRule("minmax"))
    grad = torch.randn(4, 3, 3, 3)
    weight_quantizer(weight).backward(grad)
    assert torch.equal(weight.grad, grad)


def test_paper_weights_follow_their_range_in_every_pass():
    weight = torch.randn(4, 3, 3, 3)
    quantizer = PaperWeightQuantizer(weight, 4, RangeRule("minmax"))
    for factor in (1.0, 3.0):
        values = weight * factor
        for channel, quantized in zip(values, quantizer(values), strict=True):
            expected = paper_quantize(channel, channel.min(), channel.max(), 4)
            assert torch.equal(quantized, expected)
    assert not quantizer.state_dict()


def test_scale_gradient_is_scaled_once():
    weight = torch.randn(4, 3, 3, 3)
    grads = []
    for kind in ("none", "lsq"):
        quantizer = LearnedWeightQuantizer(weight, 4, RangeRule("lp"), kind)
        quantizer.calibrate(weight)
        quantizer(weight).square().sum().backward()
        grads.append(quantizer.scale.grad)
    torch.testing.assert_close(grads[1], grads[0] / math.sqrt(27 * 7))


def test_projection_keeps_scales_positive_and_zero_points_valid(network, images):
    student = student_of(network, images, learn_zero_points=True)
    with torch.no_grad():
        for parameter in scale_parameters(student):
            parameter.sub_(1000.0)
    project_scales_(student)
    for name, parameter in student.named_parameters():
        if name.endswith("scale"):
            assert (parameter > 0).all()
        if name.endswith("zero_point"):
            assert parameter.item() == 0
    assert student(images).isfinite().all()


# ---- calibration ----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_calibration_does_not_depend_on_batches(network, images, grid):
    student = student_of(network, images, grid=grid)
    state = copy.deepcopy(student.state_dict())
    calibrate(student, iter(images.split(5)))
    for key, tensor in student.state_dict().items():
        # Convolutions may round differently for other batch sizes.
        torch.testing.assert_close(tensor, state[key], rtol=1e-3, atol=1e-3)


def test_minmax_calibration_reaches_the_extremes_of_float_activations(network, images):
    student = student_of(
        network, images, weight_bits=8, weight_range="minmax", activation_range="minmax"
    )
    first = student.activation_quantizers.x
    assert first.low.item() == images.min().item()
    assert first.high.item() == images.max().item()
    largest = F.relu(student.bn1(student.conv1(first(images)))).max().item()
    assert student.activation_quantizers.relu.high.item() == pytest.approx(largest, rel=0.02)


def test_mse_is_better_than_minmax_at_few_bits(network, images):
    expected = network(images)

    @torch.no_grad()
    def error(rule):
        student = student_of(
            network,
            images,
            weight_bits=3,
            activation_bits=3,
            weight_range=rule,
            activation_range=rule,
        )
        return float((student(images) - expected).square().mean())

    assert error("mse") < 0.7 * error("minmax")


def test_calibration_needs_finite_images(network, images):
    student = prepare(network, QuantizationConfig(), images[:1])
    with pytest.raises(UsageError, match="at least one image, got none"):
        calibrate(student, [])
    with pytest.raises(UsageError, match="every activation to be finite"):
        calibrate(student, images * math.nan)


def test_activation_modes_are_validated(network, images):
    student = prepare(network, QuantizationConfig(), images[:1])
    with pytest.raises(UsageError, match="ranges to be set before mode quantize"):
        set_activation_mode(student, "quantize")
    with pytest.raises(UsageError, match="mode to be float, observe or quantize, got off"):
        set_activation_mode(student, "off")
    set_activation_mode(student, "observe")
    student(images)
    set_activation_mode(student, "quantize")
    assert {q.mode for q in activation_quantizers(student)} == {"quantize"}


def test_fresh_student_is_the_network_with_quantized_weights(network, images):
    student = prepare(network, QuantizationConfig(weight_bits=8), images[:1])
    expected = network(images)
    assert 0 < (student(images) - expected).norm() / expected.norm() < 0.03


def test_a_student_can_be_pickled_and_copied():
    network = load_model("glyphs_resnet")
    images = torch.randn(2, 3, 32, 32)
    student = prepare(network, QuantizationConfig(), images)
    calibrate(student, images)
    for other in (pickle.loads(pickle.dumps(student)), copy.deepcopy(student)):
        assert torch.equal(other(images), student(images))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_networks_with_forward_hooks_are_refused(register):
    network = load_model("glyphs_resnet")
    getattr(network.conv1, register)(lambda *arguments: None)
    with pytest.raises(UsageError, match="without forward hooks.*got one on conv1"):
        prepare(network, QuantizationConfig(), torch.zeros(1, 3, 32, 32))


def test_bad_students_and_bad_images_are_refused():
    network, images = load_model("glyphs_resnet"), torch.zeros(2, 3, 32, 32)
    for example in (None, images[0], images[:0]):
        with pytest.raises(UsageError, match="example_input of images"):
            prepare(network, QuantizationConfig(), example)
    student = prepare(network, QuantizationConfig(), images)
    with pytest.raises(UsageError, match="student to be a network from prepare"):
        calibrate(network, images)
    with pytest.raises(UsageError, match="student to be a network from prepare"):
        bits_table(network)
    with pytest.raises(UsageError, match="at least one image, got none"):
        calibrate(student, images[:0])
    with pytest.raises(UsageError, match=r"images \[n, 3, H, W\], got shape \(3, 32, 32\)"):
        calibrate(student, [images[0]])
