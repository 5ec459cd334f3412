"""Weights of one library in a network of another, and the preprocessing of weights."""

import copy
import itertools
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fdda_ext.errors import UsageError
from fdda_ext.models import load_model, open_model
from fdda_ext.models.layouts import _families, relatives, translate
from fdda_ext.preprocessing import Preprocessing, PreprocessingConfig

#: Networks in one row compute the same function. The classifier of pytorchcv's MobileNetV2 has no
#: bias, so its weights fit the other networks, but not the reverse.
NETWORKS = {
    "resnet18": ("torchvision:resnet18", "timm:resnet18", "pytorchcv:resnet18"),
    "resnet50": ("torchvision:resnet50", "timm:resnet50", "pytorchcv:resnet50b"),
    "mobilenet_v2": ("torchvision:mobilenet_v2", "timm:mobilenetv2_100"),
    "mobilenet_v2b": ("pytorchcv:mobilenetv2b_w1", "torchvision:mobilenet_v2"),
    "mobilenet_v2c": ("pytorchcv:mobilenetv2b_w1", "timm:mobilenetv2_100"),
    "regnetx_006": ("timm:regnetx_006", "pytorchcv:regnetx006"),
    "regnetx_008": ("torchvision:regnet_x_800mf", "timm:regnetx_008"),
}
PAIRS = [
    pair
    for name, row in NETWORKS.items()
    for pair in (itertools.permutations(row, 2) if name[-1] not in "bc" else [row])
]


@pytest.fixture(scope="module")
def trained():
    """A function that returns networks with random weights and statistics, cached by name."""
    made = {}

    def make(spec: str) -> nn.Module:
        if spec not in made:
            torch.manual_seed(len(made))
            network = load_model(spec, weights="none")
            network.train()
            for module in network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum = None
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -1, 2)
            with torch.no_grad():
                network(torch.randn(1, 3, 224, 224))
                for name, tensor in network.state_dict().items():
                    if name.endswith("running_var"):
                        tensor *= torch.empty_like(tensor).uniform_(0.5, 2)
                    if name.endswith("bias"):
                        tensor += torch.empty_like(tensor).uniform_(-0.5, 0.5)
            made[spec] = network.eval()
        return copy.deepcopy(made[spec])

    return make


def with_common_pool(network: nn.Module) -> nn.Module:
    """Replace pytorchcv's 7x7 average pooling, which adds up in another order."""
    features = getattr(network, "features", None)
    if isinstance(getattr(features, "final_pool", None), nn.AvgPool2d):
        features.final_pool = nn.AdaptiveAvgPool2d(1)
    return network


@torch.no_grad()
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[" in ".join(pair) for pair in PAIRS])
def test_translated_weights_give_the_logits_of_the_source(trained, tmp_path, source, target):
    network = trained(source)
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    weights = f"{source}={path}" if "resnet50" in source + target else str(path)
    opened = open_model(target, weights=weights)
    images = torch.randn(1, 3, 224, 224)
    expected, result = network(images), opened.network(images)
    largest = float(expected.abs().max())
    torch.testing.assert_close(result, expected, atol=1e-6 * largest, rtol=0)
    if "pytorchcv" not in source + target or "regnet" in source:
        assert torch.equal(result, expected)
    elif "mobilenetv2b" not in source:
        expected = with_common_pool(network)(images)
        assert torch.equal(with_common_pool(opened.network)(images), expected)
    else:  # the classifier is a convolution, so compare its inputs
        features = {}
        network.output.register_forward_pre_hook(lambda m, i: features.update(a=i[0]))
        classifier = opened.network.get_submodule(
            "classifier.1" if target.startswith("torchvision") else "classifier"
        )
        classifier.register_forward_pre_hook(lambda m, i: features.update(b=i[0]))
        with_common_pool(network)(images), opened.network(images)
        assert torch.equal(features["a"].flatten(), features["b"].flatten())


def state_of(spec: str, tmp_path, suffix: str = "pth"):
    path = tmp_path / f"weights.{suffix}"
    torch.save(load_model(spec, weights="none").state_dict(), path)
    return path


