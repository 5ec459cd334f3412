"""Export of network structures to integer programs, and obstacles that prevent it."""

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from test_prepare_zoo import settle
from torch import Tensor, nn
from torch.nn import functional as F

from fdda_ext._torchvision import import_torchvision
from fdda_ext.commands import export
from fdda_ext.data import load_dataset
from fdda_ext.deploy import (
    IntegerProgram,
    export_obstacles,
    export_student,
    load_program,
    lower,
)
from fdda_ext.deploy.instructions import Conv, MaxPool
from fdda_ext.engine import write_student
from fdda_ext.errors import UsageError
from fdda_ext.models import load_model
from fdda_ext.quantization import QuantizationConfig, calibrate, prepare

SIZE = 16


class Network(nn.Module):
    """Two normalised convolutions and a head, which the function ``forward`` combines."""

    def __init__(self, forward, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.bn3 = nn.BatchNorm2d(channels)
        self.image_bn = nn.BatchNorm2d(3)
        self.head = nn.Conv2d(channels, 8, 1)
        self.fc = nn.Linear(8, 5)
        self.bn4 = nn.BatchNorm1d(8)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)

    def stem(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))

    def end(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.head(x)).mean((2, 3)))


def pool_before_relu(n, x):
    return n.end(F.relu(F.max_pool2d(n.stem(x), 3, 2, 1)))


def two_pools_before_relu6(n, x):
    x = F.relu(F.max_pool2d(F.relu6(F.max_pool2d(n.stem(x), 2, ceil_mode=True)), 3, 1, 1))
    return n.end(F.relu6(x))


def pool_in_float(n, x):
    """Like the stem of ResNetV2: pooled values are normalised, and added later."""
    x = F.max_pool2d(n.conv1(x), 3, 2, 1)
    return n.end(F.relu(n.bn2(n.conv2(F.relu(n.bn1(x)))) + x))


def pool_in_float_beyond_the_image(n, x):
    x = F.max_pool2d(n.conv1(x), 4, 3, 2, 2, ceil_mode=True)
    return n.end(F.relu(n.bn3(F.pad(x, (1, 0, 2, 1)))))


def pool_read_twice_before_relu(n, x):
    x = F.max_pool2d(n.stem(x), 2)
    return n.end(F.relu(x) + n.conv2(F.relu(n.bn3(x))))


def raw_result_read_twice(n, x):
    x = n.conv1(x)
    return n.end(F.relu(n.bn1(x)) + x)


def average_before_norm(n, x):
    x = F.avg_pool2d(F.relu(n.stem(x)), 2)
    return n.end(F.relu(n.bn3(x)))


def dense_block(n, x):
    x = F.max_pool2d(F.relu(n.stem(x)), 2)
    y = n.conv2(x)
    return n.end(F.relu(n.bn3(torch.cat([x, y], 1))))


def float_dense_block(n, x):
    x = n.conv1(x)
    y = n.conv2(F.relu(n.bn1(x)))
    return n.end(F.relu(n.bn3(torch.cat((F.max_pool2d(x, 3, 1, 1), y), dim=-3))))


def same_part_twice(n, x):
    x = F.relu(n.stem(x))
    y = n.conv2(x)
    return n.end(F.relu(n.bn3(torch.cat([x, x], 1)) + torch.cat([y, y], 1)))


def norm_of_codes(n, x):
    x = F.max_pool2d(F.relu(n.stem(x)), 2)
    return n.end(F.relu(n.bn3(x)) + n.conv2(x))


def norm_of_the_image(n, x):
    return n.end(F.relu(n.stem(n.image_bn(x))))


def sum_read_twice(n, x):
    x = F.relu(n.stem(x))
    x = n.bn2(n.conv2(x)) + x
    return n.end(F.relu(x) + F.relu6(n.bn3(x)) + x)


