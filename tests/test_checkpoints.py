"""Weight files in the forms that training scripts write."""

import argparse
import collections
import datetime
import logging
import os
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fdda_ext.commands import evaluate
from fdda_ext.errors import UsageError
from fdda_ext.models import load_model, load_weights, open_model

NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    def forward(self, x):
        return self.head(self.stem(x))
class Holder(nn.Module):
    '''Has a submodule with the name that parallel wrappers use.'''
    def __init__(self, num_classes):
        super().__init__()
        self.module = Net(num_classes)
    def forward(self, x):
        return self.module(x)
def ten():
    return Net(10)
class Settings:
    pass
class Trainer:
    pass
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user's module, which can be imported."""
    (tmp_path / "usernet.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "usernet", raising=False)
    import usernet

    yield usernet
    sys.modules.pop("usernet", None)


def weights_of(build, seed=0) -> dict[str, torch.Tensor]:
    """Return weights that differ from their initialization."""
    torch.manual_seed(seed)
    network = build(10)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    return network.state_dict()


def load(path, spec="Net") -> dict[str, torch.Tensor]:
    return load_model(f"module:usernet.{spec}", weights=str(path), num_classes=10).state_dict()


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def prefixed(prefix: str, state: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


def between(word: str, state: dict) -> dict:
    """Insert the name that DataParallel or torch.compile adds for a submodule."""
    return {k.replace("stem.", f"stem.{word}.", 1): v for k, v in state.items()}


PREFIXES = (
    *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net."),
    *("network.", "backbone.", "encoder.", "student.model._orig_mod.", "anything.at.all."),
)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_is_removed(user, tmp_path, prefix, suffix):
    state = weights_of(user.Net)
    path = tmp_path / f"w.{suffix}"
    (torch.save if suffix == "pt" else save_file)(prefixed(prefix, state), path)
    assert same(load(path), state)
    network = user.Net(10)
    load_weights(network, path)
    assert same(network.state_dict(), state)
    if suffix == "pt":
        assert same(load(f"order={path}"), state)


OPTIMIZER = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(8, 3, 3, 3)}},
    "param_groups": [{"lr": 0.1, "params": [0]}],
}


@pytest.mark.parametrize(
    "place",
    [
        *("model_state_dict", "state_dict", "net", "model", "network", "params", "weights", "ema"),
        *("model_ema", "state_dict_ema", "a.b", "checkpoint.model.0"),
    ],
)
def test_dictionaries_inside_the_file_are_searched(user, tmp_path, place):
    state = weights_of(user.Net)
    content: dict = dict(state)
    for key in reversed(place.split(".")):
        content = {key: content, "epoch": 3, "optimizer_state_dict": OPTIMIZER, "loss": 0.1}
    torch.save(content, tmp_path / "w.pt")
    assert same(load(tmp_path / "w.pt"), state)
    assert same(load(f"order={tmp_path / 'w.pt'}"), state)
    opened = open_model("module:usernet.Net", weights=str(tmp_path / "w.pt"), num_classes=10)
    assert opened.origin.endswith(f"from {place}")


@pytest.mark.parametrize("word", ["module", "_orig_mod", "_checkpoint_wrapped_module"])
def test_names_of_wrapped_submodules_are_unwrapped(user, tmp_path, word):
    state = weights_of(user.Net)
    torch.save({"state_dict": prefixed("module.", between(word, state))}, tmp_path / "w.pt")
    assert same(load(tmp_path / "w.pt"), state)
    # The name stays if the network itself has it.
    state = weights_of(user.Holder)
    for content in (state, prefixed("module.", state), prefixed("_orig_mod.", state)):
        torch.save(content, tmp_path / "w.pt")
        assert same(load(tmp_path / "w.pt", "Holder"), state)