def test_networks_that_compute_something_else_are_refused(tmp_path):
    path = state_of("timm:mobilenetv1_100", tmp_path)
    with pytest.raises(UsageError, match="another input .*ReLU6 against ReLU before it"):
        load_model("pytorchcv:mobilenet_w1", weights=str(path))
    path = state_of("torchvision:mobilenet_v2", tmp_path)
    with pytest.raises(UsageError, match=r"a bias at classifier.1, not at output"):
        load_model("pytorchcv:mobilenetv2b_w1", weights=str(path))
    path = state_of("torchvision:resnet50", tmp_path)
    with pytest.raises(UsageError, match=r"stride \(1, 1\) at layer2.0.conv1 where .*\(2, 2\)"):
        load_model("pytorchcv:resnet50", weights=str(path))
    with pytest.raises(UsageError, match="another input of layer1.0.conv2"):
        load_model("torchvision:resnet18", weights=f"torchvision:resnet50={path}")
    with pytest.raises(UsageError, match="nor are they from timm:regnetx_006"):
        load_model("pytorchcv:regnetx006", weights=str(path))
    with pytest.raises(UsageError, match="weights of timm:regnetx_006, got .* with no stem.conv"):
        load_model("pytorchcv:regnetx006", weights=f"timm:regnetx_006={path}")


def test_the_user_must_choose_between_two_possible_networks(tmp_path):
    # pytorchcv's resnet50 and resnet50b have the same names and shapes, but different strides.
    path = state_of("pytorchcv:resnet50b", tmp_path)
    with pytest.raises(UsageError, match="any of pytorchcv:resnet50b, .*compute different things"):
        load_model("torchvision:resnet50", weights=str(path))
    load_model("torchvision:resnet50", weights=f"pytorchcv:resnet50b={path}")
    with pytest.raises(UsageError, match="to be the same network"):
        load_model("torchvision:resnet50", weights=f"pytorchcv:resnet50={path}")


class Small(nn.Module):
    """A network with two parallel convolutions of the same shape."""

    def __init__(self, *, eps: float = 1e-5, pool: nn.Module | None = None, extra: bool = False):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4, eps=eps)
        self.relu = nn.ReLU()
        self.main, self.side = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.pool = pool or nn.AvgPool2d(2)
        self.fc = nn.Linear(4, 2)
        if extra:
            self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.stem(x))))
        x = self.main(x) - self.side(x)
        return self.fc(x.mean((2, 3)))


def twin(**kwargs) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    source = Small()
    return translate(source.state_dict(), source, Small(**kwargs), names=("A", "B"), image_size=16)


def test_layers_are_paired_by_what_they_compute():
    torch.manual_seed(0)
    state = Small().state_dict()
    result = twin()
    assert state.keys() == result.keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 1e-3}, "got eps 1e-05 at bn where bn has 0.001"),
        ({"pool": nn.MaxPool2d(2)}, "another input of main .*ReLU AvgPool2d against ReLU MaxPool"),
        ({"extra": True}, "got gain of B, which belongs to no layer"),
    ],
)
def test_differences_between_networks_are_named(change, message):
    with pytest.raises(UsageError, match=message):
        twin(**change)


def test_a_file_of_unknown_names_can_be_read_by_its_order(tmp_path):
    state = load_model("torchvision:mobilenet_v2", weights="none").state_dict()
    path = tmp_path / "weights.pth"
    renamed = {f"{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(state.items())}
    torch.save({k: v for k, v in renamed.items() if "num_batches" not in k}, path)
    with pytest.raises(UsageError, match="the network's 314 tensors, got"):
        load_model("torchvision:mobilenet_v2", weights=str(path))
    loaded = load_model("torchvision:mobilenet_v2", weights=f"order={path}").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())
    with pytest.raises(UsageError, match=r"got 0.weight \(32, 3, 3, 3\) in the place of conv1"):
        load_model("torchvision:resnet18", weights=f"order={path}")
    torch.save(dict(list(renamed.items())[:-1]), path)
    with pytest.raises(UsageError, match="network's 262 tensors, got 261"):
        load_model("torchvision:mobilenet_v2", weights=f"order={path}")