def summed_by_python(n, x):
    x = F.relu(n.stem(x))
    return n.end(F.relu(sum([n.conv2(x), x, n.bn3(x)])))


def added_to_itself(n, x):
    x = n.stem(x)
    return n.end(F.relu(x + x))


def pooled_and_linear(n, x):
    x = F.relu(n.stem(x))
    y = F.relu(n.bn4(x.mean((2, 3))))
    return n.fc(F.relu(y + F.relu(n.conv2(x)).mean((2, 3))))


def pooled_sum(n, x):
    """Add two average poolings ``[N, C]``."""
    x = F.relu(n.stem(x))
    return n.fc(x.mean((2, 3)) + F.relu(n.conv2(x)).mean((2, 3)))


def shapes_in_between(n, x):
    """Reshape via shapes that no value of a program can have."""
    x = F.relu(n.stem(x)).flatten(2).view(-1, 8, 4, 8, 8).flatten(1).view(-1, 8, SIZE, SIZE)
    x = F.adaptive_avg_pool2d(F.relu(n.conv2(x)), 1)
    return n.fc(x.squeeze(-1).squeeze(-1))


def two_grids(n, x):
    """Use a result both on the grid of a concatenation and in float."""
    x = n.bn2(n.conv2(F.relu(n.stem(x))))
    y = n.head(torch.cat([x, F.relu(x)], 1))
    return n.fc((F.relu(y) + x).mean((2, 3)))


EXPORTED = {
    f.__name__: f
    for f in (
        pool_before_relu,
        two_pools_before_relu6,
        pool_in_float,
        pool_in_float_beyond_the_image,
        pool_read_twice_before_relu,
        raw_result_read_twice,
        average_before_norm,
        dense_block,
        float_dense_block,
        same_part_twice,
        norm_of_codes,
        norm_of_the_image,
        sum_read_twice,
        added_to_itself,
        summed_by_python,
        pooled_and_linear,
        pooled_sum,
        shapes_in_between,
        two_grids,
    )
}
WIDE = {"dense_block", "float_dense_block", "same_part_twice", "two_grids"}


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return settle(Network(EXPORTED[name], 16 if name in WIDE else 8), SIZE)


def assert_equal(network: nn.Module, bits: int, x: Tensor) -> IntegerProgram:
    """Require that the program is bit-identical to the student, which has no obstacles."""
    config = QuantizationConfig(weight_bits=bits, activation_bits=bits)
    student = prepare(network, config, x[:1])
    assert export_obstacles(student) == []
    calibrate(student, x)
    program = lower(student)
    with torch.no_grad():
        expected = student(x)
    assert torch.equal(program(x), expected)
    assert torch.equal(program(x[:1]), expected[:1])
    assert torch.equal(program.by_instructions(x), expected)
    assert torch.equal(program.on_device(x.device)(x), expected)
    assert export_obstacles(student) == []
    return program


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", EXPORTED)
def test_structure_is_exported(name, bits, isa):
    network = build(name)
    program = assert_equal(network, bits, images())
    used = sum(
        node.op == "call_module" and isinstance(network.get_submodule(node.target), nn.Conv2d)
        for node in torch.fx.symbolic_trace(network).graph.nodes
    )
    assert sum(isinstance(step, Conv) for step in program.instructions) == used


@torch.no_grad()
@pytest.mark.parametrize("name", EXPORTED)
def test_eight_bits_keep_the_logits(name):
    network, x = build(name), images()
    student = prepare(network, QuantizationConfig(weight_bits=8, activation_bits=8), x[:1])
    calibrate(student, x)
    expected = network(x)
    assert (student(x) - expected).norm() < 0.05 * expected.norm()


def test_codes_are_pooled_if_a_relu_follows():
    pools = [
        step.output.grid is not None
        for name in ("pool_before_relu", "two_pools_before_relu6", "pool_in_float")
        for step in assert_equal(build(name), 4, images()).instructions
        if isinstance(step, MaxPool)
    ]
    assert pools == [True, True, True, False]


