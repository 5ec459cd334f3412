"""class_stats_loss: values and gradients against the reference, layouts, compilation, errors."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, library

from fdda_ext import _C
from fdda_ext.errors import UsageError
from fdda_ext.ops import class_stats_loss, class_stats_loss_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Problem(NamedTuple):
    """The arguments of class_stats_loss."""

    xs: list[Tensor]
    labels: Tensor
    target_means: list[Tensor]
    target_vars: list[Tensor]
    weight: Tensor


def make_problem(
    dtype: torch.dtype = torch.float32,
    sets: int = 2,
    num_classes: int = 3,
    device: str = "cpu",
    widths: tuple[int, ...] = (5, 17, 64, 33),
    channels_last: bool = False,
) -> Problem:
    """Build four layers of decreasing size; with three classes, class 1 is absent."""
    generator = torch.Generator().manual_seed(0)
    samples = 6
    labels = torch.tensor([0, 2, 2, 0, 2, 0]) % num_classes
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    xs: list[Tensor] = []
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for layer, width in enumerate(widths):
        size = 16 >> layer
        x = torch.randn((samples, width, size, size), generator=generator) + layer
        x = x.to(dtype).to(device)
        xs.append(x.contiguous(memory_format=torch.channels_last) if channels_last else x)
        for targets in (means, variances):
            target = torch.rand((sets, num_classes, width), generator=generator)
            targets.append(target.to(statistics).to(device))
    weight = torch.rand((sets, num_classes), generator=generator).to(statistics).to(device)
    return Problem(xs, labels.to(device), means, variances, weight)


def in_float64(problem: Problem) -> Problem:
    return Problem(
        [x.double() for x in problem.xs],
        problem.labels,
        [t.double() for t in problem.target_means],
        [t.double() for t in problem.target_vars],
        problem.weight.double(),
    )


def gradients(op: object, problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and its gradients for a fixed upstream gradient."""
    xs = [x.detach().requires_grad_() for x in problem.xs]
    loss = op(xs, *problem[1:])  # type: ignore[operator]
    upstream = 1 + torch.arange(loss.numel(), device=loss.device).reshape(loss.shape).to(loss)
    return loss.detach(), list(torch.autograd.grad(loss, xs, upstream))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("sets", "num_classes"), [(1, 1), (2, 1), (2, 3), (3, 5)])
def test_matches_reference(
    device: str, dtype: torch.dtype, channels_last: bool, sets: int, num_classes: int
) -> None:
    problem = make_problem(dtype, sets, num_classes, device, channels_last=channels_last)
    loss, grads = gradients(class_stats_loss, problem)
    expected_loss, expected_grads = gradients(class_stats_loss_reference, in_float64(problem))
    assert loss.dtype == problem.weight.dtype and loss.shape == (sets, 4)
    accuracy = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3}.get(dtype, 1e-2)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=min(accuracy, 1e-5), atol=1e-6)
    for x, grad, expected in zip(problem.xs, grads, expected_grads, strict=True):
        assert grad.dtype == dtype and grad.stride() == x.stride()
        atol = accuracy * expected.abs().max().item()
        torch.testing.assert_close(grad.double(), expected, rtol=accuracy, atol=atol)


def test_every_instruction_set_and_thread_count_gives_the_same_bits() -> None:
    results = []
    before = _C.isa(), torch.get_num_threads()
    try:
        for isa in _C.supported_isas():
            for threads in (1, 2):
                _C.set_isa(isa)
                torch.set_num_threads(threads)
                loss, grads = gradients(class_stats_loss, make_problem())
                results.append([loss, *grads])
    finally:
        _C.set_isa(before[0])
        torch.set_num_threads(before[1])
    for bits in results[1:]:
        for expected, actual in zip(results[0], bits, strict=True):
            assert torch.equal(expected, actual)


