"""BRECQ, QDrop, AdaQuant: units, learned rounding, losses against formulas, resumption."""

import copy
import errno
import itertools
import json
import math
import os
import tempfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_bitsplit import problem_of_small_network
from test_fdda import CLASSES, problem
from test_prepare_zoo import NETWORKS, load
from torch import Tensor, nn
from torch.nn import functional as F

from fdda_ext.commands import train
from fdda_ext.deploy import lower
from fdda_ext.errors import UsageError
from fdda_ext.methods import (
    AdaQuantConfig,
    BRECQConfig,
    MethodSettings,
    QDropConfig,
    build_method,
)
from fdda_ext.quantization import (
    QuantizationConfig,
    bits_table,
    calibrate,
    float_copy,
    prepare,
)
from fdda_ext.quantization.layers import QuantizedLinear
from fdda_ext.quantization.quantizer import ActivationQuantizer, build_weight_quantizer
from fdda_ext.quantization.student import collecting
from fdda_ext.reconstruction import (
    BATCH,
    Data,
    Dropped,
    Frontier,
    Reconstruction,
    RelativeAdam,
    RoundingConfig,
    SoftlyRounded,
    activations_in_float,
    collect,
    mean_inputs,
    output_error,
    partition,
    prediction_costs,
    retune_norms,
    soften_,
    values_of,
)
from fdda_ext.reconstruction.reconstruct import mixed

ROOT = Path(__file__).resolve().parents[1]

NAMES = ["brecq", "qdrop", "adaquant"]


def tiny(**changes) -> MethodSettings:
    """Return settings with a few steps; ``changes`` apply to all methods that have such a field."""
    sections = {
        "brecq": BRECQConfig(steps=4, batch=4, scale_steps=3, scale_lr=1e-3),
        "qdrop": QDropConfig(steps=4, batch=4, scale_lr=1e-3),
        "adaquant": AdaQuantConfig(steps=4, batch=4, lr=1e-3, held_out=0.2),
    }
    return MethodSettings(
        **{
            name: replace(config, **{k: v for k, v in changes.items() if hasattr(config, k)})
            for name, config in sections.items()
        }
    )


def run(method, begin: int = 0, end: int | None = None) -> list:
    return [method.step(i) for i in range(begin, method.iterations if end is None else end)]


# ---- units ----------------------------------------------------------------------------------

#: Number of layers in each block.
BLOCKS = {
    "torchvision:resnet18": [1, 2, 2, 3, 2, 3, 2, 3, 2, 1],
    "pytorchcv:mobilenet_w1": [1] + [2] * 13 + [1],
    "torchvision:mobilenet_v2": [1, 2] + [3] * 16 + [1, 1],
    "timm:regnetx_006": [1, 4, 4, 3, 3, 4, 3, 3, 3, 3, 4, 3, 3, 3, 3, 3, 3, 1],
    "timm:mobilenetv3_small_100": [1, 4, 3, 3] + [5] * 8 + [1, 1, 1],  # squeeze and excitation
    "timm:resnet26d": [1, 1, 1, 4, 3, 4, 3, 4, 3, 4, 3, 1],
    "torchvision:shufflenet_v2_x0_5": [1] + [5, 3, 3, 3] + [5] + [3] * 7 + [5, 3, 3, 3, 1, 1],
}


@pytest.mark.parametrize("spec", sorted(BLOCKS))
@torch.no_grad()
def test_every_layer_is_in_one_unit_and_all_units_together_equal_the_student(spec):
    network = load(spec)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    quantization = QuantizationConfig(weight_range="minmax", activation_range="minmax")
    student = prepare(network, quantization, images[:1])
    calibrate(student, images)
    layers = [row.name for row in bits_table(student)]
    quantizers = [n for n, m in student.named_modules() if isinstance(m, ActivationQuantizer)]
    kinds = [("layer", "output"), ("layer", "input"), ("block", "output"), ("network", "output")]
    for granularity, quantize in kinds:
        units = partition(student, granularity, images[:1], quantize=quantize)
        assert [name for unit in units for name in unit.layers] == layers
        found = [name for unit in units for name in unit.quantizers]
        assert sorted(found) == sorted(quantizers)
        if granularity == "block":
            assert [len(unit.layers) for unit in units] == BLOCKS[spec]
            assert all(len(unit.inputs) == 1 for unit in units)
        # Each unit reads only outputs of earlier units; the last one gives the student's output.
        first = {name for unit in units for name in unit.inputs} - {u.output for u in units}
        made = dict(zip(sorted(first), values_of(student, sorted(first))(images), strict=True))
        if granularity != "layer":
            assert len(first) == 1, "only the images are external inputs"
        for unit in units:
            made[unit.output] = unit.of(student)(*(made[name] for name in unit.inputs))
        assert torch.equal(made[units[-1].output], student(images))