def test_normalisation_before_the_first_layer_keeps_the_bits_of_the_image():
    student = prepare(build("norm_of_the_image"), QuantizationConfig(), images(1))
    bits = [q.grid.bits for q in student.activation_quantizers.children()]
    assert bits[:3] == [8, 8, 4]


@pytest.mark.parametrize("kernel", [2, 3, (4, 3)])
def test_same_padding_is_exported(kernel):
    conv = nn.Conv2d(8, 8, kernel, padding="same", dilation=(1, 3))
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="valid"), nn.BatchNorm2d(8), nn.ReLU(), conv, nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    assert_equal(settle(network, SIZE), 8, images())
    assert conv.padding == "same"


def test_modules_and_values_may_have_the_same_names():
    class Colliding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Conv2d(3, 8, 3)
            self.x_2 = nn.Conv2d(8, 8, 3)
            self.relu_2 = nn.Conv2d(8, 8, 3)
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.relu_2(F.relu(self.x_2(F.relu(self.x(x))))))).mean((2, 3))

    assert_equal(settle(Colliding(), SIZE), 4, images())


def test_depth_is_no_obstacle():
    layers = [nn.Conv2d(3, 3, 1) for _ in range(300)]
    end = (nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    network = nn.Sequential(*layers, *end)
    student = prepare(network.eval(), QuantizationConfig(), images(1))
    assert export_obstacles(student) == []


def densenet() -> nn.Module:
    return import_torchvision().models.DenseNet(8, (3, 2), 16, num_classes=10)


def resnetv2() -> nn.Module:
    timm = pytest.importorskip("timm")
    small = {"layers": (1, 2), "channels": (16, 32), "stem_chs": 8}
    return timm.create_model("resnetv2_50", num_classes=10, **small)


@pytest.mark.parametrize("make", [densenet, resnetv2])
def test_networks_that_pool_in_float_are_exported(make):
    torch.manual_seed(0)
    network = settle(make(), 32)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    program = assert_equal(network, 4, x)
    assert any(isinstance(i, MaxPool) and i.output.grid is None for i in program.instructions)


# ---- networks without a program -------------------------------------------------------------


class Refused(nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.act = change if isinstance(change, nn.Module) else nn.Identity()
        self.change = (lambda x: x) if isinstance(change, nn.Module) else change
        self.last = nn.LazyConv2d(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(self.act(self.blocks(x)))).mean((2, 3))


OBSTACLES = {
    "leaky": (nn.LeakyReLU(), r"^act \(LeakyReLU.*\): .* replace it by ReLU"),
    "silu": (nn.SiLU(), r"^act \(SiLU.*\): .* replace it by ReLU"),
    "hardswish": (nn.Hardswish(), r"^act \(Hardswish.*\): .* replace it by ReLU"),
    "written_shuffle": (
        lambda x: x.view(-1, 2, 4, SIZE, SIZE).transpose(1, 2).contiguous().flatten(1, 2),
        r"^Tensor.transpose in .*: moves values",
    ),
    "shuffle": (nn.ChannelShuffle(2), r"^act \(ChannelShuffle.*\): moves values"),
    "pixel_shuffle": (nn.PixelShuffle(2), r"^act \(PixelShuffle.*\): moves values"),
    "upsample": (nn.Upsample(scale_factor=2), r"^act \(Upsample.*\): has no integer instruction"),
    "padding": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), r"act .*pads by reflect"),
    "clamp": (lambda x: torch.clamp(x, min=0), r"^torch.clamp in .*replace it by ReLU"),
    "gate": (lambda x: F.relu(x) * x.mean((2, 3), keepdim=True), r"^\* in .*: multiplies tensors"),
    "scaled": (lambda x: F.relu(x) * 0.5, r"^\* in Refused, .*: computes with a constant"),
    "constant": (lambda x: F.relu(x) + 1.0, r"^\+ in Refused, .*: computes with a constant"),
    "broadcast": (lambda x: x + x.mean((2, 3), keepdim=True), r"^\+ in .*different shapes"),
    "padded_pool": (lambda x: F.avg_pool2d(x, 3, 1, 1), r"avg_pool2d.*averages over padding"),
    "adaptive_pool": (lambda x: F.adaptive_avg_pool2d(x, 5), r"adaptive_avg_pool2d.*averages"),
    "adaptive_max": (lambda x: F.adaptive_max_pool2d(x, 4), r"adaptive_max_pool2d.*fixed window"),
    "chunk": (lambda x: torch.chunk(x, 2, 1)[0], r"chunk.*takes a part of a tensor"),
    "rows": (lambda x: torch.cat([x, x], 2), r"cat.*concatenates another dimension than channels"),
    "channels": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 2)), r"pad.*pads by \(0, 0, 0, 0, 2, 2\)"),
    "batch": (
        lambda x: F.relu(x.view(-1, 4, SIZE, SIZE)).view(-1, 8, SIZE, SIZE),
        r"^Tensor.*: mixes the images of a batch",
    ),
    "minus": (lambda x: F.relu(x) - x, r"^- in Refused, .*has no integer instruction"),
}  # fmt: skip


