"""Compare W4A4 integer programs with the float network and, if they are installed, with OpenVINO
and ONNX Runtime at eight bits. Weights are random, since only speed is measured."""

import importlib.util
import time
from collections.abc import Callable

import pytest
import torch
from peers import float16, onnxruntime_int8, openvino_int8
from torch import Tensor

from fdda_ext.deploy import capture, lower
from fdda_ext.models import load_model
from fdda_ext.ops import int4_linear, int4_pack_weight
from fdda_ext.quantization import QuantizationConfig, calibrate, prepare

NETWORKS = ["torchvision:resnet18", "torchvision:mobilenet_v2"]


def peak_gops() -> float:
    """Measure the matrix kernel on a well-suited matrix, in 10^9 operations per second."""
    rows, inputs, outputs = 768, 1024, 1024
    codes = torch.randint(0, 16, (rows, inputs), dtype=torch.uint8)
    weight = torch.randint(-8, 8, (outputs, 1, 1, inputs), dtype=torch.int8)
    packed, zeros = int4_pack_weight(weight), torch.zeros(outputs)
    times = []
    for _ in range(21):
        start = time.perf_counter()
        int4_linear(codes, packed, zeros, zeros, zeros.int(), out_bits=4, bits=4)
        times.append(time.perf_counter() - start)
    return 2 * rows * inputs * outputs / min(times) / 1e9


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("spec", NETWORKS)
def bench_network(compare, benchmark, device, tmp_path, spec, batch):
    torch.manual_seed(0)
    network = load_model(spec, weights=None, num_classes=1000).eval()
    images = torch.randn(batch, 3, 224, 224)
    student = prepare(network, QuantizationConfig(), images[:1])
    calibrate(student, images[:4])
    program = lower(student)
    with torch.no_grad():
        expected = student(images[:4])
    # The student runs on the CPU, since cuDNN may choose algorithms that are not exact.
    assert torch.equal(program.to(device)(images[:4].to(device)).cpu(), expected)
    peers: dict[str, Callable[[], object]] = {}
    if (
        device == "cpu"
        and importlib.util.find_spec("openvino")
        and importlib.util.find_spec("nncf")
    ):
        peers["openvino int8"] = openvino_int8(network, images)
    if device == "cpu" and importlib.util.find_spec("onnxruntime"):
        peers["onnxruntime int8"] = onnxruntime_int8(network, images, tmp_path)
    images = images.to(device)
    network = network.to(device, memory_format=torch.channels_last)
    last = images.contiguous(memory_format=torch.channels_last)
    peers["eager float32"] = lambda: network(last)
    ours: Callable[[Tensor], Tensor] = program
    if device == "cpu":
        compiled = torch.compile(network, dynamic=False)
        peers["compile float32"] = lambda: compiled(last)
    else:
        ours = capture(program, images)
        assert torch.equal(ours(images), program(images))
        peers |= {"fdda_ext without a graph": lambda: program(images)}
        peers |= float16(network, last)
    with torch.inference_mode():
        name = spec.partition(":")[2]
        compare(f"program, {name}, batch {batch}", {"fdda_ext": lambda: ours(images), **peers})
        if device == "cpu":
            benchmark.extra_info["peak_gops"] = peak_gops()
            benchmark.extra_info["profile"] = [
                (step.name, step.algorithm, step.products, step.seconds)
                for step in program.native.profile(images, rounds=21)
            ]
