"""Section 3: size and speed of networks at 8, 5 and 4 bits.

    python python/section_3_size_and_speed.py                    the paper's four networks, minutes
    python python/section_3_size_and_speed.py --model torchvision:resnet50 --budget full

Weights are random, since only size and speed are measured. Sizes are given as papers count them
(bits times weights of convolutions and linear layers) and in bytes of the exported file (packed
weights, scales, instructions). First and last layer have the bits of the others, or 8. Times are
median and quartiles of interleaved calls. The peers are the float network in PyTorch and, if
installed, ONNX Runtime and OpenVINO at 8 bits on a CPU. On a GPU the integer programs run as CUDA
graphs, and the peers are float32, and float16 with and without a CUDA graph. Results are size and
speed as .csv and .md, and section_3.png, below --out. Measurements of the same network on the same
machine with the same versions are not repeated.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
from common import write_table
from torch import nn

from fdda_ext import build_info
from fdda_ext.deploy import capture, lower, save_program
from fdda_ext.engine import check_machine, format_significant, run_command
from fdda_ext.models import load_model
from fdda_ext.quantization import QuantizationConfig, bits_table, calibrate, prepare
from fdda_ext.visualization import COLOURS, new_figure, quartiles, time_interleaved

NETWORKS = "torchvision:resnet18 torchvision:mobilenet_v2 pytorchcv:mobilenet_w1 timm:regnetx_006"
#: Rows of the tables "size" and "speed".
Rows = dict[str, list[list[Any]]]
FLOAT = "PyTorch float32"
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # for the peers
#: Bits of all layers, and of the first and the last layer if they differ.
BITS = [(8, None), (5, None), (5, 8), (4, None), (4, 8)]
SIZE_HEADER = ("network", "bits", "bits x weights, MB", "times less", "file, MB", "times less")
SPEED_HEADER = ("network", "by", "batch", "ms", "q1", "q3", "images a second", "times faster")
#: Height and width of the images, batch sizes, number of timed calls.
BUDGETS = {"smoke": (64, [1], 3), "short": (224, [1, 16], 11), "full": (224, [1, 16], 51)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=NETWORKS.split())
    parser.add_argument("--budget", choices=BUDGETS, default="short")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/section_3"))
    options = parser.parse_args()
    check_machine("section_3", threads=options.threads, device=options.device)
    options.device = torch.device(options.device)
    return options


def circumstances(options: argparse.Namespace) -> str:
    """Describe the machine and the versions that times depend on."""
    peers = [name for name in ("onnxruntime", "openvino") if find_spec(name)]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *peers))
    height = BUDGETS[options.budget][0]
    if options.device.type == "cuda":
        where = torch.cuda.get_device_name(options.device)
    else:
        where = f"{processor()}, {build_info().isa}, threads: {options.threads}"
    return f"{where}; {versions}; images {height}x{height}, no gradients"


def processor() -> str:
    """Return the name of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def int8_peers(network: nn.Module, images: torch.Tensor, folder: Path) -> dict[str, Any]:
    """Return calls of the installed eight-bit runtimes."""
    peers = {}
    if find_spec("onnx") and find_spec("onnxruntime"):
        build = import_module("peers").onnxruntime_int8
        peers["ONNX Runtime int8"] = build(network, images, folder)
    if find_spec("openvino") and find_spec("nncf"):
        peers["OpenVINO int8"] = import_module("peers").openvino_int8(network, images)
    return peers


