"""``report.html`` of a run: one file without scripts that works offline and can be printed."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.fx import GraphModule

from ..about import build_info
from ..data import ImageDataset
from ..deploy import load_program, load_student
from ..engine import (
    BatchSource,
    format_duration,
    format_significant,
    render_percent,
    standard_error,
)
from ..engine.checkpoint import atomic_write_text
from ..image_size import show_image_size
from ..methods import Method, Problem, method_class
from ..quantization import LayerBits, bits_table
from . import figures, page
from .measures import (
    bn_statistics,
    judge,
    layer_sqnr,
    predict,
    quartiles,
    some_images,
    statistics_distance,
    time_interleaved,
)

__all__ = ["write_report"]

#: Number of images for layer errors, and largest number for BN statistics.
_LAYER_IMAGES, _STATISTICS_IMAGES = 64, 256
#: Largest number of classes, and of generated images per class, in the figure.
_SHOWN_CLASSES, _SHOWN_IMAGES = 12, 3
#: Largest number of rows in the tables of predictions.
_MOST_ROWS = 10
#: Timed calls of each network.
_CALLS = 21


def write_report(folder: Path, problem: Problem, test: BatchSource) -> Path:
    """Write ``report.html`` into a run folder.

    Sections without data are left out.

    Args:
        folder: Folder of a run or of one of its baselines, with a student.
        problem: Network and calibration images of the run.
        test: Images for comparing predictions and layers. Accuracies are read from the folder.

    Returns:
        Path of the report.

    Raises:
        UsageError: If there is no student, or its file is damaged.
    """
    student, recipe = load_student(folder, "visualize")
    run = _Run(folder, problem, student.to(problem.device), recipe, test)
    sections = (
        _accuracy,
        _what_was_done,
        _accuracy_over_time,
        _losses,
        _units,
        _generated_images,
        _bn_statistics,
        _errors_by_layer,
        _predictions,
        _size_and_speed,
        _bits_of_every_layer,
        _configuration,
    )
    bits = f"W{problem.quantization.weight_bits}A{problem.quantization.activation_bits}"
    title = f"{run.name} on {recipe['model']}, {bits}"
    path = folder / "report.html"
    atomic_write_text(path, page.page(title, _lead(run), [make(run) for make in sections]))
    return path


@dataclass(frozen=True)
class _Run:
    """An opened run folder.

    Attributes:
        folder: Path of the folder.
        problem: Network and calibration images.
        student: Student on the problem's device.
        recipe: Settings from which the student is built.
        test: Images for measurements.
    """

    folder: Path
    problem: Problem
    student: GraphModule
    recipe: dict[str, Any]
    test: BatchSource

    @property
    def name(self) -> str:
        return str(self.recipe["method"])

    @property
    def method(self) -> type[Method]:
        return method_class(self.name)

    @property
    def dataset(self) -> ImageDataset:
        """Data set of the test images."""
        return cast(ImageDataset, self.test.dataset)

    @cached_property
    def config(self) -> str:
        return (self.folder / "config.yaml").read_text()

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """Logged values in order."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Summaries of the finished methods by name: the baselines, then the run."""
        paths = [
            *sorted(self.folder.glob("baselines/*/summary.json")),
            self.folder / "summary.json",
        ]
        found = [json.loads(path.read_text()) for path in paths if path.exists()]
        return {row["name"]: row for row in found}

    @cached_property
    def float_top1(self) -> float | None:
        """Top-1 of the float network, in per cent."""
        return next((row["float_top1"] for row in self.rows.values() if "float_top1" in row), None)

    @cached_property
    def generated(self) -> dict[str, Tensor] | None:
        """Normalised ``images [n, C, H, W]`` and ``labels [n]``, if the run stored them."""
        path = self.folder / "images.safetensors"
        return load_file(str(path)) if path.exists() else None

    @cached_property
    def layers(self) -> list[LayerBits]:
        return bits_table(self.student)

    def weight_bytes(self) -> tuple[int, int]:
        """Size of all convolution and linear weights, in float32 and quantized."""
        sizes = [(row.weight_bits, torch.Size(row.weight_shape).numel()) for row in self.layers]
        return 4 * sum(n for _, n in sizes), sum(bits * n for bits, n in sizes) // 8


