"""Figures S1 and S2: BN statistics separate classes, more so in deeper layers.

    python python/figure_s1_s2_bns_tsne.py                        embedded data, a minute
    python python/figure_s1_s2_bns_tsne.py --figure s1            MobileNetV1 on ImageNet
    python python/figure_s1_s2_bns_tsne.py --figure s2            MobileNetV2; --data imagenet:PATH

The float network runs on groups of images of one class. The BN statistics of a group at a layer are
one point, and t-SNE draws the points of some layers in the plane. Two numbers measure the
separation at every layer: the silhouette (1: classes apart, 0: mixed), and the incohesion, the mean
distance of a group from the centre of its class, over the mean distance between the centres of two
classes. The program writes bns_tsne.png, bns_separation.png and bns_separation.csv to --out.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import write_csv
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import StandardScaler

from fdda_ext.data import load_dataset, takes_preprocessing
from fdda_ext.engine import check_machine, run_command
from fdda_ext.errors import UsageError
from fdda_ext.models import open_model
from fdda_ext.visualization import COLOURS, MARKERS, bn_statistics, new_figure

#: Model and data of each figure.
FIGURES = {
    "glyphs": ("glyphs_mobilenet", "glyphs"),
    "s1": ("pytorchcv:mobilenet_w1", "imagenet"),
    "s2": ("torchvision:mobilenet_v2", "imagenet"),
}
#: Groups per class, images per group, layers to draw.
BUDGETS = {"smoke": (4, 2, 2), "short": (20, 4, 5), "full": (40, 8, 5)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", choices=FIGURES, default="glyphs", help="network and data")
    parser.add_argument("--model", help="another network")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--data", help="other data")
    parser.add_argument("--split", default="train", help="split that the images come from")
    parser.add_argument("--classes", type=int, default=5, help="number of classes, evenly spaced")
    parser.add_argument("--budget", choices=BUDGETS, default="short", help="number of images")
    parser.add_argument("--layers", type=int, nargs="+", help="BN layers to draw; the first is 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bns"))
    options = parser.parse_args()
    check_machine("bns", seed=options.seed, device=options.device)
    if not 2 <= options.classes <= len(MARKERS):
        raise UsageError(
            f"bns: expected classes between 2 and {len(MARKERS)} (the number of marker shapes), "
            f"got {options.classes}"
        )
    model, data = FIGURES[options.figure]
    options.model, options.data = options.model or model, options.data or data
    return options


def statistics(options: argparse.Namespace) -> tuple[list[np.ndarray], np.ndarray, list[str]]:
    """Return BN statistics ``[groups, 2 C_l]`` per layer, classes of the groups, class names."""
    groups, images, _ = BUDGETS[options.budget]
    classes = load_dataset(options.data, options.split).num_classes
    opened = open_model(options.model, weights=options.weights, num_classes=classes)
    how = opened.preprocessing if takes_preprocessing(options.data) else None
    data = load_dataset(options.data, options.split, preprocessing=how)
    network = opened.network.eval().to(options.device)
    chosen = torch.linspace(0, classes - 1, min(options.classes, classes)).long().tolist()
    random = torch.Generator().manual_seed(options.seed)
    points: list[list[torch.Tensor]] = []  # by group and layer
    for k in chosen:
        own = (data.labels == k).nonzero().flatten()
        if own.numel() < groups * images:
            raise UsageError(
                f"bns: expected {groups * images} images of class {data.class_names[k]} "
                f"({groups} groups of {images}), got {own.numel()}"
            )
        order = own[torch.randperm(own.numel(), generator=random)]
        for group in order[: groups * images].split(images):
            seen = bn_statistics(network, data.images(group)[0].to(options.device))
            points.append([torch.cat(pair, 1).cpu() for pair in zip(*seen, strict=True)])
    layers = [torch.cat(layer).numpy() for layer in zip(*points, strict=True)]
    names = [data.class_names[k] for k in chosen]
    return layers, np.repeat(np.arange(len(chosen)), groups), names


def separation(points: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return silhouette and incohesion of a layer, every dimension scaled to unit variance."""
    points = StandardScaler().fit_transform(points)
    centres = np.stack([points[labels == k].mean(0) for k in np.unique(labels)])
    within = np.linalg.norm(points - centres[labels], axis=1).mean()
    between = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    between = between[~np.eye(len(centres), dtype=bool)].mean()
    return float(silhouette_score(points, labels)), float(within / between)


def draw_planes(points: list[np.ndarray], labels: np.ndarray, names: list[str], options) -> None:
    _, images, count = BUDGETS[options.budget]
    spread = np.unique(np.linspace(0, len(points) - 1, count).round().astype(int))
    layers = [n - 1 for n in options.layers] if options.layers else spread
    figure = new_figure(2.6 * len(layers), 3.3)
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for panel, layer in zip(panels, layers, strict=True):
        plane = TSNE(perplexity=min(15, len(labels) // 4), random_state=options.seed).fit_transform(
            StandardScaler().fit_transform(points[layer])
        )
        for k, name in enumerate(names):
            style = {"color": COLOURS[k % 8], "marker": MARKERS[k % 8]}
            panel.scatter(*plane[labels == k].T, s=18, linewidths=0, label=name, **style)
        panel.set_title(f"BN layer {layer + 1} of {len(points)}", fontsize=10)
        panel.set(xticks=[], yticks=[])
    handles, found = panel.get_legend_handles_labels()
    figure.legend(handles, found, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(
        f"t-SNE of BN statistics, {options.model}\neach point: {images} images of one class",
        fontsize=11,
    )
    figure.savefig(options.out / "bns_tsne.png", dpi=150)


def draw_depth(numbers: list[tuple[float, float]], options: argparse.Namespace) -> None:
    figure = new_figure(7.2, 3.0)
    names = ("silhouette (1: classes apart)", "incohesion (0: classes apart)")
    for i, panel in enumerate(figure.subplots(1, 2)):
        values = [pair[i] for pair in numbers]
        panel.plot(range(1, len(values) + 1), values, COLOURS[i], marker=MARKERS[i], markersize=4)
        panel.set(xlabel="BN layer, in order of execution", ylabel=names[i])
        panel.set_ylim(min(0, 1.1 * min(values)), 1.05 * max(values))
        panel.grid(color="#E5E5E5")
    figure.suptitle(f"Separation of classes by their BN statistics, {options.model}", fontsize=11)
    figure.savefig(options.out / "bns_separation.png", dpi=150)


def main() -> None:
    options = parse()
    points, labels, names = statistics(options)
    if wrong := [n for n in options.layers or () if not 1 <= n <= len(points)]:
        raise UsageError(f"bns: expected layers between 1 and {len(points)}, got {wrong}")
    numbers = [separation(layer, labels) for layer in points]
    options.out.mkdir(parents=True, exist_ok=True)
    draw_planes(points, labels, names, options)
    draw_depth(numbers, options)
    rows = [(i, f"{s:.4f}", f"{r:.4f}") for i, (s, r) in enumerate(numbers, 1)]
    write_csv(options.out / "bns_separation.csv", ("layer", "silhouette", "incohesion"), rows)
    for name, (s, r) in (("first", numbers[0]), ("last", numbers[-1])):
        print(f"{name} layer: silhouette {s:.2f}, incohesion {r:.2f}")
    print(f"figures in {options.out}")


if __name__ == "__main__":
    run_command(main)
