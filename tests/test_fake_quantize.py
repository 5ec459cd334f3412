"""fake_quantize: values and gradients against references, layouts, compilation, errors."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, library

from fdda_ext import _C
from fdda_ext.errors import UsageError
from fdda_ext.ops import fake_quantize, fake_quantize_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def permuted(x: Tensor) -> Tensor:
    """Return a dense copy with reversed dimensions in memory."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def sliced(x: Tensor) -> Tensor:
    """Return every second element of a larger tensor, which is not dense."""
    return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]


def unaligned(x: Tensor) -> Tensor:
    """Return a contiguous copy that is not aligned."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    contiguous,
    channels_last,
    permuted,
    sliced,
    unaligned,
]

# Shape and axis: ragged ends, one element, channels innermost, long and short runs, blocks.
CASES = [
    ((1,), None),
    ((1,), 0),
    ((5, 3), 1),
    ((17, 31), 0),
    ((3, 5, 7, 9), None),
    ((3, 5, 7, 9), 1),
    ((4, 33, 1, 1), 1),
    ((2, 64, 6, 5), -3),
    ((2, 3, 130, 129), 1),
    ((40000,), None),
    ((3000, 40), 1),
    ((1, 1, 17), 1),
]


def make_inputs(
    shape: tuple[int, ...], axis: int | None, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x (a fifth is outside a 4-bit grid), upstream gradient, scale and zero_point."""
    generator = torch.Generator().manual_seed(seed)
    channels = [] if axis is None else [shape[axis]]
    x = torch.randn(shape, generator=generator).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    scale = 0.1 + 0.2 * torch.rand(channels, generator=generator)
    zero_point = 3.0 * torch.randn(channels, generator=generator)
    return x, grad, scale, zero_point


def run(
    op: Callable[..., Tensor],
    x: Tensor,
    grad: Tensor,
    scale: Tensor,
    zero: Tensor,
    *rest: int | None,
) -> tuple[Tensor, ...]:
    """Return y and the three gradients; rest is quant_min, quant_max and optionally axis."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, scale, zero)]
    y = op(*leaves, *rest)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def assert_matches_reference(
    x: Tensor, grad: Tensor, scale: Tensor, zero: Tensor, *rest: int | None
) -> None:
    """Compare y bit by bit, dx up to the rounding of scale * (1/scale), sums up to rounding."""
    y, dx, ds, dz = run(fake_quantize, x, grad, scale, zero, *rest)
    y_ref, dx_ref, ds_ref, dz_ref = run(fake_quantize_reference, x, grad, scale, zero, *rest)
    assert torch.equal(y, y_ref)
    assert y.dtype == x.dtype and dx.dtype == x.dtype
    torch.testing.assert_close(dx, dx_ref)
    # Terms of the sums cancel, so the error is relative to the sum of their magnitudes.
    axis = rest[2] if len(rest) > 2 else None
    other = list(range(x.dim()))
    if axis is not None:
        other.remove(axis % x.dim())
    magnitude = grad.float().abs().sum(other) if other else grad.float().abs()
    tolerance = 1e-5 * magnitude.reshape(scale.shape)
    assert ((ds - ds_ref).abs() <= tolerance).all()
    assert ((dz - dz_ref).abs() <= tolerance * scale).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_matches_reference(
    device: str,
    shape: tuple[int, ...],
    axis: int | None,
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    x, grad, scale, zero = (t.to(device) for t in make_inputs(shape, axis, dtype))
    x = layout(x)
    assert_matches_reference(x, grad, scale, zero, -8, 7, axis)
    assert_matches_reference(x, layout(grad), scale, zero, 0, 15, axis)


@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    shape: tuple[int, ...], axis: int | None
) -> None:
    results = []
    before = _C.isa(), torch.get_num_threads()
    try:
        for isa in _C.supported_isas():
            for threads in (1, 2):
                _C.set_isa(isa)
                torch.set_num_threads(threads)
                bits: list[Tensor] = []
                for dtype in DTYPES:
                    x, grad, scale, zero = make_inputs(shape, axis, dtype)
                    for layout in (contiguous, channels_last):
                        bits += run(fake_quantize, layout(x), grad, scale, zero, -8, 7, axis)
                results.append(bits)
    finally:
        _C.set_isa(before[0])
        torch.set_num_threads(before[1])
    for bits in results[1:]:
        for expected, actual in zip(results[0], bits, strict=True):
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", [None, 1])
def test_large_outputs_written_past_the_caches_are_correct(
    isa: str, axis: int | None, dtype: torch.dtype
) -> None:
    """Use more than 16 MiB, with planes aligned and not aligned to cache lines."""
    for side in (56, 30):
        channels = 2**24 // dtype.itemsize // (2 * side * side) + 1
        x, grad, scale, zero = make_inputs((2, channels, side, side), axis, dtype)
        y, dx, _, _ = run(fake_quantize, x, grad, scale, zero, -8, 7, axis)
        for part in (slice(0, 200), slice(-200, None)):
            chosen = (scale, zero) if axis is None else (scale[part], zero[part])
            expected = run(fake_quantize, x[:, part], grad[:, part], *chosen, -8, 7, axis)
            assert torch.equal(y[:, part], expected[0])
            assert torch.equal(dx[:, part], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_formats_convert_like_torch(isa: str, dtype: torch.dtype) -> None:
    """Quantize every 16-bit pattern with scale 1."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    limit = 2**22
    y = fake_quantize(x, torch.tensor(1.0), torch.tensor(0.0), -limit, limit)
    expected = torch.round(x.float()).clamp(-limit, limit).to(dtype)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], expected[~x.isnan()])
    # With a scale of many bits, the result must be rounded to 16 bits.
    scale = torch.tensor(0.7310585)
    y = fake_quantize(x, scale, torch.tensor(0.0), -limit, limit)
    expected = fake_quantize_reference(x, scale, torch.tensor(0.0), -limit, limit)
    assert torch.equal(y[~x.isnan()], expected[~x.isnan()])


