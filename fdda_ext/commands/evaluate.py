"""``python -m fdda_ext.evaluate``: accuracy of a student, program or float network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import nn

from ..data import ImageDataset, choose_preprocessing, load_dataset, takes_preprocessing
from ..deploy import is_program, load_program, load_student
from ..distribution import is_first, joined, local_device
from ..engine import (
    Accuracy,
    BatchSource,
    RunFolder,
    build_parser,
    check_machine,
    count_outputs,
    decode_workers,
    evaluate,
    image_shape_of,
    input_channels,
    instantiate_or_refuse,
    parse_or_refuse,
    preprocessing_of,
)
from ..errors import UsageError
from ..image_size import ImageSize, height_and_width, parse_image_size, to_image_size
from ..models import open_model
from ..preprocessing import Preprocessing, PreprocessingConfig

__all__ = ["EvaluateConfig", "main", "run"]

_DESCRIPTION = """\
Measure the accuracy of a network on a test or validation split.

examples:
  python -m fdda_ext.evaluate --run runs/a                      the student of a run
  python -m fdda_ext.evaluate --run runs/a/baselines/mse
  python -m fdda_ext.evaluate --run some/where/student.safetensors --data folder:PATH
  python -m fdda_ext.evaluate --run runs/a/model.int4.safetensors
  python -m fdda_ext.evaluate --model glyphs_resnet --data glyphs
