"""Forms of networks: computed sizes, branches, arguments, layers that are called twice."""

import copy
import importlib
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from fdda_ext._torchvision import import_torchvision
from fdda_ext.commands import train
from fdda_ext.data import Augmentation
from fdda_ext.deploy import lower
from fdda_ext.errors import UsageError
from fdda_ext.methods import METHODS, Problem, build_method
from fdda_ext.quantization import (
    QuantizationConfig,
    any_memory_format,
    bits_table,
    calibrate,
    prepare,
    render_bits,
)
from fdda_ext.quantization.operations import describe
from fdda_ext.quantization.tracing import trace

SIZE = 16


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A normalised convolution, a `head` from ``[N, 8, 16, 16]`` to features, and `fc`."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(features, 10)

    def forward(self, x):
        return self.fc(self.head(F.relu(self.bn(self.conv(x)))))


def of(head, features: int = 8) -> nn.Module:
    """Build a network with this head, in evaluation mode."""
    torch.manual_seed(0)
    network = type("Network", (Network,), {"head": head})(features)
    with torch.no_grad():
        for parameter in (network.bn.weight, network.bn.bias):
            parameter.uniform_(0.5, 1.5)
    return network.eval()


def window_from_size(self, x):
    x = F.avg_pool2d(x, x.size()[3])
    return x.view(x.size(0), -1)


def window_from_shape(self, x):
    return F.avg_pool2d(x, kernel_size=x.shape[2:]).flatten(1)


def shape_unpacked(self, x):
    b, c, h, w = x.shape
    return x.reshape(b, c, h * w).mean(-1)


def two_means(self, x):
    return x.mean(-1).mean(-1)


def two_means_from_the_front(self, x):
    return torch.mean(torch.mean(x, dim=2), dim=2)


def two_means_with_dimensions(self, x):
    return x.mean(2, keepdim=True).mean(3, keepdim=True).flatten(1)


def squeeze_without_dimension(self, x):
    return F.adaptive_avg_pool2d(x, 1).squeeze()


def squeezes(self, x):
    return F.adaptive_avg_pool2d(x, (1, 1)).squeeze(-1).squeeze(-1)


def element(self, x):
    return F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]


def branch_on_a_size(self, x):
    if x.shape[-1] > 7:
        x = F.adaptive_avg_pool2d(x, x.shape[-1] // 2)
    assert isinstance(x, torch.Tensor)
    assert x.dim() == 4
    x = F.relu(x)
    return F.avg_pool2d(x, int(x.size(-1))).view(len(x), x.size(1))


def fixed_size(self, x):
    x = F.max_pool2d(x, 4)
    return x.view(-1, 8 * 4 * 4)


def counted_features(self, x):
    x = F.max_pool2d(x, 4)
    features = 1
    for size in x.size()[1:]:
        features *= size
    return x.view(-1, features)


def keyword_arguments(self, x):
    return torch.flatten(input=F.avg_pool2d(input=x, kernel_size=16), start_dim=1)


def sum_of_a_list(self, x):
    branches = {"a": self.conv2(x), "b": x}
    return F.relu(sum(branches.values())).mean([2, 3])


def list_of_chunks(self, x):
    first, *others = torch.chunk(x, 4, dim=1)
    return torch.cat([first, *others[::-1]], 1).mean([2, 3])


def zeros_of_the_batch(self, x):
    zeros = torch.zeros(x.size(0), 4, SIZE, SIZE, device=x.device)
    return torch.cat([x[:, :4], x.new_zeros(x.shape[0], 4, SIZE, SIZE) + zeros], 1).mean([2, 3])


def resized(self, x):
    return F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:]).mean([2, 3])


# Heads, their number of features, and whether they can be exported.
HEADS = [
    (window_from_size, 8, True),
    (window_from_shape, 8, True),
    (shape_unpacked, 8, True),
    (two_means, 8, True),
    (two_means_from_the_front, 8, True),
    (two_means_with_dimensions, 8, True),
    (squeeze_without_dimension, 8, True),
    (squeezes, 8, True),
    (element, 8, True),
    (branch_on_a_size, 8, True),
    (fixed_size, 128, True),
    (counted_features, 128, True),
    (keyword_arguments, 8, True),
    (sum_of_a_list, 8, True),
    (list_of_chunks, 8, False),
    (zeros_of_the_batch, 8, False),
    (resized, 8, False),
]