def test_literal_value(device: str) -> None:
    """Compare mean 2 and variance 1 with (1, 0) and (2, 3): the losses are 2 and 0.5 * 4."""
    x = torch.tensor([[1.0], [3.0]], device=device)
    means = torch.tensor([[[1.0]], [[2.0]]], device=device)
    variances = torch.tensor([[[0.0]], [[3.0]]], device=device)
    weight = torch.tensor([[1.0], [0.5]], device=device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    loss = class_stats_loss([x], labels, [means], [variances], weight)
    assert loss.tolist() == [[2.0], [2.0]]


def test_absent_classes_do_not_contribute(device: str) -> None:
    problem = make_problem(device=device)
    weight = problem.weight.clone()
    weight[:, 1] = 1e6
    changed = class_stats_loss(*problem[:4], weight)
    assert torch.equal(changed, class_stats_loss(*problem))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(device: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    target = torch.ones((1, 1, shape[1]), device=device)
    labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
    loss = class_stats_loss([x], labels, [target], [target], torch.ones(1, 1, device=device))
    assert loss.tolist() == [[0.0]]
    assert torch.autograd.grad(loss.sum(), x)[0].shape == shape


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(device: str, channels_last: bool) -> None:
    problem = make_problem(torch.float64, device=device, widths=(2, 3), channels_last=channels_last)
    xs = [x[:3, :, :2, :2].requires_grad_() for x in problem.xs]
    labels = problem.labels[:3]

    def loss(*xs: Tensor) -> Tensor:
        return class_stats_loss(xs, labels, *problem[2:])

    assert torch.autograd.gradcheck(loss, xs)


def test_opcheck(device: str) -> None:
    problem = make_problem(device=device, widths=(2, 3))
    op = torch.ops.fdda.class_stats_loss.default
    library.opcheck(op, ([x.requires_grad_() for x in problem.xs], *problem[1:]))
    loss, statistics = op([x.detach() for x in problem.xs], *problem[1:])
    library.opcheck(
        torch.ops.fdda._class_stats_loss_backward.default,
        (loss, [x.detach() for x in problem.xs], *problem[1:], statistics),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiles_without_graph_breaks(device: str) -> None:
    problem = make_problem(device=device)

    def total(xs: list[Tensor]) -> Tensor:
        return class_stats_loss([torch.tanh(x) for x in xs], *problem[1:]).sum()

    grads = []
    for fn in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        xs = [x.detach().requires_grad_() for x in problem.xs]
        grads.append(torch.autograd.grad(fn(xs), xs))
    for expected, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_double_backward_is_refused() -> None:
    problem = make_problem(widths=(2,))
    x = problem.xs[0].requires_grad_()
    loss = class_stats_loss([x], *problem[1:])
    (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="class_stats_loss: double backward is not"):
        grad.sum().backward()


def replaced(**changes: object) -> Problem:
    return make_problem(widths=(2, 3))._replace(**changes)  # type: ignore[arg-type]


GOOD = make_problem(widths=(2, 3))

MISTAKES = [
    (replaced(xs=[]), "expected xs to hold at least one tensor, got an empty list"),
    (
        replaced(target_means=GOOD.target_means[:1]),
        "expected target_means and target_vars to hold one tensor for each of xs, got 2 xs, "
        "1 target_means and 2 target_vars",
    ),
    (
        replaced(xs=[GOOD.xs[0], GOOD.xs[1].int()]),
        "expected xs[1] to be float32, float64, bfloat16 or float16, got int32",
    ),
    (replaced(xs=[GOOD.xs[0], GOOD.xs[1].half()]), "expected xs[1] to be float32, got float16"),
    (
        replaced(xs=[GOOD.xs[0], GOOD.xs[1][:4]]),
        "expected xs[1] to have 6 samples like xs[0], got [4, 3, 8, 8]",
    ),
    (replaced(xs=[GOOD.xs[0], GOOD.labels]), "expected xs[1] to be float32, float64, bfloat16 or"),
    (replaced(labels=GOOD.labels.int()), "expected labels to be int64, got int32"),
    (replaced(labels=GOOD.labels[:3]), "expected labels of shape [6], got [3]"),
    (replaced(weight=GOOD.weight.double()), "expected weight to be float32, got float64"),
    (replaced(weight=GOOD.weight[0]), "expected weight of shape [T, K] with T and K at least 1"),
    (
        replaced(target_means=[GOOD.target_means[0], GOOD.target_means[1].double()]),
        "expected target_means[1] to be float32, got float64",
    ),
    (
        replaced(target_vars=[GOOD.target_vars[0][:1], GOOD.target_vars[1]]),
        "expected target_vars[0] of shape [2, 3, 2], got [1, 3, 2]",
    ),
]


@pytest.mark.parametrize(("problem", "message"), MISTAKES)
def test_bad_arguments_are_refused(device: str, problem: Problem, message: str) -> None:
    moved = [
        argument.to(device) if isinstance(argument, Tensor) else [t.to(device) for t in argument]
        for argument in problem
    ]
    with pytest.raises(UsageError) as error:
        class_stats_loss(*moved)  # type: ignore[arg-type]
    assert str(error.value).startswith(f"class_stats_loss: {message}")


def test_bad_labels_are_refused_on_the_cpu() -> None:
    with pytest.raises(UsageError) as error:
        class_stats_loss(*replaced(labels=GOOD.labels + 1))
    message = "class_stats_loss: expected labels to lie in [0, 3), got 3 at index 1"
    assert str(error.value) == message


def test_a_meta_argument_beside_real_ones_is_refused():
    x, labels, target = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), torch.zeros(1, 1, 3)
    weight = torch.ones(1, 1)
    with pytest.raises(Exception, match="class_stats_loss: expected .* device"):
        torch.ops.fdda.class_stats_loss([x], labels, [target.to("meta")], [target], weight)
