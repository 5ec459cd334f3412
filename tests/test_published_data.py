"""torchvision's data sets by name, from tiny files in their formats, without downloads."""

import bz2
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import network_of

from fdda_ext._torchvision import import_torchvision
from fdda_ext.commands import evaluate, export, train
from fdda_ext.data import PUBLISHED, calibration_set, load_dataset, takes_preprocessing
from fdda_ext.errors import UsageError
from fdda_ext.preprocessing import Preprocessing

CIFAR10 = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def old_pickle(content) -> bytes:
    """Pickle with protocol 2 and the module names of NumPy 1."""
    data = pickle.dumps(content, protocol=2)
    return data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def batch(count, classes, key, seed):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {"data": data, key: [i % classes for i in range(count)], "filenames": ["x"] * count}


def write_cifar10(path: Path) -> Path:
    folder = path / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(old_pickle(batch(40, 10, "labels", number)))
    (folder / "test_batch").write_bytes(old_pickle(batch(30, 10, "labels", 9)))
    (folder / "batches.meta").write_bytes(old_pickle({"label_names": CIFAR10}))
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(path: Path, folder: str) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 100), ("t10k", 20)):
        raw = path / folder / "raw"
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)


def noise(path: Path, size=(20, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 90).convert("RGB").save(path)


def test_cifar10_is_read_from_its_published_files(tmp_path):
    folder = write_cifar10(tmp_path)
    spec = f"cifar10:{tmp_path}"
    assert takes_preprocessing(spec)
    data = load_dataset(spec, "test")
    expected = batch(30, 10, "labels", 9)
    assert (len(data), data.num_classes, data.image_size, data.channels) == (30, 10, 32, 3)
    assert data.class_names == tuple(CIFAR10)
    assert data.labels.tolist() == expected["labels"]
    pixels = torch.from_numpy(expected["data"][7]).view(3, 32, 32)
    assert torch.equal(data.pixels(7), pixels), "pixels are not changed"
    assert torch.equal(load_dataset(f"cifar10:{folder}", "test").pixels(7), pixels)
    assert not data.from_files
    assert data.pixels_without_margin(0) is None
    cut = load_dataset(spec, "test", preprocessing=Preprocessing(image_size=32, resize=40))
    assert torch.equal(cut.pixels(7), pixels), "an image that already has the size is not changed"
    asked = Preprocessing(image_size=32, resize=40, keep_small=False)
    margin = load_dataset(spec, "test", preprocessing=asked)
    assert not torch.equal(margin.pixels(7), pixels)
    assert torch.equal(margin.pixels_without_margin(7), pixels)


def test_images_equal_those_of_torchvision(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    torchvision = import_torchvision()
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    theirs = torchvision.datasets.CIFAR10(tmp_path, train=False)
    ours = load_dataset(f"cifar10:{tmp_path}", "test")
    assert ours.labels.tolist() == theirs.targets
    for index in (0, 29):
        expected = torch.from_numpy(theirs.data[index]).permute(2, 0, 1)
        assert torch.equal(ours.pixels(index), expected)


def test_validation_is_a_fixed_part_of_training_that_no_other_split_has(tmp_path):
    write_cifar10(tmp_path)
    parts = {
        split: load_dataset(f"cifar10:{tmp_path}", split)
        for split in ("train", "calibration", "validation", "test")
    }
    assert [len(part) for part in parts.values()] == [180, 180, 20, 30]
    assert parts["validation"].labels.bincount().tolist() == [2] * 10

    def contents(part):
        return {part.pixels(i).numpy().tobytes() for i in range(len(part))}

    seen = {split: contents(part) for split, part in parts.items()}
    assert seen["train"] == seen["calibration"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    images, labels = calibration_set(f"cifar10:{tmp_path}", 2)
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [k for k in range(10) for _ in range(2)]


def test_cifar100_has_its_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    names = [f"fine{k}" for k in range(100)]
    content = batch(200, 100, "fine_labels", 0) | {"coarse_labels": [0] * 200}
    for name in ("train", "test"):
        (folder / name).write_bytes(old_pickle(content))
    (folder / "meta").write_bytes(old_pickle({"fine_label_names": names}))
    data = load_dataset(f"cifar100:{tmp_path}", "test")
    assert data.class_names == tuple(names)
    assert data.labels.tolist() == content["fine_labels"]


class Mischief:
    def __reduce__(self):
        return (Path.touch, (Path("was_run"),))


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_cifar10(tmp_path)
    for content in (Mischief(), {"data": Mischief(), "labels": []}):
        (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(UsageError, match="the file needs .*, which is not run"):
            load_dataset(f"cifar10:{tmp_path}", "test")
    assert not Path("was_run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError"),
        (old_pickle([1, 2]), "holds no dictionary"),
        (old_pickle({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}), "array of f4"),
        (old_pickle({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}), "array of u1"),
        (old_pickle({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "2 images with 1"),
        (old_pickle({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}), "labels below 10"),
        (old_pickle({"labels": [10]}), "KeyError"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    (write_cifar10(tmp_path) / "test_batch").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_dataset(f"cifar10:{tmp_path}", "test")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_absent_files_are_named_with_advice(tmp_path, name):
    with pytest.raises(UsageError, match="expected .*nowhere to hold the files of .*--download"):
        load_dataset(f"{name}:{tmp_path / 'nowhere'}", "test")
    assert not (tmp_path / "nowhere").exists()


def test_a_failed_download_is_reported(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    utils = import_torchvision().datasets.utils
    monkeypatch.setattr(utils, "download_and_extract_archive", fail)
    monkeypatch.setattr(import_torchvision().datasets.mnist, "download_and_extract_archive", fail)
    for name in ("cifar10", "mnist"):
        with pytest.raises(UsageError, match="no route to host.*may have been cut off"):
            load_dataset(f"{name}:{tmp_path}", "test", download=True)


def test_files_are_downloaded_only_with_the_option(tmp_path, monkeypatch):
    asked = []

    def fetch(url, root, filename, md5):
        asked.append((filename, md5))
        write_cifar10(Path(root))

    utils = import_torchvision().datasets.utils
    monkeypatch.setattr(utils, "download_and_extract_archive", fetch)
    arguments = ["--model=torchvision:resnet18", "--weights=none", f"--data=cifar10:{tmp_path}"]
    with pytest.raises(UsageError, match="--download"):
        evaluate.main(arguments)
    assert asked == []
    evaluate.main([*arguments, "--download"])
    evaluate.main([*arguments, "--download"])
    assert asked == [("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_gray_sets_have_one_channel_unless_three_are_wanted(tmp_path, name):
    write_mnist(tmp_path, PUBLISHED[name].name)
    data = load_dataset(f"{name}:{tmp_path}", "test")
    assert (len(data), data.num_classes, data.channels, data.image_size) == (20, 10, 1, 28)
    assert len(load_dataset(f"{name}:{tmp_path}", "validation")) == 10
    three = load_dataset(f"{name}:{tmp_path}", "test", channels=3)
    assert torch.equal(three.pixels(3), data.pixels(3).expand(3, -1, -1))


def test_usps_and_emnist_are_read(tmp_path):
    lines = "".join(
        f"{1 + i % 10} " + " ".join(f"{j + 1}:{(i / 10) - 1:.2f}" for j in range(256)) + "\n"
        for i in range(20)
    )
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / name).write_bytes(bz2.compress(lines.encode()))
    data = load_dataset(f"usps:{tmp_path}", "test")
    assert (len(data), data.image_size, data.num_classes, data.channels) == (20, 16, 10, 1)
    assert data.labels[:3].tolist() == [0, 1, 2]
    raw = tmp_path / "EMNIST" / "raw"
    for split in ("train", "test"):
        name = f"emnist-balanced-{split}"
        write_idx(raw / f"{name}-images-idx3-ubyte", np.zeros((94, 28, 28), np.uint8))
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(94, dtype=np.uint8) % 47)
    assert load_dataset(f"emnist:{tmp_path}", "test").num_classes == 47


def test_svhn_and_stl10_are_read(tmp_path, monkeypatch):
    datasets = import_torchvision().datasets
    for module in (datasets.svhn, datasets.stl10):
        monkeypatch.setattr(module, "check_integrity", lambda *_: True)
    rng = np.random.default_rng(0)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = rng.integers(0, 256, (10, 3, 96, 96), dtype=np.uint8)
    (folder / "test_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
    (folder / "test_y.bin").write_bytes(bytes(range(1, 11)))
    (folder / "class_names.txt").write_text("\n".join(CIFAR10))
    data = load_dataset(f"stl10:{tmp_path}", "test")
    assert (data.image_size, data.class_names) == (96, tuple(CIFAR10))
    assert torch.equal(data.pixels(4), torch.from_numpy(images[4]))
    assert data.labels.tolist() == list(range(10))

    from scipy.io import savemat

    images = rng.integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    savemat(tmp_path / "test_32x32.mat", {"X": images, "y": np.arange(1, 11)[:, None]})
    data = load_dataset(f"svhn:{tmp_path}", "test")
    assert data.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert torch.equal(data.pixels(2), torch.from_numpy(images[..., 2]).permute(2, 0, 1))
    assert not data.augmentation.flip


def test_data_sets_of_image_files_are_read(tmp_path):
    for split in ("train", "valid", "test"):
        for label in ("AA", "BB"):
            for number in range(2):
                noise(tmp_path / "country211" / split / label / f"{number}.jpg")
    data = load_dataset(f"country211:{tmp_path}", "validation", image_size=16)
    assert (len(data), data.class_names) == (4, ("AA", "BB"))
    assert data.from_files
    assert data.pixels(0).shape == (3, 16, 16)

    for split in ("train", "val", "test"):
        (tmp_path / "dtd" / "dtd" / "labels").mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{c}/{split}.jpg\n" for c in ("banded", "woven"))
        (tmp_path / "dtd" / "dtd" / "labels" / f"{split}1.txt").write_text(lines)
        for name in ("banded", "woven"):
            noise(tmp_path / "dtd" / "dtd" / "images" / name / f"{split}.jpg")
    data = load_dataset(f"dtd:{tmp_path}", "test", image_size=16)
    assert data.name(1) == str(tmp_path / "dtd" / "dtd" / "images" / "woven" / "test.jpg")
    assert data.labels.tolist() == [0, 1]

    base = tmp_path / "gtsrb"
    for label in range(3):
        for number in range(10):
            noise(base / "GTSRB" / "Training" / f"{label:05d}" / f"{number}.ppm")
    noise(base / "GTSRB" / "Final_Test" / "Images" / "00000.ppm")
    (base / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;2\n")
    data = load_dataset(f"gtsrb:{tmp_path}", "test", image_size=16)
    assert (data.labels.tolist(), data.num_classes) == ([2], 43)
    assert data.absent_classes() == "images of 1 of 43 classes"
    assert len(load_dataset(f"gtsrb:{tmp_path}", "train", image_size=16)) == 27
    assert len(load_dataset(f"gtsrb:{tmp_path}", "validation", image_size=16)) == 3

    for split in ("train", "val"):
        for wnid in ("n01440764", "n02102040"):
            noise(tmp_path / "imagenette2" / split / wnid / "0.jpeg")
    data = load_dataset(f"imagenette:{tmp_path}", "test", image_size=16)
    assert data.class_names == ("tench", "English springer")


def test_a_complete_run_on_mnist(tmp_path, monkeypatch, capsys):
    module = type(sys)("nets")
    module.Gray = network_of(1)
    monkeypatch.setitem(sys.modules, "nets", module)
    write_mnist(tmp_path, "MNIST")
    out = tmp_path / "run"
    train.main(
        [
            *("--model=module:nets.Gray", "--weights=none", f"--data=mnist:{tmp_path}"),
            *("--method=mse", "--baselines=[]", f"--out={out}", "--no-report"),
        ]
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "images: 28x28 as they are" in printed
    assert "download" not in (out / "config.yaml").read_text()
    (tmp_path / "MNIST").rename(tmp_path / "elsewhere")
    export.main([f"--run={out}"])  # export needs no images
    (tmp_path / "elsewhere").rename(tmp_path / "MNIST")
    capsys.readouterr()
    texts = []
    for source in (out, out / "model.int4.safetensors"):
        evaluate.main([f"--run={source}", f"--data=mnist:{tmp_path}"])
        texts.append(capsys.readouterr().out.split("top-1")[1].split())
    assert texts[0] == texts[1]
    with pytest.raises(UsageError, match="MNIST as torchvision keeps them.*--download"):
        evaluate.main([f"--run={out}", f"--data=mnist:{tmp_path / 'nowhere'}"])
