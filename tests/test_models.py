"""Networks by name, weights from files, and refusal of files without weights."""

import os
import pickle
import subprocess
import sys
import warnings
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from fdda_ext.errors import UsageError
from fdda_ext.models import load_model, load_weights
from fdda_ext.models.zoo import EMBEDDED


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded_network_has_the_expected_size(name):
    network = load_model(name)
    assert not network.training
    parameters = sum(p.numel() for p in network.parameters())
    assert 0.2e6 < parameters < 0.3e6
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 71)
    assert network(torch.zeros(1, 3, 50, 50)).shape == (1, 71)
    assert load_model(name, weights="none", num_classes=5)(torch.zeros(1, 3, 32, 32)).shape[1] == 5


@pytest.mark.parametrize(
    "spec", ["torchvision:resnet18", "timm:regnetx_002", "pytorchcv:mobilenet_wd4"]
)
def test_networks_of_libraries_are_loaded(spec):
    network = load_model(spec, weights="none", num_classes=7)
    assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 7)


def test_unknown_networks_are_refused_with_a_hint():
    with pytest.raises(UsageError, match="got glyphs_resnt; did you mean glyphs_resnet"):
        load_model("glyphs_resnt")
    with pytest.raises(UsageError, match="torchvision has, got resnet81; did you mean resnet"):
        load_model("torchvision:resnet81")
    with pytest.raises(UsageError, match="got other:resnet18"):
        load_model("other:resnet18")
    with pytest.raises(UsageError, match="data of the 71 classes"):
        load_model("glyphs_resnet", num_classes=10)


def resnet(weights):
    return load_model("glyphs_resnet", weights=str(weights), num_classes=71)


def test_weights_from_safetensors_and_torch_files(tmp_path):
    state = load_model("glyphs_resnet").state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        loaded = resnet(tmp_path / name).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_damaged_files_raise_only_usage_errors(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = network.state_dict()
    save_file(state, tmp_path / "a")
    torch.save(state, tmp_path / "b")
    torch.save(state, tmp_path / "c", _use_new_zipfile_serialization=False)
    random = Random(0)
    messages = []
    for name in ("a", "b", "c"):
        data = (tmp_path / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(random.choice([1, 3, 20])):
                damaged[random.randrange(len(data))] = random.randrange(256)
            (tmp_path / "damaged").write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    load_weights(network, tmp_path / "damaged")
                except UsageError as error:
                    messages.append(str(error))
    assert len(messages) > 200
    assert not any("\n" in message for message in messages)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_not_executed(tmp_path):
    bomb = Bomb()
    Bomb.path = str(tmp_path / "exploded")
    torch.save({"conv1.weight": bomb}, tmp_path / "bomb.pth")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(bomb))
    for name in ("bomb.pth", "bare.pkl"):
        with pytest.raises(UsageError, match="holds code and was not run") as caught:
            resnet(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_damaged_and_foreign_weights_are_refused(tmp_path):
    state = load_model("glyphs_resnet").state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        data = (tmp_path / name).read_bytes()
        for keep in (0, 5, 100, len(data) // 2, len(data) - 1):
            (tmp_path / "cut").write_bytes(data[:keep])
            with pytest.raises(UsageError) as caught:
                resnet(tmp_path / "cut")
            assert "\n" not in str(caught.value)
    (tmp_path / "text").write_text("these are no weights\n" * 10)
    with pytest.raises(UsageError, match="text"):
        resnet(tmp_path / "text")
    with pytest.raises(UsageError, match="default, none or a file, got .*absent"):
        resnet(tmp_path / "absent")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="named tensors"):
        resnet(tmp_path / "list.pth")

    def changed(**change):
        save_file({**state, **change}, tmp_path / "c.safetensors")
        return tmp_path / "c.safetensors"

    with pytest.raises(UsageError, match="the unknown extra"):
        resnet(changed(extra=torch.zeros(1)))
    with pytest.raises(UsageError, match=r"fc.bias of shape \(71,\), got \(3,\)"):
        resnet(changed(**{"fc.bias": torch.zeros(3)}))
    with pytest.raises(UsageError, match="NaN or infinity in fc.bias"):
        resnet(changed(**{"fc.bias": torch.full((71,), float("nan"))}))
    with pytest.raises(UsageError, match=r"fc.bias in floating point, got torch.int8"):
        resnet(changed(**{"fc.bias": torch.ones(71, dtype=torch.int8)}))
    torch.save({**state, "fc.bias": torch.ones(71).to_sparse()}, tmp_path / "sparse.pth")
    torch.save({**state, "fc.bias": torch.ones(71, device="meta")}, tmp_path / "meta.pth")
    for name in ("sparse.pth", "meta.pth"):
        with pytest.raises(UsageError, match="named tensors"):
            resnet(tmp_path / name)
    del state["fc.bias"]
    with pytest.raises(UsageError, match="with no fc.bias"):
        resnet(changed())


@pytest.mark.parametrize("name", ["pytorchcv:resnet10", "timm:resnet10t", "torchvision:resnet18"])
def test_every_library_can_be_the_first_to_be_imported(name):
    code = f"from fdda_ext.models import load_model; load_model({name!r}, weights='none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_network_of_the_user_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.BatchNorm2d(num_classes))\n"
        "def number(num_classes):\n"
        "    return num_classes\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    network = load_model("module:mine.net", weights="none", num_classes=4)
    assert not network.training
    save_file({k: v + 1 for k, v in network.state_dict().items()}, tmp_path / "w.safetensors")
    filled = load_model("module:mine.net", weights=str(tmp_path / "w.safetensors"), num_classes=4)
    assert torch.equal(filled[0].weight, network[0].weight + 1)
    for spec, weights, classes, message in (
        ("module:mine.net", "default", 4, "to be a file or none, got default"),
        ("module:mine.net", "none", None, "expected num_classes for module:mine.net, got none"),
        ("module:mine.nett", "none", 4, r"module:mine.nett to be a class.*AttributeError"),
        ("module:mineral.net", "none", 4, "got ModuleNotFoundError"),
        ("module:mine", "none", 4, "got ValueError"),
        ("module:mine.number", "none", 4, "to make a torch.nn.Module, got int"),
        ("module:", "none", 4, "expected one of .*module:NAME.CLASS, got module:"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            load_model(spec, weights=weights, num_classes=classes)
        assert "\n" not in str(caught.value)
