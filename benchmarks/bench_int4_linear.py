"""Compare int4_linear (with requantization) with torch's quantized linear layer (oneDNN, unsigned
times signed bytes)."""

import warnings

import pytest
import torch

from fdda_ext.ops import int4_linear, int4_pack_weight

#: Pixels, inputs, outputs of ResNet-18's 3x3 convolutions as matrix products, and its classifier.
SIZES = [(3136, 576, 64), (784, 1152, 128), (196, 2304, 256), (49, 4608, 512), (1, 512, 1000)]


@pytest.mark.parametrize("size", SIZES)
def bench_linear(compare, device, size):
    if device != "cpu":
        pytest.skip("torch's quantized linear layer runs only on the CPU")
    rows, inputs, outputs = size
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, inputs), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale, out_scale, zero_point = 0.01, 0.01 * inputs**0.5 * 4, 3
    packed = int4_pack_weight(weight.view(outputs, 1, 1, inputs))
    correction = (zero_point * weight.sum(1, dtype=torch.int64)).int()
    scales, shifts = torch.full((outputs,), scale), torch.zeros(outputs)

    def ours() -> torch.Tensor:
        return int4_linear(
            codes, packed, scales, shifts, correction,
            zero_point=zero_point, bits=4, low=0.0, out_scale=out_scale, out_bits=8,
        )  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "onednn"
        make = torch._make_per_tensor_quantized_tensor
        x = make(codes, 1.0, zero_point)
        w = make(weight, scale, 0)
        prepacked = torch.ops.quantized.linear_prepack(w, None)
    peer = torch.ops.quantized.linear_relu
    peers = {"fdda_ext": ours, "oneDNN u8s8": lambda: peer(x, prepacked, out_scale, 0)}
    difference = ours().int() - peer(x, prepacked, out_scale, 0).int_repr().int()
    assert difference.abs().max() <= 1  # oneDNN rounds its factors differently
    compare(f"int4_linear, {rows} x {inputs} -> {outputs}", peers)