@torch.no_grad()
@pytest.mark.parametrize(("head", "features", "exported"), HEADS)
def test_student_takes_any_batch_size(head, features, exported):
    network, x = of(head, features), images()
    student = prepare(network, QuantizationConfig(weight_bits=8, activation_bits=8), x[:1])
    calibrate(student, x)
    logits = student(x)
    expected = network(x)
    assert (logits - expected).norm() < 0.05 * expected.norm()
    for count in (1, 2, 3):
        assert torch.equal(student(x[:count]), logits[:count])
    assert bits_table(student)
    if exported:
        program = lower(student)
        assert torch.equal(program(x), logits)
        assert torch.equal(program(x[:1]), logits[:1])


def test_only_sizes_that_depend_on_the_batch_stay_in_the_graph():
    for head, features, _ in HEADS:
        graph = trace(of(head, features), images(1)).graph
        left = [n for n in graph.nodes if "shape" not in n.meta and n.op != "output"]
        assert bool(left) == (head is zeros_of_the_batch), head.__name__


class Arguments(Network):
    def forward(self, x, mask=None, *others, features=False, **options):
        x = F.relu(self.bn(self.conv(x)))
        if mask is not None:
            x = x * mask
        x = x.mean([2, 3])
        return (self.fc(x), x) if features else self.fc(x)


class StarArguments(Network):
    def forward(self, *inputs):
        return self.fc(F.relu(self.bn(self.conv(inputs[0]))).mean([2, 3]))


@torch.no_grad()
@pytest.mark.parametrize("network", [Arguments(), StarArguments()])
def test_other_arguments_keep_their_defaults(network):
    network.eval()
    torch.testing.assert_close(trace(network, images(1))(images()), network(images()))


@torch.no_grad()
def test_ceil_mode_without_effect_is_removed():
    def head(self, x):
        x = F.avg_pool2d(self.pool(x), 2, ceil_mode=True)
        return self.odd(x).mean([2, 3])

    network = of(head)
    network.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    network.odd = nn.AvgPool2d(3, ceil_mode=True)  # 4x4 to 2x2: ceil_mode matters
    graph = trace(network, images(1))
    torch.testing.assert_close(graph(images()), network(images()))
    modules = dict(graph.named_modules())
    pools = [m for m in modules.values() if isinstance(m, nn.AvgPool2d)]
    assert sorted(pool.ceil_mode for pool in pools) == [False, True]
    (call,) = (n for n in graph.graph.nodes if n.target is F.avg_pool2d)
    assert call.kwargs["ceil_mode"] is False
    assert network.pool.ceil_mode


@torch.no_grad()
def test_views_work_in_any_memory_format():
    network = of(fixed_size, 128)
    expected = network(images())
    assert any_memory_format(of(window_from_size), images()).__class__.__name__ == "Network"
    copied = any_memory_format(network, images())
    x = images().contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size"):
        network(x)
    torch.testing.assert_close(copied(x), expected)
    network.to(memory_format=torch.channels_last)
    student = prepare(network, QuantizationConfig(weight_bits=8, activation_bits=8), x[:1])
    calibrate(student, x)
    assert (student(x) - expected).norm() < 0.05 * expected.norm()


# ---- layers ---------------------------------------------------------------------------------


