"""``report.html`` of a run: one file without scripts that needs no network and can be printed."""

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
    time_in_turn,
)

__all__ = ["write_report"]

#: Images for the errors of layers, and at most for statistics.
_LAYER_IMAGES, _STATISTICS_IMAGES = 64, 256
#: Classes, and generated images of each, that are shown.
_SHOWN_CLASSES, _SHOWN_IMAGES = 12, 3
#: Of the longest tables of predictions.
_MOST_ROWS = 10
#: Calls of each network, to time them.
_CALLS = 21


def write_report(folder: Path, problem: Problem, test: BatchSource) -> Path:
    """Write ``report.html`` into a run folder.

    A section whose data the folder lacks is left out.

    Args:
        folder: Of a run that has a student, or of one of its baselines.
        problem: The network and the calibration images that the run started from.
        test: Images on which predictions and layers are compared. Accuracies are not measured
            again: they are those that the folder holds.

    Returns:
        The file.

    Raises:
        UsageError: If the folder has no student, or a damaged one.
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
    """A run folder, opened.

    Attributes:
        folder: Where it is.
        problem: What it started from.
        student: What it ended with, on the problem's device.
        recipe: What the student was built from.
        test: Images to measure on.
    """

    folder: Path
    problem: Problem
    student: GraphModule
    recipe: dict[str, Any]
    test: BatchSource

    @property
    def name(self) -> str:
        """The method's."""
        return str(self.recipe["method"])

    @property
    def method(self) -> type[Method]:
        """What was run."""
        return method_class(self.name)

    @property
    def dataset(self) -> ImageDataset:
        """What the test images are of."""
        return cast(ImageDataset, self.test.dataset)

    @cached_property
    def config(self) -> str:
        """The configuration as YAML."""
        return (self.folder / "config.yaml").read_text()

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """What was logged, in order."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """What the finished methods ended with, by name: the baselines, then the run's own."""
        paths = [
            *sorted(self.folder.glob("baselines/*/summary.json")),
            self.folder / "summary.json",
        ]
        found = [json.loads(path.read_text()) for path in paths if path.exists()]
        return {row["name"]: row for row in found}

    @cached_property
    def float_top1(self) -> float | None:
        """Of the float network, per cent of the run's images."""
        return next((row["float_top1"] for row in self.rows.values() if "float_top1" in row), None)

    @cached_property
    def generated(self) -> dict[str, Tensor] | None:
        """``images [n, C, H, W]``, normalised, and ``labels [n]``, if the run kept any."""
        path = self.folder / "images.safetensors"
        return load_file(str(path)) if path.exists() else None

    @cached_property
    def layers(self) -> list[LayerBits]:
        """The table of bits."""
        return bits_table(self.student)

    def weight_bytes(self) -> tuple[int, int]:
        """Of all convolutions and linear layers: in float32, and in the bits that they have."""
        sizes = [(row.weight_bits, torch.Size(row.weight_shape).numel()) for row in self.layers]
        return 4 * sum(n for _, n in sizes), sum(bits * n for bits, n in sizes) // 8


def _lead(run: _Run) -> str:
    """One sentence, and the numbers that matter most."""
    own, float_top1 = run.rows.get(run.name), run.float_top1
    items = []
    if own:
        items.append((f"{_top(own, 'top1')} %", f"top-1, {_tested(own)} images"))
    if own and float_top1 is not None:
        change = f"{own['top1'] - float_top1:+.2f}".replace("-", "−")
        items.append((change, "points against the float network"))
    float_bytes, bytes_ = run.weight_bytes()
    items.append((f"{float_bytes / bytes_:.1f}x", "smaller weights than in 32 bits"))
    if own and own["planned"]:
        items.append((format_duration(own["seconds"]), f"training, {own['iterations']} iterations"))
    summary = run.method.summary if own else f"{run.method.summary} (unfinished)"
    return page.text(summary) + page.key_numbers(items)


def _top(row: dict[str, Any], name: str) -> str:
    """An accuracy of a summary, with its standard error if the images are a sample."""
    return render_percent(row[name], row["images"], row.get("of", 0))


