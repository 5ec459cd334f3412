"""``python -m fdda_ext.pretrain``: train a small network from scratch.

The weights in the package were made with::

    python -m fdda_ext.pretrain --model glyphs_resnet --out OUT --threads 1
    python -m fdda_ext.pretrain --model glyphs_mobilenet --out OUT --threads 1
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import choose_preprocessing, load_dataset
from ..engine import (
    Accuracy,
    BatchSource,
    build_parser,
    check_logits,
    check_machine,
    evaluate,
    input_channels,
    instantiate_or_refuse,
    keep_freed_memory,
    parse_or_refuse,
)
from ..errors import UsageError
from ..image_size import height_and_width, parse_image_size, show_image_size, to_image_size
from ..models import open_model
from ..preprocessing import Preprocessing, PreprocessingConfig

__all__ = ["PretrainConfig", "main", "run"]

_DESCRIPTION = """\
Train a small float network, which can then be quantized.

examples:
  python -m fdda_ext.pretrain --model glyphs_resnet --out runs/float
  python -m fdda_ext.pretrain --model glyphs_mobilenet --data digits --out runs/digits
then
  python -m fdda_ext.train --model glyphs_mobilenet --data digits \\
      --weights runs/digits/glyphs_mobilenet.safetensors
"""


@dataclass
class PretrainConfig:
    """What to train.

    Attributes:
        model: glyphs_resnet or glyphs_mobilenet, or a library's network that returns only logits,
            with random weights.
        data: Data set, as in fdda_ext.train.
        download: Download a torchvision data set to PATH if it is missing.
        out: Folder for MODEL.safetensors.
        epochs: Passes over the training images.
        images: Number of training images, a sample with all classes in proportion; None for all.
            They stay in memory, 6 KB each for RGB at 32x32.
        image_size: A number, or HEIGHTxWIDTH; None for the data set's own size.
        batch: Images per step.
        lr: Highest learning rate of a one-cycle schedule for SGD with Nesterov momentum 0.9.
        weight_decay: Weight decay of all parameters.
        seed: Seed for all random numbers.
        threads: CPU threads; None for torch's default.
        device: cpu or cuda.
    """

    model: str
    out: str
    data: str = "glyphs"
    download: bool = False
    epochs: int = 10
    images: int | None = None
    image_size: int | tuple[int, int] | str | None = None
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_machine("pretrain", seed=self.seed, threads=self.threads, device=self.device)
        if self.image_size is not None:
            self.image_size = parse_image_size(self.image_size, "pretrain")
        for name in ("epochs", "batch", "lr", "images"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"pretrain: expected {name} above 0 and finite, got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(
                f"pretrain: expected weight_decay at least 0 and finite, got {self.weight_decay}"
            )


def _images_in_memory(config: PretrainConfig, how: Preprocessing) -> tuple[Tensor, Tensor]:
    """Return all training images ``[n, C, H, W]``, float16 to save memory, and their labels."""
    dataset = load_dataset(
        config.data,
        "train",
        image_size=config.image_size,
        seed=config.seed,
        limit=config.images,
        preprocessing=how,
        channels=how.channels,
        download=config.download,
    )
    shape = (len(dataset), dataset.channels, *height_and_width(dataset.image_size))
    images = torch.empty(shape, dtype=torch.float16)
    labels = torch.empty(len(dataset), dtype=torch.int64)
    for index in track(range(len(dataset)), description="training images", transient=True):
        images[index], labels[index] = dataset[index]
    return images, labels


def _command(config: PretrainConfig) -> str:
    """Return the command that trains the same weights, without defaults and folder."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(config.image_size, tuple):
        values["image_size"] = show_image_size(config.image_size)
    changed = [
        f"--{field.name} {values[field.name]}"
        for field in fields(config)
        if field.name not in ("out", "download") and values[field.name] != field.default
    ]
    return " ".join(["python -m fdda_ext.pretrain", *changed])