def _lead(run: _Run) -> str:
    """Summary sentence and key numbers."""
    own, float_top1 = run.rows.get(run.name), run.float_top1
    items = []
    if own:
        items.append((f"{_top(own, 'top1')} %", f"top-1, {_tested(own)} images"))
    if own and float_top1 is not None:
        change = f"{own['top1'] - float_top1:+.2f}".replace("-", "−")
        items.append((change, "points compared with the float network"))
    float_bytes, bytes_ = run.weight_bytes()
    items.append((f"{float_bytes / bytes_:.1f}x", "smaller weights than in float32"))
    if own and own["planned"]:
        items.append((format_duration(own["seconds"]), f"training, {own['iterations']} iterations"))
    summary = run.method.summary if own else f"{run.method.summary} (unfinished)"
    return page.text(summary) + page.key_numbers(items)


def _top(row: dict[str, Any], name: str) -> str:
    """Format an accuracy, with its standard error if the images are a sample."""
    return render_percent(row[name], row["images"], row.get("of", 0))


def _tested(row: dict[str, Any]) -> str:
    """Format the number of test images, for a sample with the size of the split."""
    of = row.get("of", 0)
    return f"{row['images']} of {of}" if row["images"] < of else f"{row['images']}"


def _accuracy(run: _Run) -> str:
    if not run.rows:
        return ""
    lines: list[tuple[object, ...]] = []
    first = next(iter(run.rows.values()))
    if run.float_top1 is not None:
        lines.append(("float", _top({**first, "top1": run.float_top1}, "top1"), "", "", "", ""))
    for name, row in run.rows.items():
        drop = "" if run.float_top1 is None else f"{run.float_top1 - row['top1']:.2f}"
        time = (format_duration(row["seconds"]), row["iterations"]) if row["planned"] else ("", "")
        lines.append((name, _top(row, "top1"), _top(row, "top5"), drop, *time))
    header = ("", "top-1 %", "top-5 %", "drop, points", "training", "iterations")
    split = yaml.safe_load(run.config).get("split", "test")
    what = f"Measured after the last training step, on {_tested(first)} {split} images."
    if first["images"] < first.get("of", 0):
        what += (
            " The number after ± is the standard error: the typical difference between the "
            "accuracy on the sample and on all images. All rows use the same images."
        )
    return page.section("Accuracy", page.table(header, lines, "tnnnnn"), page.text(what))


def _what_was_done(run: _Run) -> str:
    problem, info, q = run.problem, build_info(), run.problem.quantization
    weights = yaml.safe_load(run.config)["weights"]
    ends = (
        f"first and last layer {q.first_last_bits}"
        if q.first_last_bits
        else "the same in all layers"
    )
    seen = "" if run.method.real_images else ", which this method does not use"
    views = f", each with {problem.views - 1} random views" if problem.views > 1 else ""
    versions = f"fdda_ext {info.version}, torch {info.torch}, Python {platform.python_version()}"
    where = f"{problem.device.type}, {platform.machine()} with {info.isa}, threads: {info.threads}"
    path = run.folder / "origin.json"
    origin = json.loads(path.read_text()) if path.exists() else {}
    begun = [("started", "date"), ("software", "versions"), ("machine", "machine")]
    size = show_image_size(problem.full_image_size)
    rows = (
        ("method", run.name),
        ("network", f"{run.recipe['model']}, weights: {weights}"),
        ("data", f"{run.recipe['data']}, {problem.num_classes} classes"),
        ("images", f"{size} pixels, {problem.channels} channel(s)"),
        ("calibration images", f"{len(problem.images) // problem.views}{views}{seen}"),
        ("bits", f"weights {q.weight_bits}, activations {q.activation_bits}, {ends}"),
        (
            "grid",
            f"{q.grid}; range rules: weights {q.weight_range}, activations {q.activation_range}",
        ),
        ("seed", str(problem.seed)),
        ("float network in", str(problem.precision).removeprefix("torch.")),
        *((what, origin[key]) for what, key in begun if key in origin),
        ("repeat with", "python -m fdda_ext.train --config config.yaml --out ANOTHER_FOLDER"),
        ("software of this report", versions),
        ("machine of this report", where),
    )
    return page.section("What was done", page.table((), rows))