def refused(name: str):
    """Return a prepared student, and a pattern for its obstacle."""
    change, message = OBSTACLES[name]
    torch.manual_seed(0)
    network = Refused(change)
    with torch.no_grad():
        network(images())
    return prepare(network.eval(), QuantizationConfig(), images(2)), message


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles_are_named_before_training(name):
    student, message = refused(name)
    obstacles = export_obstacles(student)
    assert len(obstacles) == 1
    assert re.search(message, obstacles[0])
    calibrate(student, images())
    with pytest.raises(UsageError, match="got 1 that have none: ") as refusal:
        lower(student)
    assert obstacles[0] in str(refusal.value)


def test_all_obstacles_are_listed_in_order():
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3, padding_mode="circular"), nn.BatchNorm2d(8)
            self.act = nn.SiLU()
            self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3))
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(self.act(self.bn(self.conv(x))))
            return F.log_softmax(self.fc(torch.tanh(x).mean((2, 3))), dim=1)

    student = prepare(Several().eval(), QuantizationConfig(), images(2))
    places = [obstacle.split(" ")[0] for obstacle in export_obstacles(student)]
    assert places == ["conv", "act", "block.1", "torch.tanh", "F.log_softmax"]
    calibrate(student, images())
    with pytest.raises(UsageError, match="got 5 that have none") as refusal:
        lower(student)
    assert all(obstacle in str(refusal.value) for obstacle in export_obstacles(student))
    assert "0x" not in str(refusal.value)