def _folder(out: str) -> Path:
    """Create the folder before training, so that a mistake shows at once."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            "pretrain: expected out to be a folder that can be created, "
            f"got {out} ({error.strerror})"
        ) from None
    return Path(out)


def _check_fit(network: nn.Module, image: Tensor, model: str) -> None:
    """Refuse images that are too small for the network."""
    try:
        with torch.no_grad():  # a copy, because the pass changes running statistics
            logits = copy.deepcopy(network).train()(image.expand(2, -1, -1, -1))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"pretrain: expected image_size that {model} can take, "
            f"got {show_image_size(to_image_size(*image.shape[-2:]))} ({reason})"
        ) from None
    check_logits(logits, 2, "pretrain")


def _memory_format(network: nn.Module, image: Tensor) -> torch.memory_format:
    """Return the fastest memory format for convolutions that the network's views allow."""
    images = image.expand(2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad():  # a copy, because the pass changes running statistics
            copy.deepcopy(network).train()(images)
    except RuntimeError as error:
        if "view size is not compatible" in str(error):
            return torch.contiguous_format
        raise
    return torch.channels_last


def run(config: PretrainConfig) -> Accuracy:
    """Train, store the weights, and return their accuracy on the whole test split.

    Raises:
        UsageError: If data, network and settings do not fit, or the loss is not finite.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    test_set = load_dataset(
        config.data, "test", image_size=config.image_size, download=config.download
    )
    torch.manual_seed(config.seed)
    opened = open_model(config.model, weights="none", num_classes=test_set.num_classes)
    network = opened.network
    channels = input_channels(network, test_set.image_size, "pretrain")
    how = choose_preprocessing(
        test_set,
        opened.preprocessing,
        PreprocessingConfig(),
        image_size=config.image_size,
        channels=channels,
    )
    test_set = load_dataset(
        config.data,
        "test",
        image_size=config.image_size,
        preprocessing=how,
        channels=channels,
    )
    _check_fit(network, test_set[0][0], config.model)
    memory_format = _memory_format(network, test_set[0][0])
    network.to(memory_format=memory_format)  # type: ignore[call-overload]
    folder = _folder(config.out)
    images, labels = _images_in_memory(config, how)
    network.to(config.device)
    steps_per_epoch = len(labels) // config.batch
    if steps_per_epoch == 0:
        raise UsageError(
            f"pretrain: expected batch at most the {len(labels)} images, got {config.batch}"
        )
    optimizer = torch.optim.SGD(
        network.parameters(),
        config.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.epochs * steps_per_epoch, pct_start=0.15
    )
    for epoch in range(config.epochs):
        network.train()
        order = torch.randperm(len(labels))[: steps_per_epoch * config.batch]
        for chosen in track(
            order.split(config.batch),
            description=f"epoch {epoch + 1} of {config.epochs}",
            transient=True,
        ):
            batch = images[chosen].to(config.device).float()
            batch = batch.contiguous(memory_format=memory_format)
            loss = F.cross_entropy(network(batch), labels[chosen].to(config.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if not loss.isfinite():
            raise UsageError(
                f"pretrain: expected the loss to stay finite, got {loss.item()} in epoch "
                f"{epoch + 1}; lower lr"
            )
    accuracy = evaluate(network, BatchSource(test_set), device=config.device, label="testing")
    path = folder / f"{config.model.replace(':', '-')}.safetensors"
    temporary = path.with_name(path.name + ".tmp")
    state = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {
        "command": _command(config),
        "data": config.data,
        "seed": str(config.seed),
        "top1": f"{accuracy.top1:.2f}",
    }
    save_file(state, temporary, metadata=metadata)
    temporary.replace(path)
    Console().print(
        f"{path}: top-1 {accuracy.top1:.2f} % of {accuracy.count} test images", highlight=False
    )
    return accuracy


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser("fdda_ext.pretrain", _DESCRIPTION)
    parser.add_argument(
        "--download", action="store_true", help="download a torchvision data set to PATH"
    )
    parser.add_class_arguments(PretrainConfig, as_group=False, skip={"download"})
    run(PretrainConfig(**instantiate_or_refuse(parser, parse_or_refuse(parser, arguments))))