class Twice(nn.Module):
    """A network that calls a convolution and a normalisation twice, with a BatchNorm1d."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.hidden, self.bn1 = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.bn(self.conv(x)))
        return self.fc(F.relu(self.bn1(self.hidden(x.mean([2, 3])))))


def trained(network: nn.Module) -> nn.Module:
    """Set running statistics from random images."""
    network.train()(images(16))
    return network.eval().requires_grad_(False)


def test_every_call_of_a_layer_becomes_a_separate_layer():
    torch.manual_seed(0)
    network = trained(Twice())
    student = prepare(network, QuantizationConfig(), images(1))
    assert [row.name for row in bits_table(student)] == ["stem", "conv", "conv_2", "hidden", "fc"]
    assert torch.equal(student.conv.weight, student.conv_2.weight)
    assert student.conv.weight is not student.conv_2.weight
    assert torch.equal(student.bn.running_mean, student.bn_2.running_mean)
    inputs = [row.input for row in bits_table(student)]
    assert inputs[1] != inputs[2]
    calibrate(student, images())
    with torch.no_grad():
        assert torch.equal(lower(student)(images()), student(images()))
    assert set(network.state_dict()) <= set(student.state_dict())


def test_layers_that_share_a_weight_get_separate_copies():
    network = nn.Sequential(
        *(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
    )
    network[2].weight = network[0].weight
    graph = trace(network, images(1))
    first, second = graph.get_submodule("0").weight, graph.get_submodule("2").weight
    assert torch.equal(first, second)
    assert first is not second
    assert network[2].weight is network[0].weight


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "compute",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_computed_weights_become_plain_weights(compute, frozen):
    torch.manual_seed(0)
    with torch.enable_grad():
        network = nn.Sequential(
            *(compute(nn.Conv2d(3, 8, 3)), nn.ReLU(), compute(nn.Conv2d(8, 8, 3)), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        ).requires_grad_(not frozen)
    network.eval()
    names = set(network.state_dict())
    graph = trace(network, images(1))
    torch.testing.assert_close(graph(images()), network(images()))
    assert {"0.weight", "0.bias", "2.weight"} <= set(dict(graph.named_parameters()))
    assert set(network.state_dict()) == names
    student = prepare(network, QuantizationConfig(), images(1))
    assert student.get_submodule("0").weight.requires_grad


# ---- messages -------------------------------------------------------------------------------


def test_nodes_are_described_as_the_author_wrote_them():
    network = of(lambda self, x: torch.clamp(x.sigmoid(), 0, 1).mean([2, 3]) * 2)
    network.act = nn.Sequential(nn.SiLU())
    student = prepare(nn.Sequential(network), QuantizationConfig(), images(1))
    student = copy.deepcopy(student)
    modules = dict(student.named_modules())
    said = {node.name: describe(node, modules) for node in student.graph.nodes}
    assert said["_0_conv"] == "0.conv (Conv2d)"
    assert said["activation_quantizers__0_mul"] == said["_0_mul"]
    here = r" in 0 \(Network\), test_graphs.py:\d+"
    for node, what in [("_0_mean", "Tensor.mean"), ("clamp", "torch.clamp"), ("_0_mul", r"\*")]:
        assert re.fullmatch(what + here, said[node]), said[node]
    assert said["input_1"] == "the input input"
    assert said["output"] == "the output"


def branch_on_values(self, x):
    return x.mean([2, 3]) if x.sum() > 0 else x.amax([2, 3])


def branch_on_the_batch(self, x):
    return x.mean([2, 3]) if x.size(0) > 80 else x.amax([2, 3])


def other_for_many_images(self, x):
    return x.amax([2, 3]) if x.size(0) > 32 else x.mean([2, 3])


def number_from_values(self, x):
    return x.mean([2, 3]) * x.max().item()


def sizes_from_values(self, x):
    return x.mean([2, 3])[x.nonzero()[:, 0]]


def written_in_part(self, x):
    x[:, :4] = 0
    return x.mean([2, 3])


def image_by_image(self, x):
    return torch.stack([image.mean([1, 2]) for image in x])


def one_image_only(self, x):
    return x.mean([2, 3]).view(1, 8)


def all_images_together(self, x):
    return x.mean([0, 2, 3], keepdim=False).unsqueeze(0)


PLACE = r"Network, test_graphs.py:\d+"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (branch_on_values, f"got {PLACE}, which branches on the values of a tensor; choose"),
        (branch_on_the_batch, f"got {PLACE}, which branches on the batch size; choose"),
        (other_for_many_images, "got other outputs from Network; it may .*depend on the batch"),
        (number_from_values, f"got {PLACE}, where a number or a size depends on the values"),
        (sizes_from_values, f"got {PLACE}, where a number or a size depends on the values"),
        (written_in_part, f"got {PLACE}, which writes into a part of a tensor; put"),
        (image_by_image, f"got {PLACE}, which takes the batch apart; compute"),
        (one_image_only, r"take several images at a time, got shape '\[1, 8\]' is invalid"),
        (all_images_together, r"one row for each image, got shape \(1, 10\) for 2 images"),
    ],
)
def test_code_that_cannot_be_traced_is_named_with_its_place(head, message):
    with pytest.raises(UsageError, match=message):
        trace(of(head), images(1))


class Doubled(torch.autograd.Function):
    """A function with its own gradient."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@torch.jit.script
def scripted(x):
    return 2 * x


@pytest.mark.parametrize(
    "double",
    [Doubled.apply, lambda x: checkpoint(lambda y: 2 * y, x, use_reentrant=False)],
    ids=["autograd function", "checkpoint"],
)
def test_functions_with_their_own_backward_pass_are_traced(double):
    model = of(lambda self, x: double(x).mean((2, 3)))
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(trace(model, x)(x), model(x))