def test_weights_of_torch_wrappers_are_read(user, tmp_path):
    network = user.Net(10)
    averaged = torch.optim.swa_utils.AveragedModel(network)
    state = network.state_dict()
    for wrapped in (averaged, nn.DataParallel(network), torch.compile(network)):
        torch.save({"model": wrapped.state_dict()}, tmp_path / "w.pt")
        assert same(load(tmp_path / "w.pt"), state)


def test_tensors_that_a_wrapper_adds_are_skipped_with_a_warning(user, tmp_path, caplog):
    state = weights_of(user.Net)
    extra = {"criterion.weight": torch.ones(10), "metric.total": torch.tensor(3)}
    torch.save({"state_dict": {**prefixed("model.", state), **extra}}, tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING, "fdda_ext"):
        assert same(load(tmp_path / "w.pt"), state)
    assert "left out: state_dict.criterion.weight, state_dict.metric.total" in caplog.text
    # An extra tensor between the network's own tensors may mean another network.
    torch.save({**state, "stem.3.weight": torch.ones(8)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"the unknown stem.3.weight.* has 8 of the 8"):
        load(tmp_path / "w.pt")
    # Counters of operations are ignored.
    torch.save({**state, "stem.0.total_ops": torch.ones(1)}, tmp_path / "w.pt")
    assert same(load(tmp_path / "w.pt"), state)


def test_plain_weights_are_preferred_to_averaged_ones(user, tmp_path, caplog):
    plain, averaged = weights_of(user.Net), weights_of(user.Net, 1)
    path = tmp_path / "w.pt"
    for names, content in (
        (("state_dict", "state_dict_ema"), {"state_dict_ema": averaged, "state_dict": plain}),
        (
            ("state_dict.model", "state_dict.ema_model.module"),
            {
                "state_dict": {
                    **prefixed("ema_model.module.", averaged),
                    **prefixed("model.", plain),
                }
            },
        ),
    ):
        torch.save(content, path)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fdda_ext"):
            assert same(load(path), plain)
        assert f"those under {names[0]} are used" in caplog.text
        assert f"--weights {path}#{names[1]} uses the averaged ones" in caplog.text
        assert same(load(f"{path}#{names[1]}"), averaged)
        assert same(load(f"{path}#{names[0]}"), plain)
        assert same(load(f"order={path}#{names[1]}"), averaged)
    # Averaged weights are taken if there are no others.
    torch.save({"ema": averaged}, path)
    assert same(load(path), averaged)


def test_the_user_must_choose_between_two_sets_of_the_same_kind(user, tmp_path):
    one, two = weights_of(user.Net), weights_of(user.Net, 1)
    path = tmp_path / "w.pt"
    torch.save({"last": one, "best": two}, path)
    with pytest.raises(UsageError, match=r"got 2 that fit .*: last, best; choose .*w.pt#last"):
        load(path)
    assert same(load(f"{path}#best"), two)
    torch.save({"last": one, "best": one}, path)
    assert same(load(path), one)
    for name, message in (
        ("worst", "named tensors.*#worst, which holds last, best"),
        ("", "FILE#NAME"),
    ):
        with pytest.raises(UsageError, match=message):
            load(f"{path}#{name}")
    # The name of a file may contain "#".
    odd = tmp_path / "a#b.pt"
    torch.save(one, odd)
    assert same(load(odd), one)


@pytest.mark.parametrize("legacy", [False, True])
def test_other_objects_in_the_file_are_ignored(user, tmp_path, legacy):
    state = weights_of(user.Net)
    counts = collections.defaultdict(list, a=[1])
    others = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x"), data={"a": 1}),
        "path": [pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("b")],
        "when": (datetime.datetime.now(), datetime.timedelta(1), datetime.timezone.utc),
        "best": np.float64(81.2),
        "array": np.arange(3),
        "type": np.dtype("float32"),
        "counts": counts,
        "queue": collections.deque([1, 2], 5),
        "ordered": collections.OrderedDict(a=collections.Counter("ab")),
        "space": types.SimpleNamespace(a=1),
        "hyper_parameters": {"criterion": nn.CrossEntropyLoss(), "optimizer": torch.optim.SGD},
        "sets": {frozenset({1}), 2},
    }
    if legacy:  # the old format stores the source code of modules
        del others["hyper_parameters"]
    content = {"model": state, "optimizer": OPTIMIZER, **others}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert same(load(tmp_path / "w.pt"), state)


