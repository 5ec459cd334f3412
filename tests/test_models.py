"""Networks by name, weights from files, and refusal of what is not weights."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from fdda_ext.errors import UsageError
from fdda_ext.models import load_model
from fdda_ext.models.zoo import EMBEDDED


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded_network_has_the_promised_size(name):
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
def test_library_networks(spec):
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


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_bomb_does_not_go_off(tmp_path):
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
    del state["fc.bias"]
    with pytest.raises(UsageError, match="with no fc.bias"):
        resnet(changed())
