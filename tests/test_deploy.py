"""Integer programs: logits bit-identical to the student's, and files that cannot do harm."""

import contextlib
import copy
import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_prepare_zoo import NETWORKS, load, settle
from test_quantization import small_network, student_of
from torch import Tensor, nn
from torch.nn import functional as F

import fdda_ext
from fdda_ext.commands import evaluate, export
from fdda_ext.data import calibration_set, load_dataset
from fdda_ext.deploy import (
    IntegerProgram,
    capture,
    load_program,
    lower,
    save_program,
    stored_bytes,
)
from fdda_ext.deploy.file import pack_codes, unpack_codes
from fdda_ext.deploy.instructions import (
    CodeGrid,
    Conv,
    Linear,
    MaxPool,
    Pad,
    Quantize,
    Rescale,
    Reshape,
    Value,
)
from fdda_ext.engine import write_student
from fdda_ext.engine.checkpoint import digest
from fdda_ext.errors import UsageError
from fdda_ext.models import load_model
from fdda_ext.quantization import QuantizationConfig, calibrate, prepare

SIZE = 16


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def program(images: Tensor) -> IntegerProgram:
    return lower(student_of(small_network(), images), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def assert_same_function(student: nn.Module, images: Tensor) -> IntegerProgram:
    """Require that the program's logits are bit-identical to the student's in every executor."""
    program = lower(student)
    with torch.no_grad():
        expected = student(images)
    assert torch.equal(program(images), expected)
    assert torch.equal(program.by_instructions(images), expected)
    assert torch.equal(program.on_device(images.device)(images), expected)
    return program


# ---- the program and the student ------------------------------------------------------------


@pytest.mark.parametrize("first_last_bits", [None, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_program_is_bit_identical_to_the_student(images, bits, first_last_bits):
    config = {"weight_bits": bits, "activation_bits": bits, "first_last_bits": first_last_bits}
    student = student_of(small_network(), images, **config)
    assert_same_function(student, images)


def test_layers_can_have_different_bits(images, tmp_path):
    names = ("conv1", "conv2", "expand", "depthwise", "project", "last", "fc")
    layer_bits = dict(zip(names, range(2, 9), strict=True))
    program = assert_same_function(
        student_of(small_network(), images, layer_bits=layer_bits), images
    )
    save_program(tmp_path / "p", program)
    again = load_program(tmp_path / "p")
    assert {name: bits for name, bits, *_ in stored_bytes(again)} == layer_bits
    assert torch.equal(again(images), program(images))


@pytest.mark.parametrize("name", ["glyphs_resnet", "glyphs_mobilenet"])
@pytest.mark.parametrize("first_last_bits", [None, 8])
def test_programs_of_embedded_networks_are_bit_identical(name, first_last_bits):
    calibration, _ = calibration_set("glyphs")
    config = QuantizationConfig(first_last_bits=first_last_bits)
    student = prepare(load_model(name), config, calibration[:1])
    calibrate(student, calibration)
    dataset = load_dataset("glyphs", "test", limit=284)
    program = assert_same_function(student, dataset.images(range(284))[0])
    assert len(program.float_values()) == (3 if name == "glyphs_resnet" else 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_programs_of_library_networks_are_bit_identical(name):
    network = settle(load(NETWORKS[name]))
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    student = prepare(network, QuantizationConfig(), images[:1])
    calibrate(student, images)
    program = assert_same_function(student, images)
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sum(isinstance(i, (Conv, Linear)) for i in program.instructions) == len(layers)


@pytest.mark.parametrize("winograd", [False, True])
def test_every_algorithm_gives_the_same_bits(isa, threads, program, images, winograd):
    native = program.native
    plan = tuple(winograd and can for can in native.eligible())
    assert any(plan) == winograd
    for batch in (1, 24):
        expected = program.by_instructions(images[:batch])
        assert torch.equal(native.run(images[:batch], plan), expected)


def test_profile_names_every_instruction(program, images):
    times = program.native.profile(images)
    names = {i.output.name for i in program.instructions if not isinstance(i, Reshape)}
    assert {time.name for time in times} == names
    assert all(time.seconds >= 0 for time in times)
    (conv,) = (time for time in times if time.name == "conv1")
    assert conv.products == 24 * 3 * 9 * math.prod(
        next(i.output.shape for i in program.instructions if i.output.name == "conv1")
    )


def test_concurrent_calls_do_not_disturb_each_other(program, images):
    expected = program(images)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(program, [images] * 16):
            assert torch.equal(result, expected)


def test_copies_and_empty_batches_work(program, images):
    twin = copy.deepcopy(program)
    assert torch.equal(twin(images), program(images))
    assert program(images[:0]).shape == (0, program.output.shape[0])
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(program(strided), program(images))
    for converted in (twin.half(), twin.double(), torch.compile(twin)):
        assert torch.equal(converted(images), program(images))


class PoolsFloats(nn.Module):
    """A network in which an addition reads a pooled normalisation in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm1(self.first(x)))
        x = torch.relu(self.norm2(self.second(torch.relu(x))) + x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module", params=["codes", "floats"])
def any_program(request: pytest.FixtureRequest, program: IntegerProgram, images: Tensor):
    """A program that pools codes, and one that pools floats."""
    if request.param == "codes":
        return program
    torch.manual_seed(0)
    pools = assert_same_function(student_of(PoolsFloats().eval(), images), images)
    assert any(isinstance(i, MaxPool) and i.output.grid is None for i in pools.instructions)
    return pools


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_hostile_records_are_refused_or_run(any_program, data):
    """Run records that the encoder never writes; nothing outside may be read or written."""
    program = any_program
    images = torch.zeros(2, 3, SIZE, SIZE)
    native = program.native
    records = native.records(torch.float32, tuple(False for _ in native.eligible())).clone()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(records) - 1))
        value = records[at].item()
        near = st.integers(value - 70, value + 70).filter(lambda n: abs(n) < 2**63)
        wild = st.sampled_from([0, 1, -1, 2, 7, 64, 2**15, 2**31, 2**40, 2**62, -(2**63)])
        records[at] = data.draw(near | wild)
    workspace = native.workspace(len(images))
    with contextlib.suppress(ValueError):
        torch.ops.fdda._int4_program(images, native.constants, records, workspace)


def test_integer_sums_stay_close_to_float_sums(images):
    """Compare the student's integer sums (without gradients) and float sums (with gradients)."""
    student = student_of(small_network(), images)
    exact = student(images).detach()
    with torch.no_grad():
        difference = (student(images) - exact).abs()
    # A value halfway between two codes may be rounded to either, which changes a logit.
    assert (difference > 1e-4).float().mean() < 0.05


class Unusual(nn.Module):
    """A network with normalisations before a layer and after an addition, and a shared sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm1 = nn.BatchNorm2d(8)
        self.norm2 = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, groups=2, dilation=2)
        self.pool = nn.AvgPool2d(2, 1)
        self.third = nn.Conv2d(8, 8, 1, bias=False)
        self.fc = nn.Linear(8, 5)
        self.norm3 = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)))
        y = self.second(F.pad(F.relu(self.norm2(x)), (2, 2, 2, 2)))
        x = x + y
        x = self.pool(F.relu(x)) + self.third(self.pool(x))
        return self.norm3(self.fc(x.mean((2, 3))))


def test_programs_of_unusual_networks_are_bit_identical(images):
    torch.manual_seed(0)
    network = Unusual().train()
    with torch.no_grad():
        for _ in range(5):
            network(images)
    assert_same_function(student_of(network.eval(), images), images)


def test_sums_beyond_float32_are_exact():
    """Sum 4608 products of 8-bit codes and weights, which reaches 2^27."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (3, 4608), generator=generator, dtype=torch.int8)
    codes = torch.randint(0, 256, (5, 4608), generator=generator, dtype=torch.uint8)
    weight[0], codes[0] = 127, 255
    source = Value("x", (4608,), CodeGrid(1.0, 3, 8))
    layer = Linear(("x",), Value("y", (3,), None), None, None, 8)
    total = layer.sum(source, codes, {"y.weight": weight})
    expected = (codes.long() - 3) @ weight.long().T
    assert expected.abs().max() > 2**24
    assert torch.equal(total, expected.to(torch.float32))


def test_capture_needs_a_cuda_device(program, images):
    with pytest.raises(UsageError, match="capture: expected example on a CUDA device, got cpu"):
        capture(program, images)
    with pytest.raises(UsageError, match=r"expected images \[N, 3, 16, 16\], got \[24, 3, 8, 16\]"):
        capture(program, images[:, :, :8])


def test_uint8_images_are_normalised(program):
    raw = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (program.mean, program.std))
    assert torch.equal(program(raw), program((raw.float() / 255 - mean) / std))
    assert torch.equal(program.on_device(raw.device)(raw), program(raw))


def test_wrong_images_are_refused(program, images):
    with pytest.raises(UsageError, match=r"images \[N, 3, 16, 16\], got \[24, 3, 8, 16\]"):
        program(images[:, :, :8])
    with pytest.raises(UsageError, match="float32 or uint8, got torch.float64"):
        program(images.double())
    plain = IntegerProgram(program.image, program.instructions, program.tensors)
    with pytest.raises(UsageError, match="mean and std are unknown"):
        plain(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))


# ---- students without a program -------------------------------------------------------------


def test_lower_needs_a_calibrated_student(images):
    student = prepare(small_network(), QuantizationConfig(), images[:1])
    with pytest.raises(UsageError, match="calibrated, got a quantizer in mode float"):
        lower(student)


def test_paper_grid_has_no_program(images):
    student = student_of(small_network(), images, grid="paper")
    with pytest.raises(UsageError, match="got 1 that have none: grid paper leaves"):
        lower(student)


# ---- the file -------------------------------------------------------------------------------


def test_scales_and_shifts_take_three_bytes(program: IntegerProgram, file: Path) -> None:
    """Check that folding rounds scales and shifts to what the file can hold."""
    _, tensors = read(file)
    for name, *_ in stored_bytes(program):
        assert tensors[f"{name}.scale"].shape[1:] == tensors[f"{name}.shift"].shape[1:] == (3,)
    for name, scale in load_program(file).tensors.items():
        assert torch.equal(scale, program.tensors[name])


def test_programs_of_the_paper_s_networks_are_small() -> None:
    """Limit the bytes of weights, scales and shifts at 4 bits, without instructions."""
    for name, limit in (("torchvision:resnet18", 5.95e6), ("torchvision:mobilenet_v2", 1.85e6)):
        images = torch.zeros(1, 3, 64, 64)
        student = prepare(
            load_model(name, weights=None, num_classes=1000), QuantizationConfig(), images
        )
        calibrate(student, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        assert sum(size for *_, size in stored_bytes(lower(student))) <= limit


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_packed_codes_unpack_to_the_same_codes(bits: int, rows: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (rows, n), generator=generator, dtype=torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-n * bits // 8))
    # A row is a little-endian number whose digits in base 2^bits are the codes.
    number = int.from_bytes(bytes(packed[0].tolist()), "little")
    assert number == sum((code % 2**bits) << (bits * i) for i, code in enumerate(codes[0].tolist()))
    assert torch.equal(unpack_codes(packed, n, bits), codes)


@pytest.fixture
def file(program: IntegerProgram, tmp_path: Path) -> Path:
    path = tmp_path / "model.int4.safetensors"
    save_program(path, program)
    return path


def test_a_loaded_program_equals_the_saved_one(program, file, images):
    again = fdda_ext.load(file)
    assert again.instructions == program.instructions
    assert (again.mean, again.std, again.image) == (program.mean, program.std, program.image)
    assert torch.equal(again(images), program(images))
    save_program(file, again)
    assert torch.equal(load_program(file)(images), program(images))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_programs_of_other_bits_can_be_saved(images, tmp_path, bits):
    program = lower(student_of(small_network(), images, weight_bits=bits))
    save_program(tmp_path / "p", program)
    assert torch.equal(load_program(tmp_path / "p")(images), program(images))


def test_damaged_files_are_refused(file):
    whole = file.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match="whole program file"):
            load_program(file)
    with pytest.raises(UsageError, match="whole program file"):
        load_program(file.with_name("missing"))


def rewrite(path: Path, manifest: Any, tensors: dict[str, Tensor]) -> None:
    """Write a file with a valid checksum, as an attacker would."""
    text = json.dumps(manifest)
    metadata = {
        "format": "fdda_ext.program.3",
        "manifest": text,
        "sha256": digest(tensors, text),
    }
    save_file(tensors, str(path), metadata=metadata)


def read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    with safe_open(str(path), framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        return json.loads(stored.metadata()["manifest"]), tensors


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container and key of nested JSON."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


HOSTILE = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**70,
    1e308,
    float("nan"),
    float("inf"),
    "x",
    "conv1",
    [],
    {},
    [1, 1],
    [2**30, 2**30, 2**30],
]


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_hostile_manifests_are_refused_or_run(tmp_path_factory, images, seed: int) -> None:
    """Replace, remove or repeat values of the manifest; expect a UsageError or a program."""
    path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        save_program(path, lower(student_of(small_network(), images)))
    manifest, tensors = read(path)
    rng = random.Random(seed)
    for _ in range(rng.choice([1, 1, 2, 3])):
        container, key = rng.choice(places(manifest))
        action = rng.randrange(4)
        if action == 0 and len(container) > 1:
            del container[key]
        elif action == 1 and isinstance(container, list):
            container.insert(0, copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(rng.choice(HOSTILE))
    if rng.random() < 0.3:
        name = rng.choice(sorted(tensors))
        tensors[name] = rng.choice(
            [torch.zeros(3), torch.zeros(0), tensors[name][..., :1].clone(), torch.full((8,), 127)]
        )
    target = path.with_name("changed.safetensors")
    rewrite(target, manifest, tensors)
    try:
        program = load_program(target)
    except UsageError:
        return
    if tuple(program.image.shape) == (3, SIZE, SIZE):
        assert program(images[:2]).shape[0] == 2


@pytest.mark.parametrize(
    ("step", "rule"),
    [
        (lambda x, grid: Reshape(("image",), Value("y", x.shape, None)), "the image as input"),
        (lambda x, grid: Quantize((x.name,), Value("y", x.shape, grid)), "the image as input"),
        (
            lambda x, grid: MaxPool(
                (x.name,), Value("y", (3, 1, 1), None), (1, 1), (2**15, 1), (0, 0), (1, 1), False
            ),
            "a window of reasonable size",
        ),
        (lambda x, grid: Pad((x.name,), Value("y", (3, 3, 4), None), 0, 0, -1, 0), "sides of 0"),
    ],
    ids=["image", "quantize", "stride", "pad"],
)
def test_programs_that_the_kernels_refuse_cannot_be_built(step, rule):
    grid = CodeGrid(0.1, 3, 4)
    image, x = Value("image", (3, 4, 4), None), Value("x", (3, 4, 4), None)
    codes = Quantize(("image",), Value("codes", image.shape, grid))
    floats = Rescale(("codes",), x, None, None)
    tensors = {"x.scale": torch.ones(1), "x.shift": torch.zeros(1)}
    with pytest.raises(UsageError, match=rule):
        IntegerProgram(image, [codes, floats, step(x, grid)], tensors)
    with pytest.raises(UsageError, match="logits in float32, got codes of 4 bits"):
        IntegerProgram(image, [codes], {})


# ---- the command line -----------------------------------------------------------------------


def test_export_and_evaluate(tmp_path, capsys):
    calibration, _ = calibration_set("glyphs")
    config = QuantizationConfig()
    student = prepare(load_model("glyphs_resnet"), config, calibration[:1])
    calibrate(student, calibration)
    recipe = {
        "model": "glyphs_resnet",
        "num_classes": 71,
        "image_size": 32,
        "data": "glyphs",
        "quantization": config.__dict__,
    }
    write_student(tmp_path / "student.safetensors", student, recipe)
    export.main([f"--run={tmp_path}", "--profile=2"])
    path = tmp_path / "model.int4.safetensors"
    output = capsys.readouterr().out
    assert "GOP/s" in output and "2 images" in output
    assert str(path.stat().st_size) in output
    assert "blocks.0.conv2" in output
    assert path.stat().st_size < 0.6 * 260_000
    results = []
    for source in (tmp_path, path):
        evaluate.main([f"--run={source}", "--test_limit=142"])
        results.append(capsys.readouterr().out.split("top-1")[1].split())
    assert results[0] == results[1]


def test_export_refuses_bad_options(tmp_path):
    with pytest.raises(UsageError, match="export: expected run to be a folder with a trained"):
        export.main([f"--run={tmp_path}"])
    with pytest.raises(UsageError, match="export: expected profile to be 0 to 4096 images"):
        export.main([f"--run={tmp_path}", "--profile=-1"])
    with pytest.raises(UsageError, match="export: expected a complete student file"):
        export.main([f"--run={tmp_path}/none"])


def test_commands_refuse_files_that_do_not_fit(file, tmp_path, images):
    with pytest.raises(UsageError, match="export: expected a student file"):
        export.main([f"--run={file}"])
    with pytest.raises(UsageError, match="image_size to be the program's 16, got 32"):
        evaluate.main([f"--run={file}", "--image_size=32"])
    with pytest.raises(UsageError, match="data with the network's 5 classes, got 71"):
        evaluate.main([f"--run={file}"])
    student = student_of(small_network(), images)
    recipe = {
        "model": "glyphs_resnet",
        "num_classes": 71,
        "image_size": 32,
        "data": "glyphs",
        "quantization": {},
    }
    write_student(tmp_path / "student.safetensors", student, recipe)
    with pytest.raises(UsageError, match="export: expected .* to hold the student"):
        export.main([f"--run={tmp_path}"])
    prepared = prepare(load_model("glyphs_resnet"), QuantizationConfig(), torch.zeros(1, 3, 32, 32))
    calibrate(prepared, torch.randn(8, 3, 32, 32))
    write_student(tmp_path / "student.safetensors", prepared, recipe)
    with pytest.raises(UsageError, match="out to be a file in a folder that exists"):
        export.main([f"--run={tmp_path}", f"--out={tmp_path}"])
    with pytest.raises(UsageError, match="out to be a file in a folder that exists"):
        export.main([f"--run={tmp_path}", f"--out={tmp_path}/none/file"])