def _accuracy_over_time(run: _Run) -> str:
    lines = [line for line in run.metrics if "top1" in line]
    if not lines:
        return ""
    curve = ([line["iteration"] + 1 for line in lines], [line["top1"] for line in lines])
    level = None if run.float_top1 is None else ("float network", run.float_top1)
    name = f"{run.name}, {lines[0]['images']:.0f} images"
    image = figures.curves({name: curve}, "iteration", "top-1, %", level=level)
    caption = (
        f"Accuracy during training. Best: {max(curve[1]):.2f} %, last: {curve[1][-1]:.2f} %. The "
        "reported accuracy is the last, not the best. The float network was tested at the end."
    )
    own = run.rows.get(run.name, {})
    whole = max(own.get("of", 0), own.get("images", 0))
    error = standard_error(curve[1][-1], int(lines[-1]["images"]), whole)
    if error:
        caption += f" The last point has a standard error of {error:.2f}."
    return page.section("Accuracy over time", page.figure(image, caption))


def _losses(run: _Run) -> str:
    series: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for line in run.metrics:
        for name in line.keys() - {"iteration", "seconds"} if "top1" not in line else ():
            series[name][0].append(line["iteration"])
            series[name][1].append(line[name])
    decided = series.pop("decided", None)
    if not series:
        return ""
    order = list(dict.fromkeys(name for line in run.metrics for name in line if name in series))
    image = figures.panels({name: series[name] for name in order}, "iteration", "loss")
    caption = (
        "Logged losses, each on its own scale. The scale is logarithmic if the largest value is "
        "more than 30 times the smallest."
    )
    figures_shown = [page.figure(image, caption)]
    if decided is not None:
        image = figures.curves({"decided": decided}, "iteration", "decided, share of roundings")
        caption = (
            "Learned rounding: the share of the weights in training whose rounding is within 0.01 "
            "of down or up."
        )
        figures_shown.append(page.figure(image, caption))
    return page.section("Losses", *figures_shown)


def _units(run: _Run) -> str:
    path = run.folder / "units.json"
    if not path.exists():
        return ""
    units = json.loads(path.read_text())
    rows = [
        (
            ": ".join(filter(None, (unit["phase"], ", ".join(unit["layers"])))),
            unit["steps"],
            f"{unit['first']:.4g}",
            f"{unit['last']:.4g}" if "last" in unit else "not finished",
            f"{100 * unit['decided']:.2f}" if "decided" in unit else "",
            f"{unit['divergence']:.4g}" if "divergence" in unit else "",
        )
        for unit in units
    ]
    header = ("unit", "steps", "loss, first batch", "last batch", "decided, %", "divergence")
    text = (
        "Units in the order of reconstruction. The curves above jump where a unit begins. The loss "
        "is the error of the unit's output. Decided: roundings that end within 0.01 of down or up. "
        "Divergence: Kullback-Leibler divergence of the whole network's predictions from the float "
        "network's after the unit."
    )
    content = [page.table(header, rows, "tnnnnn"), page.text(text)]
    divergences = [unit["divergence"] for unit in units if "divergence" in unit]
    if divergences:
        curve = (range(1, len(divergences) + 1), divergences)
        image = figures.curves(
            {"divergence": curve}, "units finished", "divergence of predictions", from_zero=True
        )
        caption = (
            "Divergence of the predictions for calibration images from the float network's. Units "
            "that are not yet reconstructed are rounded to nearest."
        )
        content.append(page.figure(image, caption))
    return page.section("Units", *content)