def waiting(run: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that calls ``run`` and waits for the GPU."""

    def body() -> None:
        run()
        torch.cuda.synchronize()

    return body


def measure(spec: str, options: argparse.Namespace, folder: Path) -> Rows:
    """Return the rows of one network for both tables."""
    size, batches, calls = BUDGETS[options.budget]
    torch.manual_seed(0)
    network = load_model(spec, weights=None, num_classes=1000).eval()
    images = torch.randn(max(batches), 3, size, size)
    everything = sum(4 * t.numel() for t in network.state_dict().values() if t.is_floating_point())
    rows: Rows = {"size": [], "speed": []}
    weights_alone = 4 * sum(
        m.weight.numel() for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    )
    size_row = [round(weights_alone / 1e6, 2), 1.0, round(everything / 1e6, 2), 1.0]
    rows["size"].append([spec, "float32", *size_row])
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
            programs[f"fdda_ext {name}"] = program.to(options.device)
    network.to(options.device, memory_format=torch.channels_last)
    is_cpu = options.device.type == "cpu"
    # For one thread, take the CPU time of this process, which other processes affect less.
    clock = time.process_time if is_cpu and options.threads == 1 else time.perf_counter
    for batch in batches:
        x = images[:batch].to(options.device)
        last = x.contiguous(memory_format=torch.channels_last)
        runs = {FLOAT: lambda last=last: network(last)}
        runs |= (
            int8_peers(network, x, folder)
            if is_cpu
            else import_module("peers").float16(network, last)
        )
        for name, program in programs.items():
            ours = program if is_cpu else capture(program, x)
            runs[name] = lambda ours=ours, x=x: ours(x)
        if not is_cpu:
            runs = {name: waiting(run) for name, run in runs.items()}
        with torch.inference_mode():  # parameters of the peers require gradients
            times = {name: quartiles(t) for name, t in time_interleaved(runs, calls, clock).items()}
        for name, (low, median, high) in times.items():
            ms = (1e3 * median, 1e3 * low, 1e3 * high)
            # If the clock is too coarse for a call, speeds are unknown.
            known = median > 0 and times[FLOAT][1] > 0
            rates = (batch / median, times[FLOAT][1] / median) if known else ()
            cells = [format_significant(x, 4) for x in (*ms, *rates)]
            rows["speed"].append([spec, name, batch, *cells, *[""] * (5 - len(cells))])
    return rows


def draw(found: Rows, path: Path, note: str) -> None:
    """Plot how many times smaller the file and how many times faster the first batch size is."""
    smaller = [row for row in found["size"] if row[1] != "float32"]
    faster = [row for row in found["speed"] if row[1] != FLOAT and row[-1]]
    faster = [row for row in faster if row[2] == faster[0][2]]
    batch = found["speed"][0][2]
    halves = (("file: times smaller", smaller), (f"batch {batch}: times faster", faster))
    figure = new_figure(9.0, 3.8)
    for axes, (what, rows) in zip(figure.subplots(1, 2), halves, strict=True):
        names = list(dict.fromkeys(row[1] for row in rows))
        networks = list(dict.fromkeys(row[0].rpartition(":")[2] for row in rows))
        for i, name in enumerate(names):
            mine = [row for row in rows if row[1] == name]
            values = [float(row[-1]) for row in mine]
            groups = [networks.index(row[0].rpartition(":")[2]) for row in mine]
            places = [n + (i + 0.5) / len(names) * 0.8 - 0.4 for n in groups]
            axes.bar(places, values, 0.8 / len(names), color=COLOURS[i % 8], label=name)
        axes.hlines([4, 8], -0.5, len(networks) - 0.5, "#767676", "--", linewidth=0.8, zorder=0)
        axes.set_xticks(range(len(networks)), networks, fontsize=8)
        axes.set_ylabel(f"{what} than float32")
        axes.set_ylim(0, 1.4 * max([8.0, *(float(row[-1]) for row in rows)]))
        if names:
            axes.legend(fontsize=7, frameon=False, loc="upper center", ncols=2)
    figure.suptitle(f"dashed: the paper's 4 to 8 times\n{note}", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    folder = options.out / options.budget
    folder.mkdir(parents=True, exist_ok=True)
    found: Rows = {"size": [], "speed": []}
    note = circumstances(options)
    for spec in options.model:
        path = folder / f"{spec.replace(':', '-')}.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        if record.get("circumstances") != note:
            record = {"circumstances": note, "rows": measure(spec, options, folder)}
            path.write_text(json.dumps(record))
        for name, rows in record["rows"].items():
            found[name] += rows
    write_table(folder / "size", "Size", SIZE_HEADER, found["size"])
    write_table(folder / "speed", "Speed", SPEED_HEADER, found["speed"], note)
    draw(found, folder / "section_3.png", note)


if __name__ == "__main__":
    run_command(main)
