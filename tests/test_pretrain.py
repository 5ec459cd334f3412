"""fdda_ext.pretrain, the command that trains a float network."""

import functools
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from safetensors import safe_open

from fdda_ext.commands import pretrain
from fdda_ext.data import load_dataset
from fdda_ext.engine import BatchSource, evaluate
from fdda_ext.errors import UsageError
from fdda_ext.models import load_model
from fdda_ext.models.zoo import EMBEDDED


@pytest.fixture
def one_thread():
    """A single thread, which is faster for such small networks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_pretraining_learns_and_writes_a_teacher(tmp_path):
    arguments = ["--model", "glyphs_resnet", "--data", "digits", "--image_size", "16"]
    for name in ("a", "b"):
        pretrain.main([*arguments, "--epochs", "2", "--batch", "32", "--out", str(tmp_path / name)])
    a, b = ((tmp_path / name / "glyphs_resnet.safetensors") for name in ("a", "b"))
    network = load_model("glyphs_resnet", weights=str(a), num_classes=10)
    accuracy = evaluate(network, BatchSource(load_dataset("digits", "test", image_size=16)))
    assert accuracy.top1 > 60
    with safe_open(a, "pt") as file:
        metadata = file.metadata()
    assert metadata["top1"] == f"{accuracy.top1:.2f}"
    assert metadata["seed"] == "0"
    assert metadata["command"] == " ".join(
        ["python -m fdda_ext.pretrain", *arguments[:4], "--epochs 2 --image_size 16 --batch 32"]
    )
    again = load_model("glyphs_resnet", weights=str(b), num_classes=10).state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in network.state_dict().items())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs above 0 and finite, got 0"),
        ({"threads": 0}, "threads between 1 and this machine's .*got 0"),
        ({"lr": float("nan")}, "lr above 0 and finite, got nan"),
        ({"weight_decay": -1.0}, "weight_decay at least 0 and finite, got -1.0"),
        ({"batch": 5000}, "batch at most the 898 images, got 5000"),
        (
            {"model": "torchvision:googlenet", "image_size": 64},
            "one tensor of logits .*, got 3 outputs .GoogLeNetOutputs.",
        ),
        ({"seed": -1}, "seed between 0 and"),
        ({"model": "torchvision:inception_v3"}, "image_size that torchvision:inception_v3 can tak"),
        ({"images": 256, "lr": 1e30, "image_size": 8}, "loss to stay finite, got .*; lower lr"),
        ({"out": __file__}, "out to be a folder that can be created, got .*exists"),
    ],
)
def test_bad_settings_are_refused(settings, message, tmp_path):
    settings = {"model": "glyphs_resnet", "out": str(tmp_path), "data": "digits", **settings}
    with pytest.raises(UsageError, match=message) as caught:
        pretrain.run(pretrain.PretrainConfig(**settings))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fdda_ext.pretrain", "--model", "glyphs_resnt"]
        + ["--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean glyphs_resnet" in done.stderr


@pytest.fixture(scope="module")
def whole_test_split():
    """The whole test split, whose images are drawn once for all networks."""
    dataset = load_dataset("glyphs", "test")
    dataset.pixels = functools.cache(dataset.pixels)
    return BatchSource(dataset)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded_weights_have_their_accuracy_on_the_whole_test_split(name, whole_test_split):
    path = files("fdda_ext") / "models" / "weights" / f"{name}.safetensors"
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    assert metadata["command"].startswith(f"python -m fdda_ext.pretrain --model {name}")
    accuracy = evaluate(load_model(name), whole_test_split)
    assert accuracy.count == 150 * 71
    assert accuracy.top1 >= 88
    # Another release of the font renderer may change a few images.
    assert abs(accuracy.top1 - float(metadata["top1"])) < 1


VIEWS = """
from torch import nn

class Views(nn.Sequential):
    def __init__(self, num_classes):
        layers = nn.Conv2d(3, 4, 3, stride=8), nn.BatchNorm2d(4), nn.Linear(64, num_classes)
        super().__init__(*layers)

    def forward(self, x):
        x = self[1](self[0](x))
        return self[2](x.view(x.size(0), -1))
"""


def test_a_network_with_views_of_feature_maps_is_trained(tmp_path, monkeypatch):
    (tmp_path / "views_of_maps.py").write_text(VIEWS)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"data": "digits", "epochs": 1, "images": 64, "batch": 32, "threads": 1}
    accuracy = pretrain.run(
        pretrain.PretrainConfig(model="module:views_of_maps.Views", out=str(tmp_path), **options)
    )
    assert accuracy.count == 539