def _generated_images(run: _Run) -> str:
    if run.generated is None:
        return ""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (run.dataset.mean, run.dataset.std))

    def shown(image: Tensor) -> Tensor:
        return (image.float().cpu() * std + mean).clamp(0, 1)

    images, labels = run.generated["images"], run.generated["labels"]
    counts = torch.bincount(labels, minlength=run.problem.num_classes)
    commonest = counts.argsort(descending=True, stable=True)[:_SHOWN_CLASSES]
    columns = {}
    for k in sorted(k for k in commonest.tolist() if counts[k]):
        real = run.problem.images[run.problem.labels == k][0]
        others = images[labels == k][:_SHOWN_IMAGES]
        columns[run.dataset.class_names[k]] = (shown(real), [shown(image) for image in others])
    caption = (
        "One calibration image per class, above images that were generated for the class. These "
        f"are the {len(columns)} most frequent classes of the run's {len(labels)} images."
    )
    device = run.problem.device
    agreement, found = judge(run.problem.teacher, images.to(device), labels.to(device))
    judgement = (
        f"The float network assigns {agreement:.1f} % of these {len(labels)} images to the class "
        f"for which they were generated. It finds {found} of the {len(counts)} classes in them; "
        f"{int(counts.count_nonzero())} were requested."
    )
    figure = page.figure(figures.image_columns(columns), caption)
    return page.section("Generated images", figure, page.text(judgement))