"""


@dataclass
class EvaluateConfig:
    """What to measure, and on which data.

    Attributes:
        run: Run folder, student.safetensors, or a program that fdda_ext.export wrote.
        model: Float network to measure instead: glyphs_resnet, glyphs_mobilenet, torchvision:NAME,
            and so on.
        weights: Weights of the float network: "default", "none", a file, or FILE#NAME for one of
            several sets in a file. See fdda_ext.train.
        data: glyphs, digits, folder:PATH, shards:PATH, imagenet:PATH, or a torchvision data set by
            name, such as cifar10:PATH; None for the data of the run, or glyphs.
        download: Download a torchvision data set to PATH if it is missing.
        image_size: A number, or HEIGHTxWIDTH; None for the size of the run or of the data set.
        preprocessing: Changes to the preprocessing of image files, which otherwise comes from the
            run or the weights. A program only stores its normalisation.
        device: cpu or cuda.
        threads: CPU threads; None for torch's default.
        split: "test" or "validation".
        test_limit: Number of images to test, a sample with all classes in proportion; None for all.
        test_batch: Images per batch of the evaluation.
        workers: Number of processes that decode images. None means one per core, at most 8, for
            image files on a GPU, and otherwise the main process alone.
        max_unreadable: Number of damaged image files that are skipped, each with a warning. One
            more is an error.
    """

    run: str | None = None
    model: str | None = None
    weights: str = "default"
    data: str | None = None
    download: bool = False
    image_size: int | tuple[int, int] | str | None = None
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    device: str = "cpu"
    threads: int | None = None
    split: Literal["test", "validation"] = "test"
    test_limit: int | None = None
    test_batch: int = 250
    workers: int | None = None
    max_unreadable: int = 0

    def __post_init__(self) -> None:
        check_machine("evaluate", threads=self.threads, device=self.device)
        for name in ("run", "model", "data", "image_size"):
            if getattr(self, name) in ("", 0):
                raise UsageError(f"evaluate: expected {name} not to be empty or 0")
        if self.image_size is not None:
            self.image_size = parse_image_size(self.image_size, "evaluate")
        for name, least in (
            ("test_limit", 1),
            ("test_batch", 1),
            ("workers", 0),
            ("max_unreadable", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"evaluate: expected {name} at least {least}, got {value}")

    def dataset(
        self,
        data: str | None,
        image_size: ImageSize | str | None,
        default: Preprocessing,
        channels: int | None = None,
    ) -> ImageDataset:
        """Load ``data`` (None: glyphs). The preprocessing is ``default`` with changes."""
        spec = data or "glyphs"
        how = None
        if takes_preprocessing(spec):
            how = self.preprocessing.apply(default, image_size)
        elif self.preprocessing.given:
            raise UsageError(
                f"evaluate: expected preprocessing only with images from files, got data {spec}"
            )
        return load_dataset(
            spec,
            self.split,
            image_size=image_size,
            limit=self.test_limit,
            preprocessing=how,
            channels=channels,
            download=self.download,
        )


def run(config: EvaluateConfig) -> Accuracy:
    """Measure what ``config`` names."""
    if (config.run is None) == (config.model is None):
        given = "both" if config.run else "neither"
        raise UsageError(f"evaluate: expected one of --run and --model, got {given}")
    if config.run is not None and config.weights != "default":
        raise UsageError(
            f"evaluate: expected weights only with --model, got {config.weights}; "
            "a run has its own weights"
        )
    if config.run is not None and not Path(config.run).exists():
        raise UsageError(
            "evaluate: expected run to be a run folder, a student, or a program from "
            f"fdda_ext.export, got {config.run}, which does not exist"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    network: nn.Module
    if config.run is not None and is_program(Path(config.run)):
        network = load_program(Path(config.run))
        (classes,), (channels, height, width) = network.output.shape, network.image.shape
        image_size = to_image_size(height, width)
        if config.image_size not in (None, image_size):
            raise UsageError(
                f"evaluate: expected image_size to be the program's {image_size}, "
                f"got {config.image_size}"
            )
        default = Preprocessing().for_channels(channels)
        if network.mean is not None and network.std is not None:
            default = replace(default, mean=network.mean, std=network.std)
        dataset = config.dataset(config.data, image_size, default, channels)
    elif config.run is not None:
        network, recipe = load_student(Path(config.run))
        channels, height, width = image_shape_of(recipe)
        size = config.image_size or to_image_size(height, width)
        default = preprocessing_of(recipe)
        dataset = config.dataset(config.data or str(recipe["data"]), size, default, channels)
        # A student contains feature map sizes of its preparation, so another image size may fail.
        black = torch.zeros(1, channels, *height_and_width(dataset.image_size))
        classes = count_outputs(network, black, "evaluate")
    else:
        assert config.model is not None
        dataset = load_dataset(
            config.data or "glyphs",
            config.split,
            image_size=config.image_size,
            download=config.download,
        )
        opened = open_model(config.model, weights=config.weights, num_classes=dataset.num_classes)
        network = opened.network
        channels = input_channels(network, dataset.image_size, "evaluate")
        default = choose_preprocessing(
            dataset,
            opened.preprocessing,
            PreprocessingConfig(),
            image_size=config.image_size,
            channels=channels,
        )
        dataset = config.dataset(config.data, config.image_size, default, channels)
        black = torch.zeros(1, channels, *height_and_width(dataset.image_size))
        classes = count_outputs(network, black, "evaluate")
    if classes != dataset.num_classes:
        raise UsageError(
            f"evaluate: expected data with the network's {classes} classes, "
            f"got {dataset.num_classes}"
        )
    note = dataset.absent_classes()
    if note is not None and is_first():
        Console().print(f"{config.split} data: {note}", highlight=False)
    network.to(config.device)
    workers = decode_workers(config.workers, config.device, dataset.from_files)
    batches = BatchSource(dataset, config.test_batch, workers, config.max_unreadable)
    return evaluate(network, batches, device=config.device, label="testing")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser("fdda_ext.evaluate", _DESCRIPTION)
    parser.add_argument(
        "--download", action="store_true", help="download a torchvision data set to PATH"
    )
    parser.add_class_arguments(EvaluateConfig, as_group=False, skip={"download"})
    config = EvaluateConfig(**instantiate_or_refuse(parser, parse_or_refuse(parser, arguments)))
    with joined(config.device):
        accuracy = run(replace(config, device=local_device(config.device)))
        if is_first():
            _print(config, accuracy)


def _print(config: EvaluateConfig, accuracy: Accuracy) -> None:
    console = Console()
    if config.run and Path(config.run).is_dir() and not RunFolder.is_finished(Path(config.run)):
        console.print(
            f"[yellow]warning: {config.run} is unfinished; its student is from the last stop"
        )
    console.print(
        f"{config.run or config.model}: {accuracy}", highlight=False, markup=False, soft_wrap=True
    )