def test_images_that_one_of_the_networks_cannot_take_are_refused():
    source, target = (load_model(f"{x}:resnet18", weights="none") for x in ("timm", "pytorchcv"))
    with pytest.raises(UsageError, match="same network on images of 96, got RuntimeError"):
        translate(source.state_dict(), source, target, names=("A", "B"), image_size=96)


def test_every_family_names_networks_that_exist():
    from pytorchcv.model_provider import _models
    from timm import list_models

    from fdda_ext._torchvision import import_torchvision

    known = {
        "torchvision": import_torchvision().models.list_models(),
        "timm": list_models(),
        "pytorchcv": _models,
    }
    for spec in itertools.chain.from_iterable(_families()):
        library, _, name = spec.partition(":")
        assert name in known[library], spec
    assert relatives("timm:resnet18.a1_in1k") == ("torchvision:resnet18", "pytorchcv:resnet18")
    assert relatives("timm:vit_tiny_patch16_224") == ()


def test_default_weights_come_from_the_librarys_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    network = load_model("torchvision:resnet18", weights="none")
    torch.save(network.state_dict(), cache / "resnet18-f37072fd.pth")
    for weights in ("default", "IMAGENET1K_V1"):
        loaded = load_model("torchvision:resnet18", weights=weights).state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in network.state_dict().items())


def test_a_failed_download_of_weights_is_reported(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(UsageError, match="weights of resnet18, .*no route.* give --weights FILE"):
        load_model("torchvision:resnet18")


def test_preprocessing_is_that_of_the_weights(tmp_path, monkeypatch):
    def opened(spec, weights="none"):
        return open_model(spec, weights=weights).preprocessing

    half = (0.5, 0.5, 0.5)
    assert opened("torchvision:resnet18") == Preprocessing()
    assert opened("pytorchcv:mobilenet_w1") == Preprocessing(keep_small=False)
    assert opened("glyphs_resnet", "default") == Preprocessing()
    assert opened("timm:mobilenetv1_100") == Preprocessing(half, half, 224, 256, "bicubic", False)
    assert opened("timm:resnet50.tv_in1k").interpolation == "bilinear"
    # The file name tells the version of torchvision's weights.
    state = load_model("torchvision:resnet50", weights="none").state_dict()
    for name, resize in (("0676ba61", 256), ("11ad3fa6", 232)):
        torch.save(state, tmp_path / f"resnet50-{name}.pth")
        assert opened("torchvision:resnet50", str(tmp_path / f"resnet50-{name}.pth")).resize == (
            resize
        )
    # Weights of timm in a network of another library need timm's preprocessing.
    path = state_of("timm:regnetx_006", tmp_path)
    assert opened("pytorchcv:regnetx006", str(path)).interpolation == "bicubic"


def test_preprocessing_can_be_overridden():
    config = PreprocessingConfig(std=[1.0, 1.0, 1.0], interpolation="bicubic")
    result = config.apply(Preprocessing(), 112)
    assert result == Preprocessing(
        std=(1.0, 1.0, 1.0), image_size=112, resize=128, interpolation="bicubic"
    )
    assert PreprocessingConfig().apply(Preprocessing(), None) == Preprocessing()
    assert Preprocessing.from_dict(result.to_dict()) == result
    assert config.given
    assert not PreprocessingConfig().given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean to be one, three or four finite numbers, got"),
        ({"mean": (0.5,)}, r"as many values in mean as in std, got 1 and 3"),
        ({"std": (0.0, 1.0, 1.0)}, "std above 0"),
        ({"resize": 200}, r"resize at least image_size \(224\), got 200"),
        ({"image_size": 4}, "image_size at least 8, got 4"),
        ({"interpolation": "cubic"}, "interpolation to be one of .*got cubic"),
    ],
)
def test_bad_preprocessing_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        Preprocessing(**change)