def test_matches_torch_fake_quantize(device: str) -> None:
    x = torch.randn(2, 3, 8, 8, device=device)
    zero = torch.tensor(3.0, device=device)
    y = fake_quantize(x, torch.tensor(0.11, device=device), zero, 0, 15)
    assert torch.equal(y, torch.fake_quantize_per_tensor_affine(x, 0.11, 3, 0, 15))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70),
    scale=st.floats(2**-10, 100, width=32),
    zero=st.floats(-20, 20, width=32),
    quant_min=st.integers(-130, 20),
    width=st.integers(1, 255),
    isa=st.sampled_from(_C.supported_isas()),
)
def test_agrees_with_float64_arithmetic_except_near_ties(
    values: list[float], scale: float, zero: float, quant_min: int, width: int, isa: str
) -> None:
    """Compare codes with float64; within a few float32 ulps of a tie they may differ by 1."""
    before = _C.isa()
    _C.set_isa(isa)
    try:
        x = torch.tensor(values, dtype=torch.float32)
        y = fake_quantize(x, torch.tensor(scale), torch.tensor(zero), quant_min, quant_min + width)
    finally:
        _C.set_isa(before)
    s = torch.tensor(scale, dtype=torch.float64)
    z = torch.round(torch.tensor(zero, dtype=torch.float32)).double()
    t = x.double() / s
    expected = torch.clamp(torch.round(t) + z, quant_min, quant_min + width) - z
    actual = torch.round(y.double() / s)
    band = 4 * 2.0**-23 * t.abs() + 1e-30
    near_tie = ((t - torch.floor(t)) - 0.5).abs() <= band
    assert torch.equal(actual[~near_tie], expected[~near_tie])
    assert ((actual - expected).abs()[near_tie] <= 1).all()


def test_rounds_half_to_even(device: str) -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5] * 5, device=device)
    y = fake_quantize(x, torch.tensor(1.0, device=device), torch.zeros(1, device=device), -8, 7)
    assert y.tolist() == [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 4.0] * 5


def test_zero_point_is_rounded_half_to_even(device: str) -> None:
    x = torch.full((20,), 100.0, device=device)
    one = torch.tensor(1.0, device=device)
    for zero, expected in [(0.5, 15.0), (1.5, 13.0), (2.4, 13.0), (-0.6, 16.0)]:
        y = fake_quantize(x, one, torch.tensor(zero, device=device), 0, 15)
        assert y.tolist() == [expected] * 20


