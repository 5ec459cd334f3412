"""Figures S1 and S2: batch-normalisation statistics (BNS) gather by class, the deeper the more.

    python python/figure_s1_s2_bns_tsne.py                                embedded data, a minute
    python python/figure_s1_s2_bns_tsne.py --model pytorchcv:mobilenet_w1 --data imagenet:PATH   S1
    python python/figure_s1_s2_bns_tsne.py --model torchvision:mobilenet_v2 --data imagenet:PATH S2

Groups of images of one class pass through the float network. The mean and variance of what enters
each batch-normalisation layer are a group's BNS there: a point, which t-SNE draws in the plane for
some layers. For every layer two numbers say what the eye sees: the silhouette (1: classes apart, 0:
mixed), and the incohesion, the mean distance of a group from its class's centre over the mean
distance between the centres of two classes. Written to --out: bns_tsne.png, bns_separation.png and
bns_separation.csv.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import StandardScaler

from fdda_ext.data import load_dataset, takes_preprocessing
from fdda_ext.engine import run_command
from fdda_ext.errors import UsageError
from fdda_ext.models import open_model
from fdda_ext.ops import class_batch_stats
from fdda_ext.statistics import capture

#: Okabe and Ito's palette, which colour-blind eyes can tell apart, and a shape for each.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
MARKERS = "osD^vPX*"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="glyphs_mobilenet")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--data", default="glyphs")
    parser.add_argument("--split", default="train", help="which images")
    parser.add_argument("--classes", type=int, default=5, help="spread over the data's classes")
    parser.add_argument("--groups", type=int, default=20, help="of each class")
    parser.add_argument("--images", type=int, default=4, help="in a group")
    parser.add_argument("--panels", type=int, default=5, help="layers that are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bns"))
    options = parser.parse_args()
    for name, least in (("classes", 2), ("groups", 2), ("images", 1), ("panels", 2)):
        if getattr(options, name) < least:
            raise UsageError(f"bns: expected {name} at least {least}, got {getattr(options, name)}")
    return options


def statistics(options: argparse.Namespace) -> tuple[list[np.ndarray], np.ndarray, list[str]]:
    """BNS ``[groups, 2 C_l]`` of every layer, the groups' classes, and the classes' names."""
    classes = load_dataset(options.data, options.split).num_classes
    opened = open_model(options.model, weights=options.weights, num_classes=classes)
    how = opened.preprocessing if takes_preprocessing(options.data) else None
    data = load_dataset(options.data, options.split, preprocessing=how)
    chosen = torch.linspace(0, classes - 1, min(options.classes, classes)).long().tolist()
    random = torch.Generator().manual_seed(options.seed)
    groups: list[list[torch.Tensor]] = []
    for k in chosen:
        own = (data.labels == k).nonzero().flatten()
        needed = options.groups * options.images
        if own.numel() < needed:
            raise UsageError(
                f"bns: expected {needed} images of class {data.class_names[k]} "
                f"({options.groups} groups of {options.images}), got {own.numel()}"
            )
        own = own[torch.randperm(own.numel(), generator=random)[:needed]]
        images, _ = data.images(own)
        index = torch.arange(options.groups).repeat_interleave(options.images)
        with torch.no_grad():
            seen = capture(opened.network.eval(), images)
        layers = [class_batch_stats(x, index, options.groups) for x in seen.inputs]
        groups.append([torch.cat([mean, variance], 1) for _, mean, variance in layers])
    points = [torch.cat(parts).numpy() for parts in zip(*groups, strict=True)]
    names = [data.class_names[k] for k in chosen]
    return points, np.repeat(np.arange(len(chosen)), options.groups), names


def separation(points: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Silhouette and incohesion of one layer, every dimension scaled to unit variance."""
    points = StandardScaler().fit_transform(points)
    centres = np.stack([points[labels == k].mean(0) for k in np.unique(labels)])
    within = np.linalg.norm(points - centres[labels], axis=1).mean()
    between = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    between = between[~np.eye(len(centres), dtype=bool)].mean()
    return float(silhouette_score(points, labels)), float(within / between)


def draw_planes(points: list[np.ndarray], labels: np.ndarray, names: list[str], options) -> None:
    layers = np.unique(np.linspace(0, len(points) - 1, options.panels).round().astype(int))
    figure, panels = plt.subplots(1, len(layers), figsize=(2.6 * len(layers), 3.1), squeeze=False)
    for panel, layer in zip(panels[0], layers, strict=True):
        plane = TSNE(perplexity=min(15, len(labels) // 4), random_state=options.seed).fit_transform(
            StandardScaler().fit_transform(points[layer])
        )
        for k, name in enumerate(names):
            x, y = plane[labels == k].T
            style = {"color": COLOURS[k % 8], "marker": MARKERS[k % 8]}
            panel.scatter(x, y, s=18, linewidths=0, label=name, **style)
        panel.set_title(f"BN layer {layer + 1} of {len(points)}", fontsize=10)
        panel.set_xticks([])
        panel.set_yticks([])
    handles, labels_ = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels_, loc="lower center", ncols=len(names), frameon=False)
    figure.suptitle(
        f"t-SNE of BN statistics, {options.model}: a point is a group of {options.images} "
        "images of one class",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(options.out / "bns_tsne.png", dpi=150)


def draw_depth(numbers: list[tuple[float, float]], options: argparse.Namespace) -> None:
    figure, panel = plt.subplots(figsize=(6.4, 3.4))
    depth = range(1, len(numbers) + 1)
    silhouettes, ratios = zip(*numbers, strict=True)
    panel.plot(depth, silhouettes, color=COLOURS[0], marker="o", ms=4, label="silhouette")
    panel.plot(depth, ratios, color=COLOURS[1], marker="s", ms=4, ls="--", label="incohesion")
    panel.set_xlabel("BN layer, in order of execution")
    panel.set_ylabel("silhouette; incohesion")
    panel.axhline(0, color="0.8", lw=0.8, zorder=0)
    panel.set_title(f"Separation of classes by their BN statistics, {options.model}", fontsize=11)
    panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(options.out / "bns_separation.png", dpi=150)


def main(arguments: object = None) -> None:
    options = parse()
    points, labels, names = statistics(options)
    numbers = [separation(layer, labels) for layer in points]
    options.out.mkdir(parents=True, exist_ok=True)
    draw_planes(points, labels, names, options)
    draw_depth(numbers, options)
    with (options.out / "bns_separation.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "silhouette", "incohesion"])
        writer.writerows((i, f"{s:.4f}", f"{r:.4f}") for i, (s, r) in enumerate(numbers, 1))
    for name, (s, r) in (("first", numbers[0]), ("last", numbers[-1])):
        print(f"{name} layer: silhouette {s:.2f}, incohesion {r:.2f}")
    print(f"figures in {options.out}")


if __name__ == "__main__":
    run_command(main)