class Exploding:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_code_in_a_file_is_never_executed(user, tmp_path):
    state = weights_of(user.Net)
    made = tmp_path / "made"
    path = tmp_path / "w.pt"
    for legacy in (False, True):
        torch.save(
            {"model": state, "x": Exploding(os.mkdir, str(made))},
            path,
            _use_new_zipfile_serialization=not legacy,
        )
        with pytest.raises(UsageError, match=r"was not run \((posix|nt).mkdir\)"):
            load(path)
        assert not made.exists()
    # Unpickling a class of the user could run any code.
    torch.save({"model": state, "trainer": user.Trainer()}, path)
    with pytest.raises(UsageError, match=r"was not run \(usernet.Trainer\); save only its tensors"):
        load(path)
    # Names that are allowed are not called either.
    torch.save({"model": state, "x": Exploding(np.save, f"{made}.npy", [1])}, path)
    assert same(load(path), state)
    torch.save({"model": state, "x": Exploding(pathlib.Path.touch, made)}, path)
    with pytest.raises(UsageError, match="holds code and was not run"):
        load(path)
    assert not list(tmp_path.glob("made*"))


def test_pickled_networks_are_refused_with_advice(user, tmp_path):
    path = tmp_path / "w.pt"
    network = user.Net(10)
    for content in (network, {"net": network, "acc": 90}, network.stem, {"net": network.stem}):
        for legacy in (False, True):
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
            with pytest.raises(
                UsageError,
                match=r"a whole pickled network.*torch.save\(network.state_dict\(\), FILE",
            ):
                load(path)
    torch.jit.save(torch.jit.trace(network.eval(), torch.zeros(1, 3, 8, 8)), str(path))
    with pytest.raises(UsageError, match=r"the TorchScript archive .*torch.jit.load\(FILE\)"):
        load(path)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_other_float_dtypes_become_float32(user, tmp_path, kind, suffix):
    state = {k: v.to(kind) if v.is_floating_point() else v for k, v in weights_of(user.Net).items()}
    (torch.save if suffix == "pt" else save_file)(state, tmp_path / "w")
    loaded = load(tmp_path / "w")
    for key, tensor in loaded.items():
        assert tensor.dtype == (torch.int64 if key.endswith("tracked") else torch.float32)
        assert torch.equal(tensor, state[key].to(tensor.dtype))


