"""Figures of a report, as bytes of SVG (curves, bars) or PNG (images).

matplotlib is imported on first use and without pyplot, so no global state and no backend changes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "MARKERS",
    "bars",
    "confusion",
    "curves",
    "image_columns",
    "new_figure",
    "panels",
    "plain",
]

#: Colours that colour-blind readers can distinguish (mostly Okabe and Ito's), and their markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
MARKERS = "osD^vPX*"
#: Width of a page in inches.
_WIDTH = 7.2
_GREY = "#767676"


def new_figure(width: float = _WIDTH, height: float = 2.8) -> Figure:
    """Create a figure with automatic layout, independent of global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def render(figure: Figure, form: str) -> bytes:
    """Render ``figure`` as "svg" or "png"; equal figures give equal bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "fdda_ext"}), warnings.catch_warnings():
        # The font may lack the script of a class name.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format=form, dpi=160, metadata=metadata)
    return buffer.getvalue()


def plain(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Set labels, a light grid and a minimal frame."""
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#E5E5E5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    *,
    level: tuple[str, float] | None = None,
    from_zero: bool = False,
) -> bytes:
    """Plot curves ``(x, y)`` in one diagram, as SVG.

    Args:
        series: Curves by name.
        xlabel: Quantity and unit of x.
        ylabel: Quantity and unit of y.
        level: Name and height of a horizontal line.
        from_zero: Whether y begins at 0.
    """
    figure = new_figure(height=3.0)
    axes = figure.subplots()
    for i, (name, (x, y)) in enumerate(series.items()):
        style: dict[str, Any] = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8]}
        axes.plot(x, y, markersize=3.5, linewidth=1.4, label=name, **style)
    if level is not None:
        name, height = level
        axes.axhline(height, color=_GREY, linewidth=1.2, linestyle="--", label=name)
    if from_zero:
        axes.set_ylim(bottom=0)
    plain(axes, xlabel, ylabel)
    figure.legend(loc="outside upper left", ncols=4, fontsize=8, frameon=False)
    return render(figure, "svg")


def confusion(counts: Tensor) -> bytes:
    """Plot ``counts [K, K]`` of pairs of predicted classes as PNG; 0 is white."""
    from matplotlib.colors import LogNorm

    figure = new_figure(5.2, 4.4)
    axes = figure.subplots()
    shown = counts.double().cpu().numpy()
    shown[shown == 0] = float("nan")
    scale = LogNorm(1, max(float(counts.max()), 2.0))
    picture = axes.imshow(shown, cmap="viridis_r", norm=scale, interpolation="nearest")
    axes.set_xlabel("class, quantized network", fontsize=9)
    axes.set_ylabel("class, float network", fontsize=9)
    axes.tick_params(labelsize=8)
    bar = figure.colorbar(picture, ax=axes, shrink=0.8)
    bar.set_label("images", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return render(figure, "png")


def panels(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str
) -> bytes:
    """Plot every curve ``(x, y)`` in a diagram of its own, as SVG, since their units differ."""
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = new_figure(height=0.4 + 1.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for axes, (name, (x, y)) in zip(grid, series.items(), strict=False):
        few = MARKERS[0] if len(x) < 10 else None  # one point makes no line
        axes.plot(x, y, color=COLOURS[0], linewidth=1.2, marker=few, markersize=3)
        plain(axes, "", "")
        axes.set_title(name, fontsize=9, parse_math=False)
        positive = [value for value in y if value > 0]
        if len(positive) == len(y) and max(y) > 30 * min(y):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, *y) if len(y) > 1 else None)
    for axes in list(grid)[len(series) :]:
        axes.set_visible(False)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    return render(figure, "svg")


def bars(values: Mapping[str, float], label: str) -> bytes:
    """Plot a horizontal bar for each name, the first on top, as SVG."""
    figure = new_figure(height=0.6 + 0.16 * max(len(values), 4))
    axes = figure.subplots()
    places = range(len(values))
    axes.barh(places, list(values.values()), color=COLOURS[0], height=0.7)
    plain(axes, label, "")
    axes.grid(visible=False, axis="y")
    axes.set_yticks(places, list(values), fontsize=7, parse_math=False)
    axes.set_ylim(len(values) - 0.4, -0.6)
    return render(figure, "svg")


def to_rgb(images: Tensor) -> Tensor:
    """Convert images ``[..., C, H, W]`` to ``[..., 3, H, W]`` and drop the opacity."""
    repeats = (*(1,) * (images.dim() - 3), 3, 1, 1)
    return images.repeat(repeats) if images.shape[-3] == 1 else images[..., :3, :, :]


def image_columns(columns: Mapping[str, tuple[Tensor, Sequence[Tensor]]]) -> bytes:
    """Draw for each class a real image above generated ones, as PNG.

    Args:
        columns: Real image and generated images by class name, ``[C, H, W]`` from 0 to 1.
    """
    height, width = next(iter(columns.values()))[0].shape[-2:]
    down, right = (size + max(size // 8, 1) for size in (height, width))
    rows = 1 + max(len(others) for _, others in columns.values())
    mosaic = torch.ones(3, rows * down, len(columns) * right)
    for column, (real, others) in enumerate(columns.values()):
        for row, image in enumerate([real, *others]):
            y, x = row * down, column * right
            mosaic[:, y : y + height, x : x + width] = to_rgb(image)
    figure = new_figure(height=0.35 + _WIDTH * rows * down / right / (len(columns) + 0.8))
    axes = figure.subplots()
    axes.imshow(mosaic.permute(1, 2, 0).numpy(), interpolation="nearest")
    centres = [column * right + width / 2 for column in range(len(columns))]
    axes.set_xticks(centres, [name[:14] for name in columns], fontsize=8, parse_math=False)
    axes.set_yticks([height / 2, down + height / 2], ["real", "generated"], fontsize=8)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return render(figure, "png")