def _tested(row: dict[str, Any]) -> str:
    """How many images were tested, and out of how many if they are a sample."""
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
    what = f"After the last step of training, over {_tested(first)} {split} images."
    if first["images"] < first.get("of", 0):
        what += (
            " Behind ± stands the standard error of a sample, the typical distance from the "
            "accuracy over all images. All rows have the same images."
        )
    return page.section("Accuracy", page.table(header, lines, "tnnnnn"), page.text(what))


def _what_was_done(run: _Run) -> str:
    problem, info, q = run.problem, build_info(), run.problem.quantization
    weights = yaml.safe_load(run.config)["weights"]
    ends = f"first and last layer {q.first_last_bits}" if q.first_last_bits else "all layers alike"
    seen = "" if run.method.real_images else ", which this method does not see"
    versions = f"fdda_ext {info.version}, torch {info.torch}, Python {platform.python_version()}"
    where = f"{problem.device.type}, {platform.machine()} with {info.isa}, threads: {info.threads}"
    path = run.folder / "origin.json"
    origin = json.loads(path.read_text()) if path.exists() else {}
    begun = [("begun", "date"), ("with", "versions"), ("on", "machine")]
    rows = (
        ("method", run.name),
        ("network", f"{run.recipe['model']}, weights: {weights}"),
        ("data", f"{run.recipe['data']}, {problem.num_classes} classes"),
        ("images", f"{show_image_size(problem.image_size)} pixels, {problem.channels} channel(s)"),
        ("calibration images", f"{len(problem.images)}{seen}"),
        ("bits", f"weights {q.weight_bits}, activations {q.activation_bits}, {ends}"),
        (
            "grid",
            f"{q.grid}; ranges of weights: {q.weight_range}, activations: {q.activation_range}",
        ),
        ("seed", str(problem.seed)),
        ("teacher in", str(problem.precision).removeprefix("torch.")),
        *((what, origin[key]) for what, key in begun if key in origin),
        ("again", "python -m fdda_ext.train --config config.yaml --out ANOTHER_FOLDER"),
        ("this report made with", versions),
        ("on", where),
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
        f"Accuracy in training. Best: {max(curve[1]):.2f} %, last: {curve[1][-1]:.2f} %. What is "
        "reported is the last step, not the best. The float network was tested at the end."
    )
    own = run.rows.get(run.name, {})
    whole = max(own.get("of", 0), own.get("images", 0))
    error = standard_error(curve[1][-1], int(lines[-1]["images"]), whole)
    if error:
        caption += f" A point of the curve has a standard error of {error:.2f} at the end."
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
        "Losses as they were logged, each in its own scale, which is logarithmic where the largest "
        "value is more than 30 times the smallest."
    )
    figures_shown = [page.figure(image, caption)]
    if decided is not None:
        image = figures.curves({"decided": decided}, "iteration", "decided, share of roundings")
        caption = (
            "Learned rounding: the share of weights, of those that are learned at the time, that "
            "have decided to go down or up, to within 0.01."
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
        "Units in the order they were reconstructed in; the curves above jump where one begins. "
        "The loss is the error of the unit's output. Decided: roundings within 0.01 of down or up "
        "at the end. Divergence: of the whole network's predictions from the float network's "
        "(Kullback and Leibler), when the unit was finished."
    )
    content = [page.table(header, rows, "tnnnnn"), page.text(text)]
    divergences = [unit["divergence"] for unit in units if "divergence" in unit]
    if divergences:
        curve = (range(1, len(divergences) + 1), divergences)
        image = figures.curves(
            {"divergence": curve}, "units finished", "divergence of predictions", from_zero=True
        )
        caption = (
            "The loss of the task, unit by unit: how far predictions for calibration images are "
            "from the float network's. Units that are not reconstructed yet are rounded to nearest."
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
        "A calibration image of a class, and below it images that were generated for the class: "
        f"the {len(columns)} classes that are commonest among the {len(labels)} images of the run."
    )
    device = run.problem.device
    agreement, found = judge(run.problem.teacher, images.to(device), labels.to(device))
    judgement = (
        f"The float network takes {agreement:.1f} % of these {len(labels)} images for what they "
        f"were made for; it finds {found} of the {len(counts)} classes in them, where "
        f"{int(counts.count_nonzero())} were asked for."
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
        f"How far the statistics of {len(images)} images of each kind, at the input of every BN "
        f"layer, are from those of the {len(run.problem.images)} calibration images: 2-Wasserstein "
        "distance of Gaussians over all channels, in standard deviations of the calibration "
        f"images' activations. Mean over the layers: {means}."
    )
    return page.section("BN statistics of generated images", page.figure(image, caption))


