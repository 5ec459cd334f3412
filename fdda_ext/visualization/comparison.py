"""Figures of a comparison: accuracies, synthetic images and their BN statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .figures import COLOURS, MARKERS, new_figure, plain, render, to_rgb
from .measures import bn_statistics, statistics_distance

__all__ = ["accuracies", "distances", "image_rows"]


def accuracies(tables: Mapping[str, tuple[float, Mapping[str, Sequence[float]]]]) -> bytes:
    """Plot top-1 of every run (dots) and the means (lines) as PNG.

    Args:
        tables: One diagram by title: top-1 of the float network, and top-1 of all seeds by row.
    """
    columns = min(len(tables), 2)
    lines = -(-len(tables) // columns)
    height = 1.0 + 0.24 * max(len(rows) for _, rows in tables.values())
    figure = new_figure(width=5.0 * columns, height=height * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (title, (float_top1, rows)) in zip(panels, tables.items(), strict=False):
        for place, top1 in enumerate(rows.values()):
            axes.plot(top1, [place] * len(top1), "o", markersize=4, color=COLOURS[0], alpha=0.6)
            mean = sum(top1) / len(top1)
            axes.plot([mean] * 2, [place - 0.3, place + 0.3], color=COLOURS[1], linewidth=2)
        axes.axvline(float_top1, color="#555555", linestyle="--", linewidth=1)
        plain(axes, "top-1 %; dots: seeds; line: mean; dashed: float network", "")
        axes.set_yticks(range(len(rows)), list(rows), parse_math=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(title, fontsize=9, parse_math=False)
    for axes in panels[len(tables) :]:
        axes.set_visible(False)
    return render(figure, "png")


def image_rows(rows: Mapping[str, Tensor], columns: int = 16) -> bytes:
    """Draw one row of images for every method, as PNG.

    Args:
        rows: Images ``[n, C, H, W]`` from 0 to 1, by method.
        columns: Largest number of images per method.
    """
    height, width = next(iter(rows.values())).shape[-2:]
    down, right = (size + max(size // 8, 1) for size in (height, width))
    mosaic = torch.ones(3, len(rows) * down, columns * right)
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(images[:columns]):
            y, x = row * down, column * right
            mosaic[:, y : y + height, x : x + width] = to_rgb(image)
    figure = new_figure(height=0.2 + 6.2 * len(rows) * down / right / columns)
    axes = figure.subplots()
    axes.imshow(mosaic.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks(
        [row * down + height / 2 for row in range(len(rows))],
        list(rows),
        fontsize=8,
        parse_math=False,
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return render(figure, "png")


def distances(
    network: nn.Module, images: Mapping[str, Tensor], real: Tensor, title: str = ""
) -> bytes:
    """Plot the distance of the BN statistics of images from real ones, by layer, as PNG.

    Args:
        network: Float network.
        images: Normalised images ``[n, C, H, W]``, by name.
        real: Normalised real images ``[n, C, H, W]``.
        title: Title of the figure.
    """
    target = bn_statistics(network, real)
    figure = new_figure(height=3.6)
    axes = figure.subplots()
    for i, (name, some) in enumerate(images.items()):
        values = statistics_distance(bn_statistics(network, some), target)
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=COLOURS[i % 8],
            marker=MARKERS[(i + i // 8) % 8],  # colours repeat with other markers
            linestyle="-" if i < 8 else "--",
            markersize=3.5,
            linewidth=1.3,
            label=f"{name} ({sum(values) / len(values):.2f})",
        )
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10, parse_math=False)
    plain(axes, "BN layer, in order of execution", "distance from real images, std")
    figure.legend(loc="outside upper left", ncols=4, fontsize=8, frameon=False)
    return render(figure, "png")