def test_error_shows_the_first_of_many_obstacles():
    layers = [layer for _ in range(7) for layer in (nn.Conv2d(3, 3, 1), nn.SiLU())]
    network = nn.Sequential(*layers, nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student = prepare(network.eval(), QuantizationConfig(), images(2))
    assert len(export_obstacles(student)) == 7
    calibrate(student, images())
    with pytest.raises(UsageError, match=r"got 7 that have none: 1 \(SiLU.*9 \(.*; and 2 more$"):
        lower(student)


def test_networks_other_than_students_of_the_deploy_grid_have_an_obstacle():
    student = prepare(build("pooled_sum"), QuantizationConfig(), images(1))
    unpickled = pickle.loads(pickle.dumps(student))
    for network in (nn.Linear(2, 2), torch.fx.symbolic_trace(nn.ReLU()), unpickled):
        (obstacle,) = export_obstacles(network)
        assert "is no network as prepare returns it" in obstacle
        with pytest.raises(UsageError, match="is no network as prepare returns it"):
            lower(network)
    student = prepare(build("dense_block"), QuantizationConfig(grid="paper"), images(1))
    assert len(export_obstacles(student)) == 1
    assert "grid paper" in export_obstacles(student)[0]


# ---- the file -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student() -> torch.fx.GraphModule:
    student = prepare(build("dense_block"), QuantizationConfig(), images(1))
    calibrate(student, images())
    return student


def test_export_student_writes_the_program_that_it_returns(student, tmp_path):
    path = tmp_path / "net.safetensors"
    for normalisation in ((None, None), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))):
        program = export_student(student, str(path), *normalisation)
        with torch.no_grad():
            expected = student(images())
        assert torch.equal(program(images()), expected)
        assert torch.equal(load_program(path)(images()), expected)
        assert (program.mean, program.std) == normalisation
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("given", [None, 1, 5])
def test_program_that_differs_is_not_written(student, tmp_path, monkeypatch, given):
    """Change the last bit of one logit, for different numbers of given images."""
    seen = []

    def changed(self, x):
        seen.append(len(x))
        logits = self.native(x)
        logits[-1, 0] = torch.nextafter(logits[-1, 0], torch.tensor(torch.inf))
        return logits if len(x) > 1 else self.native(x)

    monkeypatch.setattr(IntegerProgram, "forward", changed)
    path = tmp_path / "net.safetensors"
    path.write_text("kept")
    with pytest.raises(UsageError, match="bit-identical.*, got others on 3 images; nothing"):
        export_student(student, path, images=None if given is None else images(given))
    assert seen == [1, 3]
    assert path.read_text() == "kept"
    assert len(list(tmp_path.iterdir())) == 1


def test_program_that_fails_is_not_written(student, tmp_path, monkeypatch):
    def failing(self, x):
        raise ValueError("shapes that fit together")

    monkeypatch.setattr(IntegerProgram, "forward", failing)
    with pytest.raises(UsageError, match="run on 1 images, got ValueError: shapes that fit"):
        export_student(student, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_logits_that_are_not_finite_are_refused(tmp_path):
    student = prepare(build("norm_of_codes"), QuantizationConfig(), images(1))
    calibrate(student, images())
    student.get_submodule("bn3").bias.data.fill_(3e38)
    student.get_submodule("bn3").weight.data.fill_(3e38)
    with pytest.raises(UsageError, match="finite"):
        export_student(student, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_target_is_checked_first(student, tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "none" / "file", Path("/dev/null")):
        with pytest.raises(UsageError, match="path to be a file in a folder that exists"):
            export_student(nn.Identity(), path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="path in a folder that can be written to"):
        export_student(nn.Identity(), tmp_path / "file")
    for out in (f"{tmp_path}/none/file", f"{tmp_path}"):
        with pytest.raises(UsageError, match="out to be a file in a folder that exists"):
            export.main(["--run=missing", f"--out={out}"])


def test_the_command_compares_on_images_of_the_run(tmp_path, monkeypatch):
    network = load_model("glyphs_mobilenet")
    dataset = load_dataset("glyphs", "test", limit=3)
    config = QuantizationConfig()
    student = prepare(network, config, dataset.images([0])[0])
    calibrate(student, dataset.images([0, 1, 2])[0])
    recipe = {"model": "glyphs_mobilenet", "num_classes": 71, "image_size": 32, "data": "glyphs"}
    recipe["quantization"] = config.__dict__
    write_student(tmp_path / "student.safetensors", student, recipe)
    seen = []

    def watched(self, x):
        seen.append(x)
        return self.native(x)

    monkeypatch.setattr(IntegerProgram, "forward", watched)
    path, program = export.run(export.ExportConfig(str(tmp_path)))
    first = load_dataset("glyphs", "test").images([0, 1, 2])[0]
    assert [len(x) for x in seen] == [1, 3]
    assert torch.equal(seen[1], first)
    assert torch.equal(load_program(path)(first), program(first))
