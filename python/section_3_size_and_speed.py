"""Section 3: how much smaller and faster networks get at 8, 5 and 4 bits.

    python python/section_3_size_and_speed.py                    the paper's four networks, minutes
    python python/section_3_size_and_speed.py --model torchvision:resnet50 --budget full

Weights are random: size and speed only. Sizes are counted as papers do, bits times the weights of
convolutions and linear layers, with all layers alike or the ends at 8 bits; and measured, in bytes
of the exported file, which holds weights in their bits without gaps, scales and instructions. Times
are of the float network in PyTorch, the program, and, where installed, ONNX Runtime's and
OpenVINO's 8 bits, in turn on one CPU: median and quartiles. A network that is done is not measured
again. Below --out: size and speed as .csv and .md, and section_3.png.
"""

import argparse
import json
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
from common import write_table
from torch import nn

from fdda_ext import build_info
from fdda_ext.deploy import lower, save_program
from fdda_ext.engine import run_command
from fdda_ext.models import load_model
from fdda_ext.quantization import QuantizationConfig, bits_table, calibrate, prepare
from fdda_ext.visualization import COLOURS, new_figure, quartiles, time_in_turn

NETWORKS = "torchvision:resnet18 torchvision:mobilenet_v2 pytorchcv:mobilenet_w1 timm:regnetx_006"
#: Of both tables.
Rows = dict[str, list[list[Any]]]
FLOAT = "PyTorch float32"
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # for the peers
#: Bits of all layers, and of first and last if others.
BITS = [(8, None), (5, None), (5, 8), (4, None), (4, 8)]
SIZE_HEADER = ("network", "bits", "bits x weights, MB", "times less", "file, MB", "times less")
SPEED_HEADER = ("network", "by", "batch", "ms", "q1", "q3", "images a second", "times faster")
#: Height and width of the images, batches, calls of everything.
BUDGETS = {"smoke": (64, [1], 3), "short": (224, [1, 16], 11), "full": (224, [1, 16], 51)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=NETWORKS.split())
    parser.add_argument("--budget", choices=BUDGETS, default="short")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/section_3"))
    return parser.parse_args()


def int8_peers(network: nn.Module, images: torch.Tensor, folder: Path) -> dict[str, Any]:
    """The eight-bit runtimes that are installed, as the benchmarks build them."""
    peers = {}
    if find_spec("onnx") and find_spec("onnxruntime"):
        build = import_module("bench_program").onnxruntime_int8
        peers["ONNX Runtime int8"] = build(network, images, folder)
    if find_spec("openvino") and find_spec("nncf"):
        peers["OpenVINO int8"] = import_module("bench_program").openvino_int8(network, images)
    return peers


def measure(spec: str, options: argparse.Namespace, folder: Path) -> Rows:
    """The rows of one network in both tables."""
    size, batches, calls = BUDGETS[options.budget]
    torch.manual_seed(0)
    network = load_model(spec, weights=None, num_classes=1000).eval()
    images = torch.randn(max(batches), 3, size, size)
    everything = sum(4 * t.numel() for t in network.state_dict().values() if t.is_floating_point())
    rows: Rows = {"size": [], "speed": []}
    programs = {}
    for bits, ends in BITS:
        student = prepare(network, QuantizationConfig(bits, bits, ends), images[:1])
        calibrate(student, images[:1])
        program = lower(student)
        save_program(path := folder / "model.safetensors", program)
        weights = [(row.weight_bits, prod(row.weight_shape)) for row in bits_table(student)]
        counted, stored = sum(b * n for b, n in weights) / 8, path.stat().st_size
        less = (4 * sum(n for _, n in weights) / counted, everything / stored)
        path.unlink()
        name = f"W{bits}A{bits}" + (f", ends {ends}" if ends else "")
        numbers = (counted / 1e6, less[0], stored / 1e6, less[1])
        rows["size"].append([spec, name, *(round(x, 2) for x in numbers)])
        if ends is None:
            programs[f"fdda_ext {name}"] = program
    network.to(memory_format=torch.channels_last)
    # Of one thread, the processor's time, which other processes do not lengthen.
    clock = time.process_time if options.threads == 1 else time.perf_counter
    for batch in batches:
        x = images[:batch]
        last = x.contiguous(memory_format=torch.channels_last)
        runs = {FLOAT: lambda last=last: network(last), **int8_peers(network, x, folder)}
        runs |= {name: lambda p=program, x=x: p(x) for name, program in programs.items()}
        times = {name: quartiles(t) for name, t in time_in_turn(runs, calls, clock).items()}
        for name, (low, median, high) in times.items():
            ms = (1e3 * median, 1e3 * low, 1e3 * high)
            numbers = (*ms, batch / median, times[FLOAT][1] / median)
            rows["speed"].append([spec, name, batch, *(round(x, 2) for x in numbers)])
    return rows


def draw(found: Rows, path: Path) -> None:
    """How many times smaller the file is, and how many times faster the first batch."""
    faster = [row for row in found["speed"] if row[1] != FLOAT]
    faster = [row for row in faster if row[2] == faster[0][2]]
    figure, halves = new_figure(9.0, 3.4), (("smaller file", found["size"]), ("faster", faster))
    for axes, (what, rows) in zip(figure.subplots(1, 2), halves, strict=True):
        names = list(dict.fromkeys(row[1] for row in rows))
        networks = list(dict.fromkeys(row[0].partition(":")[2] for row in rows))
        for i, name in enumerate(names):
            values = [row[-1] for row in rows if row[1] == name]
            places = [n + (i + 0.5) / len(names) * 0.8 - 0.4 for n in range(len(values))]
            axes.bar(places, values, 0.8 / len(names), color=COLOURS[i % 8], label=name)
        axes.hlines([4, 8], -0.5, len(networks) - 0.5, "#767676", "--", linewidth=0.8, zorder=0)
        axes.set_xticks(range(len(networks)), networks, fontsize=8)
        axes.set_ylabel(f"times {what} than float32")
        axes.set_ylim(0, 1.4 * max(8, *(row[-1] for row in rows)))
        axes.legend(fontsize=7, frameon=False, loc="upper center", ncols=2)
    figure.suptitle("dashed: 4 and 8, the ratios of 32 bits to 8 and to 4", fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    folder = options.out / options.budget
    folder.mkdir(parents=True, exist_ok=True)
    found: Rows = {"size": [], "speed": []}
    for spec in options.model:
        record = folder / f"{spec.replace(':', '-')}-{options.threads}threads.json"
        if not record.exists():
            record.write_text(json.dumps(measure(spec, options, folder)))
        for name, rows in json.loads(record.read_text()).items():
            found[name] += rows
    note = f"torch {torch.__version__}, {build_info().isa}, threads: {options.threads}."
    write_table(folder / "size", "Size", SIZE_HEADER, found["size"])
    write_table(folder / "speed", "Speed", SPEED_HEADER, found["speed"], note)
    draw(found, folder / "section_3.png")


if __name__ == "__main__":
    run_command(main)