def _errors_by_layer(run: _Run) -> str:
    images = some_images(run.test, _LAYER_IMAGES, run.problem.device)
    ratios = layer_sqnr(run.problem.teacher, run.student, images)
    worst = min(ratios, key=lambda layer: ratios[layer])
    caption = (
        "Signal to quantization noise of what every layer makes, batch normalisation included, "
        f"against the float network, over {len(images)} test images. The noise of earlier layers "
        f"is in it; 20 dB is an error of a tenth. Lowest: {worst}, {ratios[worst]:.1f} dB."
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
        "Float and quantized network say the same of "
        f"{render_percent(seen.agreement, count, whole)} % of {count} test images"
        + (f", a sample of {whole} (± standard error)." if count < whole else ".")
    )
    caption = (
        "What the float network takes an image for, and what the quantized one does, classes in "
        "the order of the data. Off the diagonal they differ."
    )
    return page.section(
        "Predictions",
        page.text(agreement),
        page.table(("", "quantized right", "quantized wrong"), counts, "tnn"),
        page.figure(figures.confusion(seen.confusion(classes)), caption),
        page.side_by_side(
            _titled(
                "Classes that lose most",
                ("class", "images", "float right", "quantized right"),
                [(names[k], *row) for k, *row in seen.losses(classes)],
                "tnnn",
            ),
            _titled(
                "Commonest changes",
                ("float says", "quantized says", "images"),
                [(names[a], names[b], count) for a, b, count in seen.changes(classes)],
                "ttn",
            ),
        ),
    )


def _titled(title: str, header: Sequence[str], rows: Sequence[Any], kinds: str) -> str:
    """The first rows of a table under a title; nothing if there are none."""
    if not rows:
        return ""
    return page.text(title, "h3") + page.table(header, rows[:_MOST_ROWS], kinds)


def _size_and_speed(run: _Run) -> str:
    float_bytes, bytes_ = run.weight_bytes()
    rows = [
        ("weights in 32 bits", f"{float_bytes:,}", ""),
        ("weights in their bits", f"{bytes_:,}", f"{float_bytes / bytes_:.2f}x"),
    ]
    text = "Weights are those of convolutions and linear layers: parameters times bits."
    path, speed = run.folder / "model.int4.safetensors", ""
    if path.exists():
        size = path.stat().st_size
        tensors = run.problem.teacher.state_dict().values()
        everything = sum(4 * t.numel() for t in tensors if t.is_floating_point())
        rows += [
            ("the float network, all tensors", f"{everything:,}", ""),
            (path.name, f"{size:,}", f"{everything / size:.2f}x"),
        ]
        text += " The file has scales, shifts that biases and BN are folded into, and instructions."
        speed = _speed(run, path) if run.problem.device.type == "cpu" else ""
    table = page.table(("", "bytes", "smaller"), rows, "tnn")
    return page.section("Size and speed" if speed else "Size", table, page.text(text), speed)


def _speed(run: _Run, path: Path) -> str:
    program, images = load_program(path), run.problem.images[:1].contiguous()
    times = time_in_turn(
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
    text = f"One image, threads: {torch.get_num_threads()}; {_CALLS} calls of each, in turn."
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
    text = "Biases, batch normalisation and the network's output are in float."
    return page.section("Bits of every layer", page.table(header, rows, "tttnntt"), page.text(text))


def _configuration(run: _Run) -> str:
    return page.section("Configuration", page.text(run.config, "pre"))