@pytest.mark.parametrize(
    "double",
    [
        *(torch.autograd.Variable, torch.as_tensor, torch.tensor, torch.asarray, torch.Tensor),
        *(torch.FloatTensor, scripted, lambda x: torch.Tensor._make_subclass(torch.Tensor, x)),
        *(lambda x: setattr(torch.zeros(2), "data", x) or x, nn.Parameter),
        lambda x: torch.zeros(3)[x.long()],
    ],
)
def test_functions_in_c_refuse_the_tensors_of_tracing(double):
    # They must not take them for tensors, and read memory that is not theirs.
    with pytest.raises(UsageError, match="prepare: expected model to"):
        trace(of(lambda self, x: double(x).mean((2, 3))), images())


def test_isinstance_in_helper_modules_sees_tensors(tmp_path, monkeypatch):
    package = tmp_path / "helped"
    package.mkdir()
    (package / "__init__.py").write_text("from .network import Network\n")
    (package / "helper.py").write_text(
        "import torch\n"
        "def joined(x):\n"
        "    return x if isinstance(x, torch.Tensor) else torch.cat(x, 1)\n"
    )
    (package / "network.py").write_text(
        "from torch import nn\n"
        "from .helper import joined\n"
        "class Network(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(8, 5)\n"
        "    def forward(self, x):\n"
        "        x = joined(self.conv(x))\n"
        "        return self.fc(joined([x, x]).mean((2, 3)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = importlib.import_module("helped").Network().eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(trace(network, x)(x), network(x))
    assert "isinstance" not in vars(importlib.import_module("helped.helper"))


def student_with_pooling(name: str) -> nn.Module:
    """Return a student with a pooling of timm, after checking that it is close to its model."""
    import_torchvision()  # timm imports it, and it may be built for another torch
    pool = getattr(importlib.import_module("timm.layers.pool2d_same"), name)(3, 2)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), pool, nn.Conv2d(4, 4, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    ).eval()
    student = prepare(model, QuantizationConfig(8, 8), images())
    calibrate(student, images())
    with torch.no_grad():
        torch.testing.assert_close(student(images()), model(images()), rtol=0.1, atol=0.05)
    return student


def test_timms_average_pooling_with_the_padding_same_becomes_padding_and_pooling():
    student = student_with_pooling("AvgPool2dSame")
    with torch.no_grad():
        assert torch.equal(lower(student)(images()), student(images()))


def test_timms_max_pooling_with_the_padding_same_is_trained_but_not_exported():
    student = student_with_pooling("MaxPool2dSame")
    with pytest.raises(UsageError, match="got 1 that have none: .*MaxPool2dSame.*no integer instr"):
        lower(student)


# ---- methods --------------------------------------------------------------------------------


def problem(network: nn.Module) -> Problem:
    x = images()
    limit = torch.full((3, 1, 1), 3.0)
    labels = torch.arange(len(x))
    return Problem(
        network, 5, x, labels, Augmentation(), QuantizationConfig(), 0, pixel_range=(-limit, limit)
    )


def run(name: str, network: nn.Module, equalisation: float | None = None) -> nn.Module:
    """Run a few steps of a method, export its student, and return the student."""
    short = train.without_unused(["--method", name, "--baselines=[]", "--schedule_share=0.001"])
    config, _ = train.parse_arguments(short)
    given = replace(problem(network), equalisation=equalisation)
    method = build_method(name, given, config.scheduled)
    # Bit-Split sets the ranges of activations in its last iteration.
    for iteration in range(method.iterations if name == "bitsplit" else min(method.iterations, 4)):
        assert all(value.isfinite().all() for value in method.step(iteration).values())
    student = method.student.eval()
    assert render_bits(bits_table(student))
    with torch.no_grad():
        assert torch.equal(lower(student)(images()), student(images()))
    return student


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_layers_called_twice_and_features_without_image_size(name):
    torch.manual_seed(0)
    run(name, trained(Twice()))


WITH_STATISTICS = ("fdda", "gdfq", "qimera", "zaq", "zeroq", "dsg", "di", "adi")


@pytest.mark.parametrize("name", METHODS)
def test_only_methods_that_match_statistics_need_normalisation(name):
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    network.eval().requires_grad_(False)
    if name not in WITH_STATISTICS:
        run(name, network)
        return
    message = (
        f"{name}: expected model to have batch normalisation, whose statistics this method "
        "matches, got Sequential without it; use distill, noise, lapq, bitsplit, "
    )
    with pytest.raises(UsageError, match=message):
        run(name, network)


def test_a_method_that_does_not_fit_leaves_no_folder(tmp_path):
    (tmp_path / "plainnet.py").write_text(
        "from torch import nn\n"
        "def Net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(UsageError, match="fdda: expected model to have batch normalisation"):
            train.main(
                ["--model=module:plainnet.Net", "--weights=none", "--data=digits", f"--out={out}"]
            )
    assert not out.exists()