def _bn_statistics(run: _Run) -> str:
    if run.generated is None:
        return ""
    teacher, device = run.problem.teacher, run.problem.device
    images = run.generated["images"]
    images = images[:: max(len(images) // _STATISTICS_IMAGES, 1)][:_STATISTICS_IMAGES]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    compared = {
        "Gaussian noise": noise.to(device),
        "generated images": images.to(device),
        "other real images": some_images(run.test, len(images), device),
    }
    real = bn_statistics(teacher, run.problem.images)
    distances = {
        name: statistics_distance(bn_statistics(teacher, some), real)
        for name, some in compared.items()
    }
    series = {name: (range(1, len(d) + 1), d) for name, d in distances.items()}
    xlabel = "BN layer, in order of execution"
    image = figures.curves(series, xlabel, "distance, std", from_zero=True)
    means = ", ".join(f"{name} {sum(d) / len(d):.2f}" for name, d in distances.items())
    caption = (
        f"Distance of the BN statistics of {len(images)} images of each kind from those of the "
        f"{len(run.problem.images)} calibration images, by layer: 2-Wasserstein distance of "
        "Gaussians over all channels, in standard deviations of the calibration images' "
        f"activations. Mean over the layers: {means}."
    )
    return page.section("BN statistics of generated images", page.figure(image, caption))


def _errors_by_layer(run: _Run) -> str:
    images = some_images(run.test, _LAYER_IMAGES, run.problem.device)
    ratios = layer_sqnr(run.problem.teacher, run.student, images)
    worst = min(ratios, key=lambda layer: ratios[layer])
    caption = (
        "Signal to quantization noise ratio of every layer's output, after batch normalisation, "
        f"on {len(images)} test images. The noise includes that of earlier layers. 20 dB is an "
        f"error of 10 %. Lowest: {worst}, {ratios[worst]:.1f} dB."
    )
    image = figures.bars(ratios, "SQNR, dB")
    return page.section("Quantization error by layer", page.figure(image, caption))


def _predictions(run: _Run) -> str:
    classes, names = run.problem.num_classes, run.dataset.class_names
    seen = predict(run.problem.teacher, run.student, run.test, run.problem.device)
    counts = [
        (
            f"float {'right' if right else 'wrong'}",
            seen.count(right, True),
            seen.count(right, False),
        )
        for right in (True, False)
    ]
    count = len(seen.labels)
    whole = int(getattr(run.dataset, "whole", count))
    agreement = (
        "Float and quantized network predict the same class for "
        f"{render_percent(seen.agreement, count, whole)} % of {count} test images"
        + (f", a sample of {whole} (± standard error)." if count < whole else ".")
    )
    caption = (
        "Predicted classes of the float and the quantized network, in the order of the data. Off "
        "the diagonal, the predictions differ."
    )
    return page.section(
        "Predictions",
        page.text(agreement),
        page.table(("", "quantized right", "quantized wrong"), counts, "tnn"),
        page.figure(figures.confusion(seen.confusion(classes)), caption),
        page.side_by_side(
            _titled(
                "Classes with the largest losses",
                ("class", "images", "float right", "quantized right"),
                [(names[k], *row) for k, *row in seen.losses(classes)],
                "tnnn",
            ),
            _titled(
                "Most frequent changes",
                ("float class", "quantized class", "images"),
                [(names[a], names[b], count) for a, b, count in seen.changes(classes)],
                "ttn",
            ),
        ),
    )


def _titled(title: str, header: Sequence[str], rows: Sequence[Any], kinds: str) -> str:
    if not rows:
        return ""
    return page.text(title, "h3") + page.table(header, rows[:_MOST_ROWS], kinds)


def _size_and_speed(run: _Run) -> str:
    float_bytes, bytes_ = run.weight_bytes()
    rows = [
        ("weights in float32", f"{float_bytes:,}", ""),
        ("quantized weights", f"{bytes_:,}", f"{float_bytes / bytes_:.2f}x"),
    ]
    text = "Weights are those of convolutions and linear layers, without scales."
    path, speed = run.folder / "model.int4.safetensors", ""
    if path.exists():
        size = path.stat().st_size
        tensors = run.problem.teacher.state_dict().values()
        everything = sum(4 * t.numel() for t in tensors if t.is_floating_point())
        rows += [
            ("float network, all tensors", f"{everything:,}", ""),
            (path.name, f"{size:,}", f"{everything / size:.2f}x"),
        ]
        text += " The file also holds scales, shifts (with biases and BN) and instructions."
        speed = _speed(run, path) if run.problem.device.type == "cpu" else ""
    table = page.table(("", "bytes", "smaller"), rows, "tnn")
    return page.section("Size and speed" if speed else "Size", table, page.text(text), speed)


def _speed(run: _Run, path: Path) -> str:
    program, images = load_program(path), run.problem.full_size_images[:1].contiguous()
    times = time_interleaved(
        {
            "float network, PyTorch": lambda: run.problem.teacher(images),
            "integer program": lambda: program(images),
        },
        _CALLS,
    )
    rows = []
    for name, seconds in times.items():
        low, median, high = (format_significant(1e3 * value) for value in quartiles(seconds))
        rows.append((name, median, f"{low} to {high}"))
    text = f"One image, threads: {torch.get_num_threads()}; {_CALLS} alternating calls of each."
    return page.table(("", "median, ms", "quartiles, ms"), rows, "tnn") + page.text(text)


def _bits_of_every_layer(run: _Run) -> str:
    rows = [
        (
            row.name,
            row.kind,
            "x".join(map(str, row.weight_shape)),
            row.weight_bits,
            row.input_bits or "float",
            {None: "", True: "signed", False: "unsigned"}[row.input_signed],
            row.output,
        )
        for row in run.layers
    ]
    header = ("layer", "type", "weight", "bits", "input bits", "", "output")
    text = "Biases, batch normalisation and the network's output are in float32."
    return page.section("Bits of every layer", page.table(header, rows, "tttnntt"), page.text(text))


def _configuration(run: _Run) -> str:
    return page.section("Configuration", page.text(run.config, "pre"))
