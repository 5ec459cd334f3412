"""Measure load time and peak memory of inference at batch 1, in a new process each time.

python benchmarks/inference_cost.py [--network torchvision:resnet18] [--rounds 5]

Prints a Markdown table: time from a file to the first logits, and peak memory up to then, beyond
that of the imported libraries. The peers are the float network in torch and, if installed, OpenVINO
and ONNX Runtime at eight bits.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peers import onnxruntime_files, openvino_model

from fdda_ext.deploy import lower, save_program
from fdda_ext.models import load_model
from fdda_ext.quantization import QuantizationConfig, calibrate, prepare

# Code of the processes: import, note the memory, load, run once.
LOADERS = {
    "fdda_ext int4": """
import fdda_ext, fdda_ext.deploy, torch
ready()
program = fdda_ext.load(path)
with torch.inference_mode(): program(torch.zeros(1, 3, 224, 224))
""",
    "openvino int8": """
import openvino, numpy
core = openvino.Core()
ready()
model = core.compile_model(path, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
model(numpy.zeros((1, 3, 224, 224), numpy.float32))
""",
    "onnxruntime int8": """
import onnxruntime, numpy
ready()
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
session.run(None, {"x": numpy.zeros((1, 3, 224, 224), numpy.float32)})
""",
    "torch float32": """
import torch
from fdda_ext.models import load_model
load_model("glyphs_resnet")
ready()
network = load_model(sys.argv[2], weights=None, num_classes=1000).eval()
network.load_state_dict(torch.load(path, weights_only=True))
with torch.inference_mode(): network(torch.zeros(1, 3, 224, 224))
""",
}
FRAME = """
import json, sys, time
path = sys.argv[1]
def kibibytes(what):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[what].split()[0])
def ready():
    global before, start
    before, start = kibibytes("VmRSS"), time.perf_counter()
{body}
seconds = time.perf_counter() - start
print(json.dumps([seconds * 1e3, (kibibytes("VmHWM") - before) / 1024]))
"""


def write_files(spec: str, folder: Path) -> dict[str, Path]:
    """Write the network as a file for every installed peer."""
    torch.manual_seed(0)
    network = load_model(spec, weights=None, num_classes=1000).eval()
    images = torch.randn(4, 3, 224, 224)
    student = prepare(network, QuantizationConfig(), images[:1])
    calibrate(student, images)
    files = {"fdda_ext int4": folder / "model.int4.safetensors"}
    save_program(files["fdda_ext int4"], lower(student))
    if importlib.util.find_spec("openvino") and importlib.util.find_spec("nncf"):
        import openvino

        files["openvino int8"] = folder / "model.xml"
        openvino.save_model(openvino_model(network, images), files["openvino int8"])
    if importlib.util.find_spec("onnxruntime"):
        files["onnxruntime int8"] = onnxruntime_files(network, images, folder)
    files["torch float32"] = folder / "model.pt"
    torch.save(network.state_dict(), files["torch float32"])
    return files


def measure(name: str, path: Path, spec: str) -> tuple[float, float]:
    """Return milliseconds and MiB."""
    command = [sys.executable, "-c", FRAME.format(body=LOADERS[name]), str(path), spec]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    milliseconds, mebibytes = json.loads(done.stdout.splitlines()[-1])
    return milliseconds, mebibytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="torchvision:resnet18")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(options.network, Path(folder))
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
        for _ in range(options.rounds):
            for name, path in files.items():
                results[name].append(measure(name, path, options.network))
        print(f"| {options.network} | file, MB | to first logits, ms | memory, MiB |")
        print("|---|---|---|---|")
        for name, path in files.items():
            size = path.stat().st_size
            if name == "openvino int8":
                size += path.with_suffix(".bin").stat().st_size
            times, memory = zip(*results[name], strict=True)
            print(
                f"| {name} | {size / 1e6:.1f} | {statistics.median(times):.0f} "
                f"({min(times):.0f} to {max(times):.0f}) | {statistics.median(memory):.0f} |"
            )


if __name__ == "__main__":
    main()