def test_gradients_of_literal_values(device: str) -> None:
    """Use values below, inside, on the limit, just above it (rounded into the grid), and above."""
    x = torch.tensor([-1.0, 0.26, 0.7, 7.5, 7.6, 20.0], device=device)
    scale, zero = torch.tensor(0.5, device=device), torch.tensor(0.0, device=device)
    grad = torch.ones_like(x)
    y, dx, ds, dz = run(fake_quantize, x, grad, scale, zero, 0, 15)
    torch.testing.assert_close(y.cpu(), torch.tensor([0.0, 0.5, 0.5, 7.5, 7.5, 7.5]))
    assert dx.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    # 0, (1 - 0.52), (1 - 1.4), (15 - 15), 15, 15
    torch.testing.assert_close(ds.cpu(), torch.tensor(30.08))
    torch.testing.assert_close(dz.cpu(), torch.tensor(-1.5))


def test_nan_and_infinity(device: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0] * 9, device=device)
    scale, zero = torch.tensor(0.5, device=device), torch.tensor(0.0, device=device)
    y, dx, _, _ = run(fake_quantize, x, torch.ones_like(x), scale, zero, -8, 7)
    assert y[0::4].isnan().all()
    assert (y[1::4] == 3.5).all() and (y[2::4] == -4.0).all() and (y[3::4] == 0).all()
    assert dx.tolist() == [0.0, 0.0, 0.0, 1.0] * 9


@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((0, 3), 1), ((3, 0), 0), ((2, 0), 1)])
def test_empty_tensors(device: str, shape: tuple[int, ...], axis: int | None) -> None:
    x, grad, scale, zero = (t.to(device) for t in make_inputs(shape, axis, torch.float32))
    y, dx, ds, dz = run(fake_quantize, x, grad, scale, zero, -8, 7, axis)
    assert y.shape == x.shape and dx.shape == x.shape
    assert ds.shape == scale.shape and not ds.any() and not dz.any()


