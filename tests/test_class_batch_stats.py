"""class_batch_stats: values and gradients against the reference, layouts, compilation, errors."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, library

from fdda_ext import _C
from fdda_ext.errors import UsageError
from fdda_ext.ops import class_batch_stats, class_batch_stats_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def channel_slice(x: Tensor) -> Tensor:
    """Return a slice of the channels of a wider tensor, which is not dense."""
    return torch.cat([x, torch.full_like(x, 3e4)], 1)[:, : x.shape[1]]


def channels_last_slice(x: Tensor) -> Tensor:
    return channels_last(torch.cat([x, torch.full_like(x, 3e4)], 1))[:, : x.shape[1]]


def transposed(x: Tensor) -> Tensor:
    """Make the samples innermost, so that the operator needs a copy."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    contiguous,
    channels_last,
    channel_slice,
    channels_last_slice,
    transposed,
]

# Ragged ends, one position, one channel, [N, C], several blocks, strips and merge blocks.
SHAPES = [
    (6, 4, 5, 7),
    (5, 3, 1, 1),
    (4, 1, 9, 3),
    (9, 130),
    (1, 2, 3),
    (3, 5, 2, 3, 4),
    (4, 300, 3, 3),
    (2, 3, 70, 71),
    (40, 70, 8, 8),
]


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, num_classes: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return labels, and activations whose channels have means of about -8 to 8."""
    generator = torch.Generator().manual_seed(seed)
    offset = 4 * torch.randn((1, shape[1]) + (1,) * (len(shape) - 2), generator=generator)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    labels = torch.randint(num_classes, shape[:1], generator=generator)
    return x.to(dtype), labels


def assert_matches_float64(x: Tensor, labels: Tensor, num_classes: int) -> None:
    """Compare with the reference in float64: count exactly, mean and var to float32 accuracy."""
    count, mean, var = class_batch_stats(x, labels, num_classes)
    expected = class_batch_stats_reference(x.double(), labels, num_classes)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert count.dtype == torch.int64 and mean.dtype == dtype and var.dtype == dtype
    assert torch.equal(count, expected[0])
    accuracy = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(mean.double(), expected[1], rtol=accuracy, atol=accuracy)
    torch.testing.assert_close(var.double(), expected[2], rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(
    device: str, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    for num_classes in (1, 3):
        x, labels = (t.to(device) for t in make_inputs(shape, dtype, num_classes))
        assert_matches_float64(layout(x), labels, num_classes)


def gradient(
    op: Callable[..., tuple[Tensor, Tensor, Tensor]], x: Tensor, labels: Tensor, num_classes: int
) -> Tensor:
    """Return the gradient with respect to x of a fixed random combination of mean and var."""
    x = x.detach().requires_grad_()
    _, mean, var = op(x, labels, num_classes)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn((2, *mean.shape), generator=generator).to(mean)
    return torch.autograd.grad((weights[0] * mean + weights[1] * var).sum(), x)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_matches_reference(
    device: str, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x, labels = (t.to(device) for t in make_inputs(shape, dtype, 3))
    x = layout(x)
    grad = gradient(class_batch_stats, x, labels, 3)
    expected = gradient(class_batch_stats_reference, x.double(), labels, 3)
    assert grad.dtype == x.dtype and grad.stride() == torch.empty_like(x).stride()
    accuracy = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3}.get(dtype, 1e-2)
    atol = accuracy * expected.abs().max().item()
    torch.testing.assert_close(grad.double(), expected, rtol=accuracy, atol=atol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    shape: tuple[int, ...],
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
                    x, labels = make_inputs(shape, dtype, 3)
                    for layout in (contiguous, channels_last):
                        bits += class_batch_stats(layout(x), labels, 3)
                        bits.append(gradient(class_batch_stats, layout(x), labels, 3))
                results.append(bits)
    finally:
        _C.set_isa(before[0])
        torch.set_num_threads(before[1])
    for bits in results[1:]:
        for expected, actual in zip(results[0], bits, strict=True):
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_gradients_written_past_the_caches_are_correct(
    isa: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """Use more than 16 MiB, with planes aligned and not aligned to cache lines."""
    backward = torch.ops.fdda._class_batch_stats_backward
    for side in (56, 30, 7):
        channels = 2**24 // dtype.itemsize // (2 * side * side) + 1
        x, labels = make_inputs((2, channels, side, side), dtype, 3)
        x = layout(x)
        count, mean, _ = class_batch_stats(x, labels, 3)
        grads = torch.randn(2, 3, channels)
        grad_x = backward(*grads, x, labels, count, mean)
        for part in (slice(0, 64), slice(-64, None)):
            some = [tensor[:, part] for tensor in (*grads, x)]
            assert torch.equal(grad_x[:, part], backward(*some, labels, count, mean[:, part]))


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 7),
    channels=st.integers(1, 40),
    positions=st.integers(1, 40),
    num_classes=st.integers(1, 4),
    rows=st.booleans(),
    isa=st.sampled_from(_C.supported_isas()),
    seed=st.integers(0, 10),
)
def test_small_random_shapes_match_reference(
    samples: int, channels: int, positions: int, num_classes: int, rows: bool, isa: str, seed: int
) -> None:
    x, labels = make_inputs((samples, channels, positions, 1), torch.float32, num_classes, seed)
    before = _C.isa()
    _C.set_isa(isa)
    try:
        assert_matches_float64(channels_last(x) if rows else x, labels, num_classes)
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", [(4, 3, 56, 56), (300, 20), (2, 2, 200, 200)], ids=str)
def test_variance_is_stable_under_a_large_mean(
    device: str, isa: str, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]
) -> None:
    """Use mean 100 and variance 1, where single-pass sums of squares lose three digits."""
    generator = torch.Generator().manual_seed(0)
    x = layout((100 + torch.randn(shape, generator=generator)).to(device))
    labels = torch.arange(shape[0], device=device) % 2
    _, mean, var = class_batch_stats(x, labels, 2)
    _, expected_mean, expected_var = class_batch_stats_reference(x.double(), labels, 2)
    assert ((var.double() - expected_var) / expected_var).abs().max() < 1e-5
    assert ((mean.double() - expected_mean) / expected_mean).abs().max() < 1e-6


def test_variance_is_stable_when_the_first_value_is_an_outlier(device: str) -> None:
    """Use values for which a shift by the first value is useless."""
    x = 100 + torch.randn(2, 3, 40, 40)
    x[..., 0, 0] = 0
    x[:, :, 0, 1] = -1000
    x = x.to(device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    _, _, var = class_batch_stats(x, labels, 1)
    _, _, expected = class_batch_stats_reference(x.double(), labels, 1)
    assert ((var.double() - expected) / expected).abs().max() < 1e-5


def test_literal_values_and_empty_classes(device: str) -> None:
    x = torch.tensor([[[1.0, 3.0]], [[5.0, 5.0]], [[7.0, 9.0]]], device=device)
    count, mean, var = class_batch_stats(x, torch.tensor([2, 0, 2], device=device), 4)
    assert count.tolist() == [2, 0, 4, 0]
    assert mean.tolist() == [[5.0], [0.0], [5.0], [0.0]]
    assert var.tolist() == [[0.0], [0.0], [10.0], [0.0]]


def test_one_class_gives_the_batch_norm_statistics(device: str) -> None:
    x = torch.randn(4, 6, 5, 5, device=device)
    norm = torch.nn.BatchNorm2d(6, momentum=1.0, device=device)
    norm(x)
    count, mean, var = class_batch_stats(x, torch.zeros(4, dtype=torch.int64, device=device), 1)
    torch.testing.assert_close(mean[0], norm.running_mean)
    torch.testing.assert_close(var[0] * count[0] / (count[0] - 1), norm.running_var)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0)], ids=str)
def test_empty_tensors(device: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
    count, mean, var = class_batch_stats(x, labels, 2)
    assert count.tolist() == [shape[0] * (shape[2] if len(shape) > 2 else 1), 0]
    assert mean.shape == (2, shape[1]) and not mean.any() and not var.any()
    (grad,) = torch.autograd.grad(mean.sum() + var.sum(), x)
    assert grad.shape == shape


@pytest.mark.parametrize("layout", [contiguous, channels_last, channel_slice, transposed])
def test_gradcheck(device: str, layout: Callable[[Tensor], Tensor]) -> None:
    x, labels = (t.to(device) for t in make_inputs((5, 3, 3, 2), torch.float64, 3))
    assert torch.autograd.gradcheck(
        lambda x: class_batch_stats(x, labels, 3)[1:], layout(x).requires_grad_()
    )


@pytest.mark.parametrize("layout", [contiguous, channels_last, channel_slice])
def test_opcheck(device: str, layout: Callable[[Tensor], Tensor]) -> None:
    x, labels = (t.to(device) for t in make_inputs((5, 3, 3, 2), torch.float32, 3))
    x = layout(x)
    op = torch.ops.fdda.class_batch_stats.default
    # opcheck's ahead-of-time test adds up the outputs and fails if the first is an integer.
    # test_compiles_without_graph_breaks covers this.
    library.opcheck(
        op,
        (x.detach().requires_grad_(), labels, 3),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    count, mean, var = op(x, labels, 3)
    library.opcheck(
        torch.ops.fdda._class_batch_stats_backward.default,
        (mean, var, x, labels, count, mean),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(device: str, dynamic: bool) -> None:
    def loss(x: Tensor, labels: Tensor) -> Tensor:
        count, mean, var = class_batch_stats(torch.tanh(x), labels, 3)
        return (count[:, None] * mean * var).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x, labels = (t.to(device) for t in make_inputs((5, 3, 3, 2), torch.float32, 3))
    grads = []
    for fn in (loss, compiled):
        leaf = x.detach().requires_grad_()
        grads.append(torch.autograd.grad(fn(leaf, labels), leaf)[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_double_backward_is_refused() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    _, _, var = class_batch_stats(x, torch.zeros(4, dtype=torch.int64), 1)
    (grad,) = torch.autograd.grad(var.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="class_batch_stats: double backward is not"):
        grad.sum().backward()


X = torch.zeros(4, 3, 2)
LABELS = torch.zeros(4, dtype=torch.int64)

MISTAKES = [
    (
        (X.int(), LABELS, 2),
        "expected x to be float32, float64, bfloat16 or float16, got int32",
    ),
    ((X[:, 0, 0], LABELS, 2), "expected x of shape [N, C, *], got [4]"),
    ((X, LABELS.int(), 2), "expected labels to be int64, got int32"),
    ((X, LABELS[:3], 2), "expected labels of shape [4], got [3]"),
    ((X, LABELS[:, None], 2), "expected labels of shape [4], got [4, 1]"),
    ((X, LABELS, 0), "expected num_classes to be at least 1, got 0"),
]
CPU_MISTAKES = [
    ((X, LABELS + 2, 2), "expected labels to lie in [0, 2), got 2 at index 0"),
    (
        (X, torch.tensor([0, 1, -1, 0]), 2),
        "expected labels to lie in [0, 2), got -1 at index 2",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_bad_arguments_are_refused(
    device: str, arguments: tuple[object, ...], message: str
) -> None:
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(UsageError) as error:
        class_batch_stats(*moved)  # type: ignore[arg-type]
    assert str(error.value) == f"class_batch_stats: {message}"


@pytest.mark.parametrize(("arguments", "message"), CPU_MISTAKES)
def test_bad_labels_are_refused_on_the_cpu(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError) as error:
        class_batch_stats(*arguments)  # type: ignore[arg-type]
    assert str(error.value) == f"class_batch_stats: {message}"


@pytest.mark.needs_cuda
def test_bad_labels_are_ignored_on_cuda() -> None:
    x = torch.tensor([[1.0], [3.0], [7.0]], device="cuda")
    count, mean, _ = class_batch_stats(x, torch.tensor([0, 5, -1], device="cuda"), 2)
    assert count.tolist() == [1, 0] and mean.tolist() == [[1.0], [0.0]]


def test_a_meta_argument_beside_real_ones_is_refused():
    x, labels = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(Exception, match="class_batch_stats: expected .* device"):
        torch.ops.fdda.class_batch_stats(x, labels.to("meta"), 2)
    assert torch.ops.fdda.class_batch_stats(x.to("meta"), labels.to("meta"), 2)[1].is_meta
