"""The command that trains a float network."""

import pytest
import torch
from safetensors import safe_open

from fdda_ext import pretrain
from fdda_ext.data import load_dataset
from fdda_ext.engine import BatchSource, evaluate
from fdda_ext.errors import UsageError
from fdda_ext.models import load_model


@pytest.fixture
def one_thread():
    """For networks this small, waiting for a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_it_learns_and_its_file_is_a_teacher(tmp_path):
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


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(UsageError, match="epochs above 0, got 0"):
        pretrain.main(["--model", "glyphs_resnet", "--out", str(tmp_path), "--epochs", "0"])
    with pytest.raises(UsageError, match="batch at most the 1078 images, got 5000"):
        pretrain.main(
            ["--model", "glyphs_resnet", "--out", str(tmp_path), "--data", "digits"]
            + ["--batch", "5000"]
        )


@pytest.mark.parametrize(("name", "least"), [("glyphs_resnet", 88.0), ("glyphs_mobilenet", 88.0)])
def test_shipped_weights_reach_their_accuracy_on_the_whole_test_split(name, least):
    accuracy = evaluate(load_model(name), BatchSource(load_dataset("glyphs", "test")))
    assert accuracy.count == 50 * 71
    assert accuracy.top1 >= least
