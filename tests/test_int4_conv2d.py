"""int4_conv2d against an integer convolution in float64, on every instruction set."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, library
from torch.nn import functional as F

from fdda_ext import _C
from fdda_ext.errors import UsageError
from fdda_ext.ops import int4_conv2d, int4_linear, int4_pack_weight


def reference(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, options: dict[str, Any]
) -> Tensor:
    """Compute the documented formula step by step."""
    integers = (x.double() - options["zero_point"]).permute(0, 3, 1, 2)
    total = F.conv2d(
        integers,
        weight.double().permute(0, 3, 1, 2),
        None,
        options["stride"],
        options["padding"],
        options["dilation"],
        options["groups"],
    )
    t = total.permute(0, 2, 3, 1).float() * scale + shift
    residual = options.get("residual")
    if residual is not None:
        if residual.dtype == torch.uint8:
            code = residual.float() - options["residual_zero_point"]
            residual = code * torch.tensor(options["residual_scale"])
        t = t + residual
    t = t.clamp(options["low"], options["high"])
    bits = options["out_bits"]
    if bits == 0:
        return t
    inverse = torch.ones(()) / torch.tensor(options["out_scale"])
    codes = torch.round(t * inverse) + options["out_zero_point"]
    return codes.clamp(0, 2**bits - 1).to(torch.uint8)


def make_case(
    shape: tuple[int, int, int, int],
    outputs: int,
    seed: int = 0,
    bits: int = 4,
    residual: str = "none",
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
    """Return x, plain weight, scale, shift and options for which the result has many codes."""
    generator = torch.Generator().manual_seed(seed)
    options = {
        "kernel": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "zero_point": 3,
        "low": 0.0,
        "high": 6.0,
        "out_scale": 0.4,
        "out_zero_point": 2,
        "out_bits": 4,
        "residual_scale": 0.3,
        "residual_zero_point": 5,
    } | options
    own = shape[3] // options["groups"]
    x = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    half = 2 ** (bits - 1)
    sizes = (outputs, *options["kernel"], own)
    weight = torch.randint(-half, half, sizes, generator=generator, dtype=torch.int8)
    deviation = (weight[0].numel() ** 0.5) * half * half
    scale = (0.5 + torch.rand(outputs, generator=generator)) * 3 / deviation
    shift = torch.randn(outputs, generator=generator)
    if residual != "none":
        like = reference(x, weight, scale, shift, {**options, "residual": None, "out_bits": 0})
        options["residual"] = (
            torch.randn(like.shape, generator=generator)
            if residual == "float"
            else torch.randint(0, 16, like.shape, generator=generator, dtype=torch.uint8)
        )
    return x, weight, scale, shift, options


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    options: dict[str, Any],
    winograd: bool = False,
) -> Tensor:
    correction = options["zero_point"] * weight.flatten(1).sum(1, dtype=torch.int32)
    packed = int4_pack_weight(weight, options["groups"], winograd)
    bits = max(1, int(x.max()).bit_length()) if x.numel() else 4
    return int4_conv2d(
        x, packed, scale, shift, correction.int(), bits=bits, winograd=winograd, **options
    )


CASES = {
    "3x3": {"shape": (2, 7, 9, 16), "outputs": 20},
    "many_outputs": {"shape": (1, 5, 5, 8), "outputs": 150},
    "many_pixels": {"shape": (3, 17, 13, 4), "outputs": 16},
    "1x1": {"shape": (2, 6, 6, 32), "outputs": 70, "kernel": (1, 1), "padding": (0, 0)},
    "1x1_strided": {
        "shape": (2, 7, 7, 12), "outputs": 33, "kernel": (1, 1), "padding": (0, 0), "stride": (2, 2)
    },
    "odd_channels": {"shape": (2, 6, 5, 3), "outputs": 5},
    "1x1_odd": {"shape": (1, 4, 4, 5), "outputs": 7, "kernel": (1, 1), "padding": (0, 0)},
    "7x7_stride": {
        "shape": (1, 20, 18, 3), "outputs": 64, "kernel": (7, 7), "stride": (2, 2),
        "padding": (3, 3),
    },
    "dilated": {
        "shape": (1, 9, 9, 8), "outputs": 9, "dilation": (2, 3), "padding": (2, 3), "stride": (1, 2)
    },
    "grouped": {"shape": (2, 6, 6, 24), "outputs": 48, "groups": 3},
    "grouped_half_panels": {"shape": (2, 9, 7, 72), "outputs": 72, "groups": 3},
    "grouped_dilated": {
        "shape": (1, 8, 7, 24), "outputs": 24, "groups": 3, "dilation": (2, 3), "padding": (2, 3)
    },
    "grouped_strided_8_bits": {
        "shape": (1, 8, 7, 32), "outputs": 48, "groups": 2, "stride": (2, 2), "bits": 8
    },
    "grouped_odd": {"shape": (2, 5, 6, 15), "outputs": 10, "groups": 5},
    "depthwise": {"shape": (2, 8, 7, 100), "outputs": 100, "groups": 100},
    "depthwise_5x5": {
        "shape": (1, 9, 9, 64), "outputs": 64, "groups": 64, "kernel": (5, 5), "padding": (2, 2),
        "stride": (2, 2),
    },
    "depthwise_stride": {
        "shape": (2, 9, 8, 70), "outputs": 70, "groups": 70, "stride": (2, 2)
    },
    "depthwise_far": {
        "shape": (2, 9, 8, 70), "outputs": 70, "groups": 70, "stride": (1, 3)
    },
    "depthwise_dilated": {
        "shape": (2, 9, 8, 70), "outputs": 70, "groups": 70, "dilation": (2, 2), "padding": (2, 2)
    },
    "depthwise_few": {"shape": (2, 5, 5, 3), "outputs": 3, "groups": 3, "kernel": (1, 2)},
    "multiplier": {"shape": (1, 5, 5, 6), "outputs": 12, "groups": 6},
    "8_bits": {"shape": (1, 5, 5, 520), "outputs": 17, "bits": 8, "zero_point": 130},
    "to_8_bits": {"shape": (1, 5, 5, 8), "outputs": 17, "out_bits": 8, "out_scale": 0.03},
    "to_float": {"shape": (1, 5, 5, 8), "outputs": 17, "out_bits": 0},
    "no_limits": {
        "shape": (1, 5, 5, 8), "outputs": 17, "low": -float("inf"), "high": float("inf")
    },
    "residual": {"shape": (2, 6, 6, 8), "outputs": 17, "residual": "codes"},
    "residual_float": {"shape": (2, 6, 6, 8), "outputs": 17, "residual": "float"},
    "residual_half_panel": {"shape": (2, 6, 6, 8), "outputs": 24, "residual": "codes"},
    "residual_float_half_panel": {"shape": (2, 6, 6, 8), "outputs": 8, "residual": "float"},
    "residual_float_to_float": {
        "shape": (2, 6, 6, 8), "outputs": 24, "residual": "float", "out_bits": 0
    },
    "residual_grouped": {
        "shape": (2, 6, 6, 40), "outputs": 160, "groups": 2, "residual": "codes", "out_bits": 0
    },
    "residual_depthwise": {
        "shape": (2, 6, 6, 70), "outputs": 70, "groups": 70, "residual": "float"
    },
    "no_images": {"shape": (0, 6, 6, 8), "outputs": 4},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_matches_reference(isa: str, threads: int, case: str) -> None:
    arguments = make_case(**CASES[case])
    assert torch.equal(run(*arguments), reference(*arguments))


WINOGRAD = {
    "even": {"shape": (2, 8, 6, 16), "outputs": 16},
    "odd": {"shape": (2, 7, 9, 16), "outputs": 20},
    "no_padding": {"shape": (1, 9, 8, 24), "outputs": 64, "padding": (0, 0)},
    "wide_padding": {"shape": (1, 5, 4, 12), "outputs": 10, "padding": (3, 2)},
    "odd_channels": {"shape": (2, 6, 5, 3), "outputs": 5},
    "one_pixel": {"shape": (1, 1, 1, 8), "outputs": 3},
    "many_outputs": {"shape": (1, 7, 7, 130), "outputs": 150},
    "many_tiles": {"shape": (2, 33, 40, 70), "outputs": 70},
    "3_bits": {"shape": (1, 6, 6, 16), "outputs": 16, "bits": 3},
    "to_float": {"shape": (1, 5, 5, 8), "outputs": 17, "out_bits": 0},
    "residual": {"shape": (2, 6, 6, 8), "outputs": 80, "residual": "codes"},
    "residual_float": {"shape": (2, 6, 6, 8), "outputs": 17, "residual": "float"},
    "no_images": {"shape": (0, 6, 6, 8), "outputs": 4},
}  # fmt: skip


@pytest.mark.parametrize("case", WINOGRAD)
def test_winograd_is_exact(isa: str, threads: int, case: str) -> None:
    arguments = make_case(**WINOGRAD[case])
    assert torch.equal(run(*arguments, winograd=True), reference(*arguments))


def test_winograd_is_exact_for_extreme_codes_and_weights(isa: str) -> None:
    """Use 5-bit codes of 31 and 0 and weights of -8 and 7, with all signs of the transforms."""
    x, weight, scale, shift, options = make_case((2, 8, 8, 64), 32, zero_point=31)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 2, x.shape, generator=generator, dtype=torch.uint8) * 31
    weight = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8) * 15 - 8
    x[0], weight[0], weight[1] = 31, -8, 7
    arguments = (x, weight, scale / 100, shift, {**options, "out_bits": 0, "high": 1e9})
    assert torch.equal(run(*arguments, winograd=True), reference(*arguments))


@pytest.mark.parametrize("bits", range(1, 6))
@pytest.mark.parametrize("corner", [-32, 31])
@pytest.mark.parametrize("value", [-14, 14])
def test_no_sum_saturates_under_winograd(isa: str, bits: int, corner: int, value: int) -> None:
    """Use transformed weights at the limits of int8, the largest codes, and many channels."""
    x, weight, scale, shift, options = make_case((1, 6, 6, 600), 20, zero_point=0, bits=bits)
    x[x > 0] = 2**bits - 1
    x[0, :4] = 2**bits - 1
    weight.fill_(0)
    weight[:10, 0, 0] = corner
    weight[10:] = value
    options |= {"out_bits": 0, "low": -1e9, "high": 1e9}
    arguments = (x, weight, scale, shift, options)
    assert torch.equal(run(*arguments, winograd=True), reference(*arguments))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("groups", [1, 70])
@pytest.mark.parametrize("value", [-128, -65, -64, -8, 7, 64, 127])
@pytest.mark.parametrize("size", [2, 5])
def test_no_sum_saturates(isa: str, bits: int, groups: int, value: int, size: int) -> None:
    """Use the largest codes, and weights whose pairs of products just fit 16 bits, or do not."""
    shape = (1, size, size, 70)
    x, weight, scale, shift, options = make_case(shape, 70, groups=groups, zero_point=0)
    x.fill_(2**bits - 1)
    weight.fill_(value)
    weight[1::2, 0] = -weight[1::2, 0].clamp(min=-127)
    options |= {"out_bits": 0, "low": -1e9, "high": 1e9}
    arguments = (x, weight, scale, shift, options)
    assert torch.equal(run(*arguments), reference(*arguments))


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("value", [-128, -8, 7, 127])
def test_long_sums_do_not_saturate(isa: str, bits: int, value: int) -> None:
    """Sum so many products that 16 bits overflow; the second image has random codes."""
    options = {"kernel": (1, 1), "padding": (0, 0), "zero_point": 0}
    x, weight, scale, shift, options = make_case((2, 1, 7, 4100), 33, bits=bits, **options)
    x[0] = 2**bits - 1
    weight[:16] = value
    weight[16:32] = torch.where(weight[16:32] < 0, weight.new_tensor(value), weight[16:32])
    options |= {"out_bits": 0, "low": -1e9, "high": 1e9}
    arguments = (x, weight, scale, shift, options)
    assert torch.equal(run(*arguments), reference(*arguments))


@pytest.mark.parametrize("outputs", [8, 24, 40])
@pytest.mark.parametrize("groups", [1, 8])
def test_a_residual_of_nan_stays_nan(isa: str, groups: int, outputs: int) -> None:
    x, weight, scale, shift, options = make_case(
        (2, 6, 6, 8), outputs, groups=groups, residual="float", out_bits=0
    )
    options["residual"][..., ::3] = torch.nan
    result = run(x, weight, scale, shift, options)
    assert result[..., ::3].isnan().all()
    assert not result[..., 1::3].isnan().any()


@pytest.mark.parametrize("groups", [1, 40])
def test_zero_point_may_exceed_the_codes(isa: str, groups: int) -> None:
    """Use padding with more bits than the image."""
    arguments = make_case((1, 6, 6, 40), 40, groups=groups, zero_point=255)
    x, weight, *_ = arguments
    weight.fill_(127)
    assert x.max() < 16
    assert torch.equal(run(*arguments), reference(*arguments))


def test_winograd_refuses_bad_arguments() -> None:
    weight = torch.full((4, 3, 3, 4), 15, dtype=torch.int8)
    with pytest.raises(UsageError, match="weight to stay within int8 under Winograd's transform"):
        int4_pack_weight(weight, winograd=True)
    with pytest.raises(UsageError, match="winograd only for an ungrouped 3x3 window"):
        int4_pack_weight(weight, 2, winograd=True)
    x, weight, *rest, options = make_case((1, 5, 5, 8), 8, stride=(2, 2))
    packed = int4_pack_weight(weight, winograd=True)
    zeros = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(UsageError, match="int4_conv2d: expected winograd only for ungrouped 3x3"):
        int4_conv2d(x, packed, *rest, zeros, bits=4, winograd=True, **options)
    options["stride"] = (1, 1)
    with pytest.raises(UsageError, match="at most 5 bits"):
        int4_conv2d(x, packed, *rest, zeros, winograd=True, **options)
    options["zero_point"] = 32
    with pytest.raises(UsageError, match="at most 5 bits"):
        int4_conv2d(x, packed, *rest, zeros, bits=4, winograd=True, **options)


def test_cases_reach_the_whole_grid() -> None:
    """Require many different codes, since results of a single code would hide errors."""
    result = run(*make_case(**CASES["3x3"]))
    assert result.unique().numel() > 8


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_matches_reference_on_random_geometry(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        numbers = st.integers(low, high)
        return data.draw(st.tuples(numbers, numbers))

    groups = data.draw(st.integers(1, 4))
    kernel = data.draw(st.just((3, 3)) | st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = pair(1, 2)
    height, width = (d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    extra = pair(0, 6)
    shape = (data.draw(st.integers(1, 2)), height + extra[0], width + extra[1])
    bits = data.draw(st.sampled_from([2, 4, 8]))
    arguments = make_case(
        (*shape, groups * data.draw(st.integers(1, 20))),
        groups * data.draw(st.integers(1, 40)),
        seed=data.draw(st.integers(0, 2**31)),
        bits=bits,
        residual=data.draw(st.sampled_from(["none", "codes", "float"])),
        kernel=kernel,
        dilation=dilation,
        stride=pair(1, 3),
        padding=pair(0, 3),
        groups=groups,
        zero_point=data.draw(st.integers(0, 3)),
        out_bits=data.draw(st.sampled_from([0, 3, 4, 8])),
    )
    expected = reference(*arguments)
    options = arguments[-1]
    ones = all(options[name] == (1, 1) for name in ("stride", "dilation"))
    can_be_winograd = (
        ones and kernel == (3, 3) and groups == 1 and arguments[0].max() <= 31 and bits <= 4
    )
    before = _C.isa()
    try:
        for name in _C.supported_isas():
            _C.set_isa(name)
            assert torch.equal(run(*arguments), expected)
            if can_be_winograd:
                assert torch.equal(run(*arguments, winograd=True), expected)
    finally:
        _C.set_isa(before)


def test_memory_format_does_not_matter() -> None:
    x, *rest = make_case(**CASES["3x3"])
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(run(strided, *rest), run(x, *rest))


def test_linear_is_a_convolution_of_one_pixel() -> None:
    x, weight, scale, shift, options = make_case((1, 2, 15, 40), 70, kernel=(1, 1), padding=(0, 0))
    packed, zeros = int4_pack_weight(weight), torch.zeros(70, dtype=torch.int32)
    numbers = {k: v for k, v in options.items() if k in ("zero_point", "low", "high", "out_scale")}
    expected = int4_conv2d(
        x, packed, scale, shift, zeros, kernel=(1, 1), residual=x.new_zeros(1, 2, 15, 70), **numbers
    )
    rows = x.view(2, 15, 40)
    residual = x.new_zeros(2, 15, 70)
    result = int4_linear(rows, packed, scale, shift, zeros, residual=residual, **numbers)
    assert torch.equal(result, expected.view(2, 15, 70))
    one = int4_linear(rows[0, 0], packed, scale, shift, zeros, **numbers)
    assert torch.equal(one, expected[0, 0, 0])
    with pytest.raises(UsageError, match=r"int4_linear: expected x of shape \[\.\.\., C\]"):
        int4_linear(x[0, 0, 0, 0], packed, scale, shift, zeros)


def test_opcheck() -> None:
    x, weight, scale, shift, options = make_case(**CASES["residual"])
    for arguments in ((weight, 1), (weight, 1, True), (weight[..., :1].contiguous(), 17)):
        library.opcheck(torch.ops.fdda.int4_pack_weight.default, arguments)
    arguments = (
        x, int4_pack_weight(weight), scale, shift, torch.zeros(17, dtype=torch.int32),
        options["residual"], [3, 3], [1, 1], [1, 1], [1, 1], 1, 3, 0.0, 6.0, 0.3, 5, 0.4, 2, 4,
    )  # fmt: skip
    library.opcheck(torch.ops.fdda.int4_conv2d.default, arguments)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"x": torch.zeros(1, 5, 5, 8)}, "x to be uint8, got float32"),
    "dims": ({"x": torch.zeros(5, 5, 8, dtype=torch.uint8)}, r"x of shape \[N, H, W, C\], got \[5"),
    "channels": (
        {"x": torch.zeros(1, 5, 5, 9, dtype=torch.uint8)},
        r"weight of shape \[\d+\], got",
    ),
    "scale": ({"scale": torch.ones(16)}, r"weight of shape|shift of shape"),
    "shift": ({"shift": torch.ones(16)}, r"shift of shape \[17\], got \[16\]"),
    "correction": ({"correction": torch.zeros(17)}, "correction to be int32, got float32"),
    "stride": ({"stride": (0, 1)}, "stride to be two integers from 1"),
    "padding": ({"padding": (-1, 1)}, "padding to be two integers from 0"),
    "kernel": ({"kernel": (3,)}, "kernel to be two integers"),
    "groups": ({"groups": 3}, "groups to divide"),
    "bits": ({"bits": 9}, r"bits to lie in \[1, 8\], got 9"),
    "zero_point": ({"zero_point": 256}, r"zero_point to lie in \[0, 255\], got 256"),
    "out_bits": ({"out_bits": 9}, "out_bits to be 0 for float32, or 2 to 8, got 9"),
    "out_scale": ({"out_scale": float("nan")}, "out_scale to be positive, got nan"),
    "residual": ({"residual": torch.zeros(1, 5, 5, 3)}, "residual of shape"),
    "residual_dtype": (
        {"residual": torch.zeros(1, 5, 5, 17, dtype=torch.float64)},
        "residual to be float32, got float64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case: str) -> None:
    x, weight, scale, shift, options = make_case((1, 5, 5, 8), 17)
    arguments: dict[str, Any] = {
        "x": x,
        "weight": int4_pack_weight(weight),
        "scale": scale,
        "shift": shift,
        "correction": torch.zeros(17, dtype=torch.int32),
        **options,
    }
    change, message = BAD[case]
    with pytest.raises(UsageError, match=f"int4_conv2d: expected {message}"):
        int4_conv2d(**(arguments | change))


def test_bad_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="int4_pack_weight: expected weight to be int8, got int32"):
        int4_pack_weight(torch.zeros(4, 1, 1, 4, dtype=torch.int32))
    with pytest.raises(
        UsageError, match=r"weight of shape \[O, kh, kw, C / groups\], got \[4, 4\]"
    ):
        int4_pack_weight(torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(UsageError, match="groups to divide the outputs 4, got 3"):
        int4_pack_weight(torch.zeros(4, 1, 1, 4, dtype=torch.int8), 3)