def test_the_paper_s_networks_are_tested():
    assert set(NETWORKS.values()) <= set(BLOCKS)


@torch.no_grad()
def test_float_copy_computes_what_the_teacher_computes():
    task = problem()
    student = task.student()
    calibrate(student, task.images)
    reference = float_copy(student)
    torch.testing.assert_close(reference(task.images), task.teacher(task.images))
    assert not torch.equal(student(task.images), reference(task.images))


@torch.no_grad()
def test_a_frontier_runs_every_layer_once_and_frees_unneeded_tensors():
    task = replace(problem(), teacher=load("torchvision:shufflenet_v2_x0_5"))
    size = task.images.shape[1:]  # the student is prepared for this size
    images = torch.randn(40, *size, generator=torch.Generator().manual_seed(1))
    student = task.student()
    calibrate(student, images)
    units = partition(student, "layer", images[:1], quantize="input")
    stops = [(unit.output, *unit.inputs) for unit in units]
    layers = [name for unit in units for name in unit.layers]
    seen = Counter()
    for name in layers:
        student.get_submodule(name).register_forward_hook(
            lambda layer, x, y, name=name: seen.update({name: len(x[0])})
        )
    frontier = Frontier(student, stops, images, 2**30)
    walked, held = [], []
    for index in range(len(stops)):
        walked.append(frontier.at(index))
        held.append(len(frontier.known))
    assert seen == dict.fromkeys(layers, len(images))
    assert max(held) <= 6, "the image, a unit's output and inputs, and an open branch"
    for index in (0, 5, 30, len(stops) - 1):
        whole = [values_of(student, stops[index])(batch) for batch in images.split(BATCH)]
        for cache, values in zip(walked[index], zip(*whole, strict=True), strict=True):
            found = torch.cat(list(cache.split(BATCH)))
            torch.testing.assert_close(found, torch.cat(values), rtol=1e-4, atol=1e-5)
    # Going back to a stop, or directly to it, is bit-identical.
    for again in (frontier, Frontier(student, stops, images, 2**30)):
        for first, second in zip(walked[20], again.at(20), strict=True):
            assert torch.equal(first.rows, second.rows)