def test_the_error_for_unknown_names_shows_the_closest_match(user, tmp_path):
    state = weights_of(user.Net)
    path = tmp_path / "w.pt"
    short = {k: v for k, v in prefixed("encoder.", state).items() if "head" not in k}
    torch.save({"model": short, "epoch": 1}, path)
    with pytest.raises(UsageError) as caught:
        load(path)
    for part in (
        "with no head.2.bias",
        "the network has stem.0.weight, stem.0.bias, stem.1.weight and 5 more",
        "the file has model.encoder.stem.0.weight, model.encoder.stem.0.bias",
        "the closest match under model.encoder has 6 of the 8 names",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    torch.save({"state_dict": {"a.weight": torch.ones(3)}}, path)
    with pytest.raises(
        UsageError, match=r"file has state_dict.a.weight; none of them is one of the network's 8"
    ):
        load(path)
    torch.save({**short, "encoder.stem.0.weight": torch.ones(8, 3, 5, 5)}, path)
    with pytest.raises(
        UsageError,
        match=r"6 of the 8 names, 1 with .*stem.0.weight \(8, 3, 5, 5\), not \(8, 3, 3, 3\)",
    ):
        load(path)
    torch.save({"epoch": 3, "args": argparse.Namespace()}, path)
    with pytest.raises(UsageError, match="named tensors, got something .*holds epoch, args"):
        load(path)
    torch.save({"model": {**state, "stem.0.weight": torch.ones(8, 3, 5, 5)}}, path)
    with pytest.raises(
        UsageError, match=r"stem.0.weight of shape \(8, 3, 3, 3\), got \(8, 3, 5, 5\)"
    ):
        load(path)


def test_weights_for_another_number_of_classes_are_refused(user, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(prefixed("module.", user.Net(1000).state_dict()), path)
    with pytest.raises(
        UsageError, match=r"weights for 10 classes, got weights for 1000 in .*\(head.2.weight of"
    ):
        load(path)


def test_wrapped_weights_of_another_library_are_translated(tmp_path):
    state = load_model("timm:resnet18", weights="none", num_classes=5).state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1)
    path = tmp_path / "w.pt"
    torch.save({"state_dict": prefixed("model._orig_mod.", state), "epoch": 3}, path)
    loaded = load_model("pytorchcv:resnet18", weights=str(path), num_classes=5).state_dict()
    assert torch.equal(loaded["output.weight"], state["fc.weight"])
    assert torch.equal(loaded["features.init_block.conv.conv.weight"], state["conv1.weight"])


def test_networks_without_a_num_classes_argument_are_built(user, tmp_path):
    state = weights_of(user.Net)
    torch.save(state, tmp_path / "w.pt")
    assert same(load(tmp_path / "w.pt", "ten"), state)


def test_evaluate_refuses_mistakes_before_it_runs(user, tmp_path, monkeypatch):
    torch.save(prefixed("module.", user.Net(7).state_dict()), tmp_path / "seven.pt")
    (tmp_path / "empty").mkdir()
    own = ["--model=module:usernet.Net", "--data=digits"]
    for arguments, message in (
        (["--model=glyphs_resnet", "--weights=no.pt"], "got no.pt, and there is no such file"),
        (["--model=glyphs_resnet", f"--weights={tmp_path}"], "which is a folder"),
        ([*own, f"--weights={tmp_path / 'seven.pt'}"], "for 10 classes, got weights for 7 in"),
        (["--model=module:usernet.Nett", "--weights=none"], "did you mean module:usernet.Net"),
        (
            ["--model=torchvision:resnet18", "--weights=IMAGENET_V1"],
            "torchvision has IMAGENET1K_V1",
        ),
        (["--model=resnet18"], "got resnet18; did you mean torchvision:resnet18"),
        (["--model=glyphs_resne"], "did you mean glyphs_resnet"),
        (["--model=torchvison:resnet50"], "did you mean torchvision:resnet50"),
        ([f"--run={tmp_path / 'nothing'}"], "nothing, which does not exist"),
        ([f"--run={tmp_path / 'empty'}"], "folder with a trained student, got .*empty"),
        ([f"--run={tmp_path / 'seven.pt'}"], "complete student file, got .*seven.pt"),
        ([f"--run={tmp_path / 'empty'}", "--weights=none"], "weights only with --model, got none"),
        (["--model=glyphs_resnet", "--threads=0"], "threads between 1 and .* got 0"),
        ([], "one of --run and --model, got neither"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            evaluate.main(arguments)
        assert "\n" not in str(caught.value)


def test_evaluate_uses_the_given_number_of_threads(user, tmp_path, monkeypatch):
    torch.save(user.Net(10).state_dict(), tmp_path / "w.pt")
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    evaluate.main(
        [
            *("--model=module:usernet.Net", f"--weights={tmp_path / 'w.pt'}", "--data=digits"),
            *("--test_limit=20", "--threads=1"),
        ]
    )
    assert asked == [1]
