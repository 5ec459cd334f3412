"""Compare int4_conv2d on a GPU, from codes to codes, with torch's float16 convolution with bias and
ReLU and, for 1x1 kernels, with its int8 matrix product (without epilogue)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fdda_ext.ops import int4_conv2d, int4_pack_weight

#: Layers of ResNet-18 and MobileNetV2: image size, channels, outputs, window, stride, groups.
LAYERS = {
    "7x7, 3 -> 64": (224, 3, 64, 7, 2, 1),
    "3x3, 64 -> 64 at 56": (56, 64, 64, 3, 1, 1),
    "3x3, 64 -> 128 at 56, stride 2": (56, 64, 128, 3, 2, 1),
    "1x1, 64 -> 128 at 56, stride 2": (56, 64, 128, 1, 2, 1),
    "3x3, 128 -> 128 at 28": (28, 128, 128, 3, 1, 1),
    "3x3, 256 -> 256 at 14": (14, 256, 256, 3, 1, 1),
    "3x3, 512 -> 512 at 7": (7, 512, 512, 3, 1, 1),
    "1x1, 512 -> 1000 at 1": (1, 512, 1000, 1, 1, 1),
    "1x1, 24 -> 144 at 56": (56, 24, 144, 1, 1, 1),
    "1x1, 960 -> 320 at 7": (7, 960, 320, 1, 1, 1),
    "depthwise 3x3, 144 at 56": (56, 144, 144, 3, 1, 144),
    "depthwise 3x3, 576 at 14, stride 2": (14, 576, 576, 3, 2, 576),
}


SCALE, ZERO_POINT = 0.01, 3


def ours(x: Tensor, weight: Tensor, layer: str, out_bits: int = 4) -> Callable[[], Tensor]:
    """Return a call of int4_conv2d with 4-bit codes and 4-bit weights."""
    _, _, outputs, window, stride, groups = LAYERS[layer]
    ones = torch.ones(outputs, device=x.device)
    scale, correction = SCALE * ones, (ZERO_POINT * weight.flatten(1).sum(1)).to(torch.int32)
    packed = int4_pack_weight(weight, groups)
    return lambda: int4_conv2d(
        x, packed, scale, ones, correction, kernel=(window, window), stride=(stride, stride),
        padding=(window // 2, window // 2), groups=groups, zero_point=ZERO_POINT, bits=4, low=0.0,
        out_scale=0.3, out_bits=out_bits,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("layer", [name for name in LAYERS if "depthwise" not in name])
def bench_tiles(compare, device, monkeypatch, layer, batch):
    """Compare the tile that csrc/cuda/int4_conv2d_plan.cuh chooses with all its candidates."""
    if device != "cuda":
        pytest.skip("only the CUDA kernel has these tiles")
    size, channels, outputs, window, _, groups = LAYERS[layer]
    x = torch.randint(0, 16, (batch, size, size, channels), dtype=torch.uint8, device=device)
    sizes = (outputs, window, window, channels // groups)
    function = ours(x, torch.randint(-8, 8, sizes, dtype=torch.int8, device=device), layer)
    expected = function()

    def in_tile(tile: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            monkeypatch.setenv("FDDA_INT4_TILE", tile)
            result = function()
            monkeypatch.delenv("FDDA_INT4_TILE")
            return result

        return run

    tiles = {f"tile {tile}": in_tile(str(tile)) for tile in range(5 if channels % 16 == 0 else 3)}
    assert all(torch.equal(run(), expected) for run in tiles.values())
    with torch.inference_mode():
        compare(f"int4_conv2d by tiles, {layer}, batch {batch}", {"fdda_ext": function, **tiles})


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("layer", LAYERS)
def bench_layer(compare, device, layer, batch):
    if device != "cuda":
        pytest.skip("the CPU is measured with whole programs")
    size, channels, outputs, window, stride, groups = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    shape = (batch, size, size, channels)
    x = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    sizes = (outputs, window, window, channels // groups)
    weight = torch.randint(-8, 8, sizes, generator=generator, dtype=torch.int8)
    expected = ours(x, weight, layer)()
    x, weight = x.cuda(), weight.cuda()
    function = ours(x, weight, layer)
    assert torch.equal(function().cpu(), expected)

    # channels_last
    images = (x.float() - ZERO_POINT).half().permute(0, 3, 1, 2)
    filters = (SCALE * weight.float()).half().permute(0, 3, 1, 2)
    bias = torch.ones(outputs, device=device, dtype=torch.float16)

    def half() -> Tensor:
        return F.conv2d(images, filters, bias, stride, window // 2, 1, groups).relu_()

    values = ours(x, weight, layer, out_bits=0)().permute(0, 3, 1, 2)
    # If all sums are negative, both results are 0.
    assert (half().float() - values).abs().max() <= 0.01 * values.max()
    peers = {"fdda_ext": function, "float16": half}
    pixels = batch * size * size
    if window == stride == 1 and pixels > 16 and channels % 8 == outputs % 8 == 0:
        rows = x.view(pixels, channels).view(torch.int8)  # codes below 16 are the same in int8
        columns = weight.view(outputs, channels).t()
        exact = rows.double() @ columns.double()
        assert torch.equal(torch._int_mm(rows, columns).double(), exact)
        peers["_int_mm"] = lambda: torch._int_mm(rows, columns)
    with torch.inference_mode():
        moved = x.numel() + weight.numel() + expected.numel()
        compare(f"int4_conv2d, {layer}, batch {batch}", peers, moved)
