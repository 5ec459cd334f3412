"""Peers that run whole networks: OpenVINO and ONNX Runtime at eight bits, and torch in float16."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def openvino_model(network: nn.Module, images: Tensor) -> Any:
    """Quantize a network with NNCF, as an OpenVINO model."""
    import nncf
    import openvino

    batches = [image[None].numpy() for image in images[:1]]
    model = openvino.convert_model(network, example_input=images[:1])
    return nncf.quantize(model, nncf.Dataset(batches), subset_size=1)


def openvino_int8(network: nn.Module, images: Tensor) -> Callable[[], object]:
    """Return a call of the network in OpenVINO's latency mode."""
    import openvino

    model = openvino_model(network, images)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(model, "CPU", options)
    array = images.numpy()
    return lambda: compiled(array)


def onnxruntime_files(network: nn.Module, images: Tensor, folder: Path) -> Path:
    """Write ONNX Runtime's static quantization: QDQ, unsigned activations, signed weights."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"x": images[:1].numpy()}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    plain, quantized = str(folder / "plain.onnx"), folder / "int8.onnx"
    axes = {"x": {0: "batch"}}
    torch.onnx.export(
        network, (images[:1],), plain, input_names=["x"], dynamic_axes=axes, dynamo=False
    )
    quantization.quantize_static(plain, str(quantized), Reader(), per_channel=True)
    return quantized


def onnxruntime_int8(network: nn.Module, images: Tensor, folder: Path) -> Callable[[], object]:
    """Return a call of the network in ONNX Runtime."""
    import onnxruntime

    quantized = str(onnxruntime_files(network, images, folder))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads would keep spinning while other peers are timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(quantized, options, ["CPUExecutionProvider"])
    feed = {"x": images.numpy()}
    return lambda: session.run(None, feed)


def float16(network: nn.Module, images: Tensor) -> dict[str, Callable[[], object]]:
    """Return float16 calls for a GPU: eager, and compiled with a CUDA graph."""
    half, small = copy.deepcopy(network).half(), images.half()
    compiled = torch.compile(half, dynamic=False, mode="reduce-overhead")
    return {"eager float16": lambda: half(small), "graph float16": lambda: compiled(small)}