def test_a_full_disk_is_reported(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    room = f"1 MiB of free disk space in {tmp_path} .*No space left"
    with pytest.raises(UsageError, match=room):
        collect(lambda x: (x,), [torch.zeros(4, 256, 16, 16)], 0)


def test_caches_on_disk_hold_the_same_values(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    images = torch.randn(70, 3, 4, 5)
    chosen = torch.tensor([69, 0, 31, 32])
    for limit in (2**20, 0):
        first, second = collect(lambda x: (x * 2, x.flatten(1)), [images], limit)
        assert torch.equal(first.read(chosen), images[chosen] * 2)
        assert first.read(chosen).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(second.read(chosen), images[chosen].flatten(1))
    assert not list(tmp_path.iterdir()), "the file has no name in the folder"


# ---- rounding -------------------------------------------------------------------------------


def layer(rows: int = 3, columns: int = 7, bits: int = 3, **config) -> QuantizedLinear:
    torch.manual_seed(0)
    quantization = QuantizationConfig(weight_range="lp", **config)
    return QuantizedLinear.from_float(nn.Linear(columns, rows), bits, quantization)


@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_soft_weight_starts_as_the_float_weight(grid):
    plain = layer(grid=grid)
    soft = SoftlyRounded(plain)
    position = plain.weight_quantizer.position(plain.weight)
    grid_ = plain.weight_quantizer.grid
    inside = (position >= grid_.quant_min) & (position <= grid_.quant_max)
    assert 0 < inside.sum() < inside.numel(), "some weights are inside and some outside"
    found = soft.weight(soft.share_up())
    torch.testing.assert_close(found[inside], plain.weight[inside])
    x = torch.randn(5, 7)
    torch.testing.assert_close(soft(x), F.linear(x, found, plain.bias))


def test_softly_rounded_units_compute_the_same_with_and_without_gradients():
    """Exact layers include their normalisation, and the soft layers in their place must too."""
    task = problem_of_small_network(weight_bits=8)
    student = task.student().requires_grad_(False)
    calibrate(student, task.images)
    units = partition(student, "block", task.images[:1])
    values = Frontier(student, [unit.inputs for unit in units], task.images, 2**20)
    exact = 0
    for stop, unit in enumerate(units):
        inputs = [cache.read(torch.arange(len(task.images))) for cache in values.at(stop)]
        function = unit.of(student)
        soft = soften_(function, unit.layers)
        for name in unit.quantizers:
            function.get_submodule(name).mode = "float"
        with torch.no_grad():
            exact += sum(s.layer.norm is not None and s.layer.is_exact() for s in soft)
            found = function(*inputs)
        torch.testing.assert_close(found, function(*inputs).detach(), rtol=1e-4, atol=1e-4)
        for name in unit.quantizers:
            function.get_submodule(name).mode = "quantize"
    assert exact > 1, "some units begin with an exact layer and its normalisation"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_mean_inputs_equal_sums_over_windows(groups, bias):
    convolution = nn.Conv2d(6, 12, (3, 2), 2, (1, 0), 2, groups, bias, "reflect")
    linear = nn.Linear(12, 3, bias)
    network = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    images = torch.randn(5, 6, 9, 8)
    found = mean_inputs(network, ["0", "3"], [images])
    padded = F.pad(images, (0, 0, 1, 1), mode="reflect")
    windows = F.unfold(padded, (3, 2), dilation=2, stride=2).mean((0, 2)).view(groups, -1, 3, 2)
    expected = windows.repeat_interleave(12 // groups, 0)
    torch.testing.assert_close(found["0"], expected)
    pooled = network[:3](images).mean(0).detach()
    torch.testing.assert_close(found["3"], pooled.expand(3, -1))


@pytest.mark.parametrize("normalised", [False, True])
def test_with_means_no_rounding_changes_the_mean_of_the_output(normalised):
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(6, 8, 3, bias=not normalised)]
    if normalised:
        norm = nn.BatchNorm2d(8)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.weight, 0.5, 2)
        layers.append(norm)
    images = torch.randn(16, 6, 9, 9) + 3
    config = QuantizationConfig(weight_range="minmax")  # clips no weight
    student = prepare(nn.Sequential(*layers).eval(), config, images)
    student.requires_grad_(False)
    reference = float_copy(student)
    expected = reference(images)
    means = mean_inputs(reference, ["0"], [images])
    plain = SoftlyRounded(student.get_submodule("0"))
    soft = SoftlyRounded(student.get_submodule("0"), means["0"])
    torch.testing.assert_close(soft(images), plain(images), rtol=1e-4, atol=1e-4)
    for one in (plain, soft):
        nn.init.normal_(one.alpha, generator=torch.Generator().manual_seed(1))
    after = student.get_submodule("1") if normalised else nn.Identity()

    def error(values: Tensor) -> Tensor:
        return (values - expected).mean((0, 2, 3)).abs()

    assert error(after(soft(images))).max() < 1e-4
    assert error(after(plain(images))).min() > 1e-3, "without means, the mean changes"
    soft.bake()
    assert error(student(images)).max() < 1e-4


@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_hard_rounding_is_up_or_down_and_does_not_change_when_repeated(grid):
    plain = layer(grid=grid)
    soft = SoftlyRounded(plain)
    nn.init.normal_(soft.alpha)
    quantizer = plain.weight_quantizer
    low, high = quantizer.grid.quant_min, quantizer.grid.quant_max
    floor = quantizer.position(plain.weight).floor()
    expected = (floor + (soft.alpha >= 0)).clamp(low, high).detach()
    soft.bake()
    assert torch.equal(quantizer.codes(plain.weight), expected)
    torch.testing.assert_close(quantizer(plain.weight), quantizer.values(expected))


def test_regulariser_and_its_schedule_equal_their_formulas():
    soft = SoftlyRounded(layer())
    h = (soft.alpha.sigmoid() * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(soft.regulariser(7.0), (1 - (2 * h - 1).abs() ** 7).sum())
    config = RoundingConfig()
    assert [config.beta(p) for p in (0.0, 0.19, 0.2, 0.6, 1.0)] == [None, None, 20, 11, 2]


def rounding_beside_a_search(
    plain: QuantizedLinear, x: Tensor, weight: float
) -> tuple[float, float, float, float]:
    """Return errors of the best, the learned and the nearest rounding, and the decided share."""
    target = F.linear(x, plain.weight, plain.bias).detach()
    quantizer = plain.weight_quantizer
    floor = quantizer.position(plain.weight).floor()

    @torch.no_grad()
    def error(codes):
        weight = quantizer.values(codes.clamp(quantizer.quant_min, quantizer.quant_max))
        return float((F.linear(x, weight, plain.bias) - target).square().mean())

    ups = itertools.product((0.0, 1.0), repeat=plain.in_features)
    best = min(error(floor + torch.tensor([up])) for up in ups)
    nearest = error(quantizer.codes(plain.weight))
    function = torch.fx.symbolic_trace(nn.Sequential(nn.Identity()))
    soft = SoftlyRounded(plain)
    function.set_submodule("0", soft)
    (inputs,), (targets,) = (collect(lambda t: (t,), [t], 2**20) for t in (x, target))
    reconstruction = Reconstruction(
        function,
        Data([inputs], targets),
        output_error,
        [torch.optim.Adam([soft.alpha], lr=0.03)],
        steps=600,
        batch=64,
        random=torch.Generator().manual_seed(0),
        rounding=RoundingConfig(weight=weight),
    )
    for step in range(reconstruction.steps):
        metrics = reconstruction.step(step)
    reconstruction.finish()
    return best, error(quantizer.codes(plain.weight)), nearest, float(metrics["decided"])


def test_learned_rounding_is_as_good_as_exhaustive_search():
    plain = layer(rows=1, columns=9, bits=2)
    torch.manual_seed(0)
    x = torch.randn(64, 9) @ torch.randn(9, 9) / 3  # correlated inputs: nearest is not best
    best, found, nearest, decided = rounding_beside_a_search(plain, x, 0.01)
    assert decided == 1
    assert best <= found <= 1.02 * best < nearest


def test_learned_rounding_is_as_good_as_exhaustive_search_for_most_seeds():
    errors = []
    for seed in range(12):
        torch.manual_seed(seed)
        config = QuantizationConfig(weight_range="lp")
        plain = QuantizedLinear.from_float(nn.Linear(9, 1), 2, config)
        x = torch.randn(64, 9) + torch.randn(64, 1)  # correlated inputs
        errors.append(rounding_beside_a_search(plain, x, 0.1)[:3])
    assert all(best <= found * 1.0001 for best, found, _ in errors)
    as_good = sum(found <= 1.02 * best for best, found, _ in errors)
    assert as_good >= 10, "AdaRound may end in a local minimum"
    assert sum(nearest <= 1.02 * best for best, _, nearest in errors) <= 6, (
        "nearest rounding is worse"
    )


#: Methods that train one unit after the other, layers or blocks.
WAYS = [
    ("brecq", {}),
    ("brecq", {"granularity": "layer"}),
    ("qdrop", {}),
    ("qdrop", {"granularity": "layer"}),
    ("adaquant", {}),
]


@pytest.mark.parametrize(("name", "changes"), WAYS)
@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_units_of_a_branched_network_read_inputs_of_the_final_student(name, changes, grid):
    task = problem_of_small_network(grid=grid)
    method = build_method(name, task, tiny(**changes))
    read = []
    for iteration in range(len(method.units) * 4):
        method.step(iteration)
        if iteration % 4 == 0:
            read.append([torch.cat(list(cache.split(4))) for cache in method.current.data.inputs])
    with activations_in_float(method.student) if name == "brecq" else nullcontext():
        for unit, found in zip(method.units, read, strict=True):
            with torch.no_grad():
                expected = values_of(method.student, unit.inputs)(task.images)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_caches_in_files_do_not_change_results(name):
    task = problem_of_small_network()
    methods = [build_method(name, task, tiny(cache_megabytes=size)) for size in (4096, 0)]
    assert run(methods[0]) == run(methods[1])


def test_an_unused_argument_does_not_matter():
    class Network(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            return self.network(x)

    task = problem()
    for name in (*NAMES, "bitsplit"):
        whole = build_method(name, replace(task, teacher=Network(task.teacher)), tiny())
        assert run(whole) == run(build_method(name, task, tiny()))


# ---- losses ---------------------------------------------------------------------------------


def test_output_error_is_a_sum_over_channels():
    torch.manual_seed(0)
    a, b, w = (torch.rand(2, 3, 4, 5) for _ in range(3))
    expected = (w * (a - b).abs() ** 2.4).sum() / (2 * 4 * 5)
    torch.testing.assert_close(output_error(a, b, w, 2.4), expected)
    a, b = a[:, :, 0, 0], b[:, :, 0, 0]
    torch.testing.assert_close(output_error(a, b), 3 * F.mse_loss(a, b))


def first_step(name: str, **changes):
    """Run one step of a method on all images in one batch. Return the method and the metrics."""
    method = build_method(name, problem(), tiny(batch=CLASSES, **changes))
    return method, method.step(0)


def test_brecq_objective_equals_its_formula():
    method, metrics = first_step("brecq")
    images = method.problem.images
    (target,) = values_of(method.reference, [method.units[0].output])(images)
    network = method.problem.teacher[:3]
    torch.testing.assert_close(target, network(images))
    # Activations and soft weights are in float at first, so only clipped weights differ.
    plain = method.student.get_submodule("0")
    scale = plain.weight_quantizer.scale.view(-1, 1, 1, 1)
    quantizer = plain.weight_quantizer
    weight = plain.weight.clamp(scale * quantizer.quant_min, scale * quantizer.quant_max)
    made = F.relu(network[1](F.conv2d(images, weight, padding=1)))
    expected = (made - target).square().sum(1).mean()
    torch.testing.assert_close(metrics["reconstruction"], expected, rtol=1e-3, atol=1e-6)
    assert float(metrics["regulariser"]) == 0, "the regulariser is off in the warm-up"
    assert float(method.step(1)["regulariser"]) > 0


def test_fisher_weights_are_squared_gradients_of_the_divergence():
    method, _ = first_step("brecq", objective="fisher")
    images, teacher = method.problem.images, method.problem.teacher
    plain, norm = method.student.get_submodule("0"), teacher[1]
    with torch.no_grad():
        output = F.relu(norm(F.conv2d(images, plain.weight_quantizer(plain.weight), padding=1)))
    output.requires_grad_()
    p, q = teacher(images).softmax(1), teacher[3:](output).softmax(1)
    (p * (p.log() - q.log())).sum().backward()
    expected = output.grad.square()
    found = method.current.data.weights.read(torch.arange(CLASSES))
    torch.testing.assert_close(found, expected / expected.mean(), rtol=1e-2, atol=1e-2)


def test_brecq_second_stage_trains_only_activation_scales():
    method = build_method("brecq", problem(), tiny(batch=CLASSES))
    stage = 4 * len(method.units)
    assert method.iterations == stage + 3 * sum(bool(unit.quantizers) for unit in method.units)
    run(method, end=stage + 3)
    weights = {n: p.clone() for n, p in method.student.named_parameters() if "weight" in n}
    metrics = method.step(stage + 3)
    unit = method.units[1]
    inputs = values_of(method.reference, unit.inputs)(method.problem.images)
    (target,) = values_of(method.reference, [unit.output])(method.problem.images)
    fresh = build_method("brecq", problem(), tiny(batch=CLASSES))
    run(fresh, end=stage + 3)
    fresh._start(fresh.tasks.index(("scales", fresh.units[1], 3)))
    made = fresh.units[1].of(fresh.student)(*inputs)
    expected = ((made - target).abs() ** 2.4).sum(1).mean()
    torch.testing.assert_close(metrics["reconstruction"], expected, rtol=1e-3, atol=1e-5)
    scale = method.student.get_submodule(unit.quantizers[0]).scale
    assert not torch.equal(scale, fresh.student.get_submodule(unit.quantizers[0]).scale)
    for name, weight in weights.items():
        assert torch.equal(weight, method.student.get_parameter(name)), name


def test_qdrop_drops_elements_at_random():
    task = problem()
    student = task.student()
    calibrate(student, task.images)
    quantizer = next(student.activation_quantizers.children())
    x = torch.randn(8, 3, 16, 16, requires_grad=True)
    quantized = quantizer(x)
    assert torch.equal(Dropped(quantizer, 1.0, task.random())(x), quantized)
    assert torch.equal(Dropped(quantizer, 0.0, task.random())(x), x)
    found = Dropped(quantizer, 0.5, task.random())(x)
    kept, changed = found == x, found == quantized
    assert bool((kept | changed).all())
    assert 0.45 < changed.float().mean() < 0.55
    assert torch.equal(found, Dropped(quantizer, 0.5, task.random())(x))
    rarely = Dropped(quantizer, 0.1, task.random())(x)
    assert 0.08 < (rarely != x).float().mean() < 0.12
    found.sum().backward()
    assert quantizer.scale.grad is not None and quantizer.scale.grad.abs() > 0


@pytest.mark.parametrize("shape", [(0, 3), (5,), (3, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded"])
def test_mixed_tensors_and_their_gradients_are_of_one_of_both(shape, layout):
    def laid_out(x: torch.Tensor) -> torch.Tensor:
        if layout == "channels_last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return x.movedim(0, -1).contiguous().movedim(-1, 0)
        return x[:1].expand_as(x) if layout == "expanded" and len(x) else x

    random = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    first, second = map(laid_out, leaves)
    found = mixed(first, second, 0.5, random)
    from_first = found == first
    assert torch.equal(found, torch.where(from_first, first, second))
    by_first, by_second = torch.autograd.grad(found.sum(), [first, second])
    assert torch.equal(by_first, from_first.float())
    assert torch.equal(by_second, 1 - from_first.float())


def test_qdrop_without_dropping_is_joint_reconstruction():
    method = build_method("qdrop", problem(), tiny(batch=CLASSES, probability=1.0))
    run(method, end=4)
    metrics = method.step(4)
    unit, images = method.units[1], method.problem.images
    with torch.no_grad():
        (x,) = values_of(method.student, unit.inputs)(images)
        (target,) = values_of(method.reference, [unit.output])(images)
    fresh = build_method("qdrop", problem(), tiny(batch=CLASSES, probability=1.0))
    run(fresh, end=4)
    expected = output_error(fresh._start(1).function(x), target)
    torch.testing.assert_close(metrics["reconstruction"], expected.detach())
    half = build_method("qdrop", problem(), tiny(batch=CLASSES))
    run(half, end=4)
    assert not torch.equal(half.step(4)["reconstruction"], metrics["reconstruction"])


@pytest.mark.parametrize("relu_loss", [True, False])
def test_adaquant_objective_equals_its_formula(relu_loss):
    method, metrics = first_step("adaquant", relu_loss=relu_loss, held_out=0.0)
    fresh = build_method("adaquant", problem(), tiny(held_out=0.0))
    images, teacher = method.problem.images, method.problem.teacher
    fresh._start(0)
    x = next(fresh.student.activation_quantizers.children())(images)
    plain = fresh.student.get_submodule("0")
    weight = plain.weight_quantizer(plain.weight)
    pairs = (x, weight), (images, teacher[0].weight)
    sides = [teacher[1](F.conv2d(y, w, padding=1)) for y, w in pairs]
    if relu_loss:
        sides = [side.relu() for side in sides]
    torch.testing.assert_close(metrics["reconstruction"], F.mse_loss(*sides), rtol=1e-3, atol=1e-6)


def test_adaquant_keeps_the_best_state_on_held_out_images():
    method = build_method("adaquant", problem(), tiny(lr=10.0, steps=10, held_out=0.5))
    before = method.student.get_submodule("0").weight.clone()
    run(method, end=10)
    assert torch.equal(method.student.get_submodule("0").weight, before), (
        "the best state is restored"
    )
    gentle = build_method("adaquant", problem(weight_bits=2), tiny(steps=40, held_out=0.2))
    run(gentle, end=41)  # for white noise, nearest rounding of the first layer is best
    current, first = gentle.current, gentle.current.best_error
    run(gentle, 41, 80)
    assert current.best_error < 0.9 * first


@pytest.mark.parametrize("sequential", [True, False])
def test_adaquant_inputs_come_from_the_student_or_from_the_teacher(sequential):
    method = build_method("adaquant", problem(), tiny(sequential=sequential))
    run(method, end=5)
    source = method.student if sequential else method.reference
    (expected,) = values_of(source, method.units[1].inputs)(method.problem.images)
    found = method.current.data.inputs[0].read(torch.arange(CLASSES))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_relative_adam_changes_parameters_by_a_factor():
    small, large = (nn.Parameter(torch.tensor(v)) for v in (1e-3, 1e3))
    optimizer = RelativeAdam([small, large], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (small * 5 - large).backward()
        optimizer.step()
    for parameter, expected in ((small, 1e-3 * math.exp(-0.3)), (large, 1e3 * math.exp(0.3))):
        assert parameter.item() == pytest.approx(expected, rel=2e-3)


def test_bn_tuning_uses_statistics_of_the_quantized_network():
    task = problem(weight_bits=2)
    method = build_method("adaquant", task, tiny(bn_tuning=True, steps=20, held_out=0.0))
    student = method.student
    norms = {name: student.get_submodule(name) for name in ("1", "4")}
    run(method, end=method.iterations - 1)
    for name, norm in norms.items():
        assert not torch.equal(norm.bias, task.teacher.get_submodule(name).bias), (
            "the shift was trained"
        )
    run(method, begin=method.iterations - 1)
    seen = {}

    def look(norm, inputs, output):
        seen[norm] = (inputs[0], output)

    handles = [norm.register_forward_hook(look) for norm in norms.values()]
    student(task.images)
    for handle in handles:
        handle.remove()
    for name, norm in norms.items():
        x, y = seen[norm]
        variance, mean = torch.var_mean(x, (0, 2, 3))
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-3, atol=1e-4)
        # With the measured mean, the mean output is the teacher's shift, not the learned one.
        expected = task.teacher.get_submodule(name).bias
        torch.testing.assert_close(y.mean((0, 2, 3)), expected, rtol=1e-3, atol=1e-3)
    before = norms["4"].running_mean.clone()
    norms["4"].running_mean.add_(3)
    retune_norms(student, method.reference, task.images)
    torch.testing.assert_close(norms["4"].running_mean, before)


def test_held_out_images_are_random_and_not_used_for_training(monkeypatch):
    method = build_method("adaquant", problem(), tiny(held_out=0.4, steps=30, batch=2))
    kept = set(method.held_out.tolist())
    assert len(kept) == round(0.4 * CLASSES)
    assert kept != set(range(CLASSES - len(kept), CLASSES)), "images are sorted by class"
    method.step(0)
    read = []
    error = method.current._error
    monkeypatch.setattr(method.current, "_error", lambda i: read.append(i.tolist()) or error(i))
    for step in range(1, 30):
        method.step(step)
    judging = [i for batch in read for i in batch if i in kept]
    learning = [batch for batch in read if not kept & set(batch)]
    assert len(learning) == 29 and {i for batch in learning for i in batch} | kept == set(
        range(CLASSES)
    )
    assert len(judging) == 10 * len(kept), "held-out images are read after each tenth of the steps"


def test_ranges_at_eight_bits_move_by_the_learning_rate():
    """Check Adam's eps, since LSQ's factor makes these gradients very small."""
    rate = 1e-3
    task = problem(weight_bits=8, activation_bits=8)
    method = build_method("adaquant", task, tiny(weight_range_lr=rate, held_out=0.0, steps=2))
    scale = method.student.get_submodule("0").weight_quantizer.scale
    before = scale.detach().clone()
    method.step(0)
    moved = (scale.detach() / before).log().abs()
    torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=0.05, atol=0)


@pytest.mark.parametrize("changes", [{"scale_steps": 0}, {}])
@pytest.mark.parametrize("grid", ["deploy", "paper"])
def test_final_ranges_belong_to_the_final_weights(grid, changes):
    task = problem(grid=grid, weight_bits=2, weight_range="lp", activation_range="minmax")
    rounding = RoundingConfig(lr=0.1, weight=1.0)
    settings = tiny(steps=60, rounding=rounding, scale_lr=1e-9, **changes)
    method = build_method("brecq", task, settings)
    run(method)
    for unit in method.units:
        inputs = values_of(method.reference, unit.inputs)(task.images)
        quantizers = method.quantizers(unit)
        found = [copy.deepcopy(quantizer.state_dict()) for quantizer in quantizers]
        with torch.no_grad(), collecting(quantizers):
            unit.of(method.student)(*inputs)
        for before, quantizer in zip(found, quantizers, strict=True):
            for key, value in quantizer.state_dict().items():
                torch.testing.assert_close(before[key], value, rtol=1e-3, atol=1e-5)


# ---- methods --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "grid", "changes"),
    [
        *((name, grid, {}) for name in NAMES for grid in ("deploy", "paper")),
        ("brecq", "deploy", {"objective": "fisher", "average_bits": 4.0}),
        ("qdrop", "deploy", {"granularity": "layer"}),
        ("adaquant", "deploy", {"bn_tuning": True, "average_bits": 6.0, "relu_loss": False}),
        ("adaquant", "deploy", {"sequential": False}),
    ],
)
def test_state_resumes_exactly_and_the_student_is_a_program(name, grid, changes):
    task = problem(grid=grid, weight_range="lp")

    def build():
        return build_method(name, task, tiny(**changes))

    whole = build()
    run(whole)
    halves, resumed = build(), build()
    half = whole.iterations - 2  # inside a unit
    run(halves, end=half)
    resumed.load_state_dict(halves.state_dict())
    run(resumed, begin=half)
    for key, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[key]), key
    if grid == "deploy":
        with torch.no_grad():
            assert torch.equal(lower(whole.student)(task.images), whole.student(task.images))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stopped_between_units_or_inside_a_unit_resumes(name):
    task = problem_of_small_network()
    whole = build_method(name, task, tiny())
    run(whole)
    for half in (4, 13):
        halves, resumed = (build_method(name, task, tiny()) for _ in range(2))
        run(halves, end=half)
        resumed.load_state_dict(halves.state_dict())
        run(resumed, begin=half)
        assert resumed.progress == whole.progress and len(whole.progress) == len(whole.tasks)
        for key, tensor in whole.student.state_dict().items():
            assert torch.equal(tensor, resumed.student.state_dict()[key]), key


def test_qdrop_plus_is_qdrop_with_a_preset_of_its_own(tmp_path):
    plus, _ = train.parse_arguments(["--method=qdrop_plus"])
    plain, _ = train.parse_arguments(["--method=qdrop"])
    assert plus.settings.qdrop.keep_means and not plain.settings.qdrop.keep_means
    assert plus.augmented_images == 1024 and plain.augmented_images is None
    preset = ROOT / "fdda_ext" / "presets" / "qdrop_plus" / "short.yaml"
    for name, options in (("qdrop_plus", []), ("qdrop", [f"--config={preset}"])):
        train.main(
            [f"--method={name}", *options, "--settings.qdrop.steps=1", "--augmented_images=142"]
            + ["--baselines=[]", "--no_report", "--test_limit=71", f"--out={tmp_path / name}"]
        )
    students = [
        load_file(tmp_path / name / "student.safetensors") for name in ("qdrop_plus", "qdrop")
    ]
    assert all(torch.equal(x, students[1][key]) for key, x in students[0].items())
    # Views are not real images.
    assert json.loads((tmp_path / "qdrop" / "summary.json").read_text())["real_images"] == 71


@pytest.mark.parametrize("name", NAMES)
def test_labels_do_not_matter_and_errors_fall(name):
    task = problem(right=True, weight_bits=2, weight_range="lp")
    other = replace(task, labels=task.labels.flip(0))
    settings = tiny(steps=60, rounding=RoundingConfig(lr=0.05), lr=3e-3)
    methods = [build_method(name, p, settings) for p in (task, other)]
    target = task.teacher(task.images)
    with torch.no_grad():
        before = F.mse_loss(methods[0].student(task.images), target)
    for method in methods:
        run(method)
    with torch.no_grad():
        assert F.mse_loss(methods[0].student(task.images), target) < 0.7 * before
    for key, tensor in methods[0].student.state_dict().items():
        assert torch.equal(tensor, methods[1].student.state_dict()[key]), key


@pytest.mark.parametrize("name", ["brecq", "qdrop"])
def test_all_roundings_are_decided_at_the_end(name):
    rounding = RoundingConfig(lr=0.05, weight=1.0)
    method = build_method(name, problem(), tiny(steps=300, scale_steps=0, rounding=rounding))
    metrics = run(method)
    for index in range(len(method.units)):
        assert float(metrics[300 * index]["decided"]) < 0.5
        assert float(metrics[300 * index + 299]["decided"]) >= 0.999
        assert method.progress[index]["decided"] >= 0.999
        assert method.progress[index]["first"] == float(metrics[300 * index]["reconstruction"])


def test_first_and_last_layer_at_eight_bits_are_reconstructed_too():
    method = build_method("brecq", problem(first_last_bits=8), tiny())
    run(method)
    assert [row.weight_bits for row in bits_table(method.student)] == [8, 4, 8]
    for row in bits_table(method.student):
        plain = method.student.get_submodule(row.name)
        quantizer = plain.weight_quantizer
        assert torch.equal(quantizer.values(quantizer.codes(plain.weight)), plain.weight)


def test_average_bits_are_given_to_the_layers_that_need_them():
    task = problem(first_last_bits=8)
    student, images = task.student(), task.images
    costs = prediction_costs(student, task.quantization, images, {"3": (2, 8), "8": (4,)})
    plain = student.get_submodule("3")
    quantizer = build_weight_quantizer(plain.weight, 2, task.quantization)
    rounded = copy.deepcopy(task.teacher)
    rounded[3].weight.data = quantizer(plain.weight).detach()
    with torch.no_grad():
        p, q = task.teacher(images).softmax(1), rounded(images).softmax(1)
        expected = (p * (p.log() - q.log())).sum(1).mean()
    assert costs["3"][2] == pytest.approx(float(expected), rel=1e-3)
    assert 0 < costs["3"][8] < costs["3"][2] and set(costs["8"]) == {4}
    for average, middle in ((7.0, 4), (8.0, 8), (3.6, 2)):
        method = build_method("adaquant", task, tiny(average_bits=average))
        assert [row.weight_bits for row in bits_table(method.student)] == [8, middle, 8]
        assert method.quantization.layer_bits["3"] == middle
    run(method)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BRECQConfig(average_bits=1.0), "average_bits between 2 and 8, got 1.0"),
        (lambda: BRECQConfig(steps=0), "brecq: expected steps at least 1"),
        (lambda: BRECQConfig(granularity="stage"), "granularity to be one of layer, block"),
        (lambda: BRECQConfig(objective="kl"), "objective to be one of mse, fisher, got kl"),
        (lambda: QDropConfig(probability=2.0), "qdrop: expected probability between 0 and 1"),
        (lambda: QDropConfig(scale_lr=0.0), "qdrop: expected scale_lr above 0 and finite, got 0"),
        (lambda: AdaQuantConfig(lr=float("nan")), "adaquant: expected lr above 0 and finite"),
        (lambda: AdaQuantConfig(held_out=1.0), "adaquant: expected held_out"),
        (lambda: RoundingConfig(warmup=1.0), "rounding: expected warmup"),
        (lambda: RoundingConfig(last_beta=30.0), "rounding: expected last_beta"),
        (
            lambda: build_method("brecq", problem(grid="paper", weight_range="minmax"), tiny()),
            "weight_range other than minmax with grid paper",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["paper", "short"])
def test_presets_set_everything_and_scale(name, preset):
    config, _ = train.parse_arguments([f"--method={name}", f"--preset={preset}"])
    section = getattr(config.settings, name)
    file = ROOT / "fdda_ext" / "presets" / name / f"{preset}.yaml"
    assert set(yaml.safe_load(file.read_text())["settings"][name]) == {
        field.name for field in fields(section)
    }
    assert getattr(config.settings.scaled(0.01), name).steps == round(section.steps * 0.01)
    if preset == "paper":
        assert section == type(section)()


def test_train_runs_qdrop(tmp_path):
    out = tmp_path / "run"
    train.main(
        [
            *("--method=qdrop", "--baselines=[]", "--threads=1", "--test_limit=71"),
            *("--settings.qdrop.steps=2", f"--out={out}"),
        ]
    )
    units = json.loads((out / "units.json").read_text())
    assert [unit["steps"] for unit in units] == [2] * 6
    page = (out / "report.html").read_text()
    assert all(f"{unit['last']:.4g}" in page for unit in units)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["name"], summary["iterations"]) == ("qdrop", 12)