def test_scale_of_shape_one_keeps_its_shape(device: str) -> None:
    x = torch.randn(5, device=device)
    _, _, ds, dz = run(
        fake_quantize, x, x, torch.ones(1, device=device), torch.zeros([], device=device), -8, 7
    )
    assert ds.shape == (1,) and dz.shape == ()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_keeps_the_memory_format(device: str, layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(torch.randn(2, 3, 4, 5, device=device)).requires_grad_()
    y = fake_quantize(x, torch.ones(3, device=device), torch.zeros(3, device=device), -8, 7, 1)
    assert y.stride() == torch.empty_like(x).stride()


def test_saves_only_inputs() -> None:
    x = torch.randn(8, requires_grad=True)
    scale, zero = torch.tensor(0.5, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        fake_quantize(x, scale, zero, -8, 7)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (x, scale, zero)]


def test_raw_op_is_differentiable(device: str) -> None:
    x, grad, scale, zero = (t.to(device) for t in make_inputs((9, 4), 1, torch.float32))
    wrapped = run(fake_quantize, x, grad, scale, zero, -8, 7, 1)
    raw = run(torch.ops.fdda.fake_quantize, x, grad, scale, zero, -8, 7, 1)
    for expected, actual in zip(wrapped, raw, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("op", [fake_quantize, torch.ops.fdda.fake_quantize.default])
def test_double_backward_is_refused(op: Callable[..., Tensor]) -> None:
    x = torch.randn(8, requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    y = op(x, scale, torch.tensor(0.0), -8, 7)
    (dx, ds) = torch.autograd.grad(y.square().sum(), (x, scale), create_graph=True)
    with pytest.raises(NotImplementedError, match="fake_quantize: double backward is not"):
        torch.autograd.grad(ds, scale)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
def test_opcheck(device: str, axis: int | None, layout: Callable[[Tensor], Tensor]) -> None:
    x, _, scale, zero = (t.to(device) for t in make_inputs((2, 3, 4, 5), axis, torch.float32))
    leaves = [t.requires_grad_() for t in (layout(x), scale, zero)]
    library.opcheck(torch.ops.fdda.fake_quantize.default, (*leaves, -8, 7, axis))
    arguments = [t.detach() for t in (layout(x), layout(x), scale, zero)]
    library.opcheck(
        torch.ops.fdda._fake_quantize_backward.default,
        (*arguments, -8, 7, axis),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiles_without_graph_breaks(device: str) -> None:
    def loss(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (fake_quantize(torch.relu(x), scale, zero, 0, 15, axis=1) * x).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, _, scale, zero = (t.to(device) for t in make_inputs((2, 5, 4, 4), 1, torch.float32))
    grads = []
    for fn in (loss, compiled):
        leaves = [t.detach().requires_grad_() for t in (x, scale, zero)]
        grads.append(torch.autograd.grad(fn(*leaves), leaves))
    for expected, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


ONE = torch.tensor(1.0)
ZERO = torch.tensor(0.0)
X = torch.zeros(2, 3)

MISTAKES = [
    (
        (X.double(), ONE, ZERO, 0, 15),
        "expected x to be float32, bfloat16 or float16, got float64",
    ),
    ((X.int(), ONE, ZERO, 0, 15), "expected x to be float32, bfloat16 or float16, got int32"),
    ((X, ONE.double(), ZERO, 0, 15), "expected scale to be float32, got float64"),
    ((X, ONE, ZERO.half(), 0, 15), "expected zero_point to be float32, got float16"),
    (
        (X, torch.ones(3), ZERO, 0, 15),
        "expected scale of shape [] or [1] when axis is None, got [3]",
    ),
    ((X, ONE, torch.zeros(3, 1), 0, 15), "expected zero_point of shape [] or [1] when axis is"),
    ((X, torch.ones(2), torch.zeros(3), 0, 15, 1), "expected scale of shape [3], got [2]"),
    ((X, torch.ones(3), ZERO, 0, 15, 1), "expected zero_point of shape [3], got []"),
    ((X, ONE, ZERO, 0, 15, 2), "expected axis to be a dimension of x [2, 3], got 2"),
    ((X, ONE, ZERO, 0, 15, -3), "expected axis to be a dimension of x [2, 3], got -3"),
    (
        (X, ONE, ZERO, 7, 7),
        "expected quant_min below quant_max, got quant_min 7 and quant_max 7",
    ),
    (
        (X, ONE, ZERO, 0, 2**23),
        "expected quant_min and quant_max within [-4194304, 4194304], got 0 and 8388608",
    ),
]
CPU_MISTAKES = [
    ((X, ZERO, ZERO, 0, 15), "expected scale to be positive and finite, got 0 at index 0"),
    ((X, -ONE, ZERO, 0, 15), "expected scale to be positive and finite, got -1 at index 0"),
    (
        (X, torch.tensor([1.0, math.nan, 1.0]), torch.zeros(3), 0, 15, 1),
        "expected scale to be positive and finite, got nan at index 1",
    ),
    ((X, ONE / 0, ZERO, 0, 15), "expected scale to be positive and finite, got inf at index 0"),
    ((X, torch.tensor(1e-42), ZERO, 0, 15), "expected scale to be positive and finite, got 1"),
    ((X, ONE, ZERO * math.nan, 0, 15), "expected zero_point to be finite, got "),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_bad_arguments_are_refused(
    device: str, arguments: tuple[object, ...], message: str
) -> None:
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(UsageError) as error:
        fake_quantize(*moved)  # type: ignore[arg-type]
    assert str(error.value).startswith(f"fake_quantize: {message}")


@pytest.mark.parametrize(("arguments", "message"), CPU_MISTAKES)
def test_bad_values_are_refused_on_the_cpu(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError) as error:
        fake_quantize(*arguments)  # type: ignore[arg-type]
    assert str(error.value).startswith(f"fake_quantize: {message}")


@pytest.mark.needs_cuda
def test_parameters_on_another_device_are_refused() -> None:
    with pytest.raises(UsageError, match="expected scale to be on the device of x, cuda:0, got"):
        fake_quantize(X.cuda(), ONE, ZERO.cuda(), 0, 15)


def test_unsupported_layout_is_refused() -> None:
    with pytest.raises(UsageError, match="expected x to be dense on the CPU or a CUDA device, got"):
        fake_quantize(X.to_sparse(), ONE, ZERO, 0, 15)


def test_a_meta_argument_beside_real_ones_is_refused():
    x, scale = torch.ones(4), torch.ones(1)
    with pytest.raises(Exception, match="fake_quantize: expected .* device"):
        torch.ops.fdda.fake_quantize(x, scale.to("meta"), torch.zeros(1), -8, 7)
    meta = torch.ops.fdda.fake_quantize(x.to("meta"), scale.to("meta"), scale.to("meta"), -8, 7)
    assert meta.is_meta
