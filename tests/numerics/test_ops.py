"""The streamed operations against the reference in equations.py, their gradients, and their memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hlora.numerics import encodings, equations, ops, types
from hlora.numerics.encodings import ENCODINGS, Encoded, Factored

SHAPES = [(1, 1), (7, 13), (33, 17), (64, 3), (5, 101)]
TOLERANCE = {torch.float64: {"rtol": 1e-11, "atol": 1e-12}, torch.float32: {"rtol": 2e-4, "atol": 2e-5}}
dimensions = st.integers(1, 24)


class Step(NamedTuple):
    """Factors before and after one step, and their gradients."""

    A: Tensor
    B: Tensor
    A_next: Tensor
    B_next: Tensor
    grad_A: Tensor
    grad_B: Tensor


def draw(d_out: int, d_in: int, rank: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> Step:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rank, d_in), (d_out, rank)] * 3
    return Step(*(torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes))


def positive(d_out: int, d_in: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(d_out, d_in, dtype=torch.float64, generator=generator) + 0.01).to(dtype)


def sums(matrix: Tensor) -> Factored:
    return Factored(matrix.sum(1), matrix.sum(0))


def encode(matrix: Tensor, encoding: str) -> Encoded:
    return matrix if encoding == "float32" else sums(matrix)


def dense(matrix: Encoded) -> Tensor:
    return matrix if isinstance(matrix, Tensor) else matrix.dense()


def streamed_pairs(step: Step, lr: float = 0.03, scale: float = 1.7) -> tuple[types.Pair, types.Pair]:
    gradient = ops.effective_gradient(step.A, step.B, step.grad_A, step.grad_B, lr=lr, scale=scale)
    return gradient, ops.difference(step.A_next, step.B_next, (step.A, step.B), scale=scale)


def reference_pairs(step: Step, lr: float = 0.03, scale: float = 1.7) -> tuple[Tensor, Tensor]:
    gradient = equations.effective_gradient(step.A, step.B, step.grad_A, step.grad_B, lr=lr, scale=scale)
    return gradient, equations.movement(step.A, step.B, step.A_next, step.B_next, scale=scale)


@pytest.fixture(params=[1, 50, 1 << 18], ids=["one-row-blocks", "small-blocks", "one-block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(encodings, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_row_blocks_cover_every_row_once(d_out: int, d_in: int, block: int) -> None:
    rows = torch.zeros(d_out)
    for rows_of_block in encodings.row_blocks(d_out, d_in):
        rows[rows_of_block] += 1
        assert (rows_of_block.stop - rows_of_block.start) * d_in <= max(block, d_in)
    assert torch.equal(rows, torch.ones(d_out))


@given(d_out=dimensions, d_in=dimensions, rank=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_low_rank_pairs_equal_the_reference_for_any_shape(d_out: int, d_in: int, rank: int, seed: int) -> None:
    step = draw(d_out, d_in, rank, seed=seed)
    for (left, right), expected in zip(streamed_pairs(step), reference_pairs(step), strict=True):
        assert left.shape == (d_out, 2 * rank)
        torch.testing.assert_close(left @ right, expected, **TOLERANCE[torch.float64])


def test_a_tiny_movement_does_not_cancel_in_float32() -> None:
    """Weights of order 1 moved by 1e-6: the difference of two float32 products has lost nearly all of it."""
    step = draw(40, 30, dtype=torch.float32)
    A_next, B_next = step.A + 1e-6 * step.grad_A, step.B + 1e-6 * step.grad_B
    exact = equations.movement(*(t.double() for t in (step.A, step.B, A_next, B_next)), scale=1.0)
    left, right = ops.difference(A_next, B_next, (step.A, step.B), scale=1.0)
    naive = equations.movement(step.A, step.B, A_next, B_next, scale=1.0)
    error = (left @ right - exact).abs().max() / exact.abs().max()
    assert error < 1e-6
    assert (naive - exact).abs().max() / exact.abs().max() > 30 * error


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_streamed_accumulation_equals_the_reference(d_out: int, d_in: int, dtype: torch.dtype, block: int) -> None:
    step = draw(d_out, d_in, dtype=dtype)
    omega = positive(d_out, d_in, dtype)
    expected = equations.path_integral(omega, *reference_pairs(step))
    ops.accumulate_(omega, *streamed_pairs(step))
    torch.testing.assert_close(omega, expected, **TOLERANCE[dtype])


@given(d_out=dimensions, d_in=dimensions, rank=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_factored_accumulation_is_the_row_and_column_sums_of_the_dense(
    d_out: int, d_in: int, rank: int, seed: int
) -> None:
    omega = torch.zeros(d_out, d_in, dtype=torch.float64)
    factored = sums(omega)
    for number in range(3):
        pairs = streamed_pairs(draw(d_out, d_in, rank, seed=seed + number))
        ops.accumulate_(omega, *pairs)
        ops.accumulate_(factored, *pairs)
    torch.testing.assert_close(factored, sums(omega), rtol=1e-10, atol=1e-10)


MATRICES = [(7, 13, 3, 1.7), (33, 17, 2, 0.5), (7, 13, 3, 1.7), (7, 13, 3, 0.9), (64, 130, 2, 2.0)]  # d_out, d_in, r, s


def drawn_steps(seed: int = 0) -> list[types.Step]:
    """A step of each of MATRICES, with a learning rate of its own."""
    steps = []
    for number, (d_out, d_in, rank, _) in enumerate(MATRICES):
        d = draw(d_out, d_in, rank, torch.float32, 10 * number + seed)
        steps.append(types.Step(d.A, d.B, d.grad_A, d.grad_B, 0.01 * (number + 1), d.A_next, d.B_next))
    return steps


def integrated(omega: Tensor, step: types.Step, scale: float) -> Tensor:
    """By the equations, in float64."""
    A, B, grad_A, grad_B, lr, A_next, B_next = (t.double() if isinstance(t, Tensor) else t for t in step)
    gradient = equations.effective_gradient(A, B, grad_A, grad_B, lr=lr, scale=scale)
    return equations.path_integral(omega, gradient, equations.movement(A, B, A_next, B_next, scale=scale))


COUNTED = torch.ones((), dtype=torch.bool)
SCALES = [scale for *_, scale in MATRICES]


@pytest.mark.parametrize("encoding", ["float32", "factored"])
def test_every_matrix_of_a_model_gets_its_own_step(encoding: str, block: int) -> None:
    """Different shapes, ranks, scales and learning rates in one list."""
    steps = drawn_steps()
    starts = [positive(d_out, d_in, torch.float32, number) for number, (d_out, d_in, *_) in enumerate(MATRICES)]
    omegas = [encode(start.clone(), encoding) for start in starts]
    ops.accumulate_all_(omegas, steps, SCALES, counted=COUNTED)
    for omega, start, mine, scale in zip(omegas, starts, steps, SCALES, strict=True):
        expected = integrated(start.double(), mine, scale)
        for got, wanted in zip(
            *(encodings.parts(encode(w, encoding) if isinstance(w, Tensor) else w).values() for w in (omega, expected)),
            strict=True,
        ):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("encoding", ["float32", "factored"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_does_not_count_leaves_no_trace_whatever_it_holds(encoding: str, bad: float) -> None:
    first, broken = drawn_steps(), [step._replace(grad_A=bad * step.grad_A) for step in drawn_steps(1)]
    omegas = [encodings.zeros(encoding, *sizes[:2], device=torch.device("cpu")) for sizes in MATRICES]
    ops.accumulate_all_(omegas, first, SCALES, counted=COUNTED)
    before = [{name: part.clone() for name, part in encodings.parts(omega).items()} for omega in omegas]
    ops.accumulate_all_(omegas, broken, SCALES, counted=~COUNTED)
    for omega, parts in zip(omegas, before, strict=True):
        for name, part in encodings.parts(omega).items():
            assert part.any()
            assert torch.equal(part, parts[name])


def test_zero_movement_leaves_omega_exactly_as_it_was(block: int) -> None:
    step = draw(7, 13)
    omega = positive(7, 13)
    before, factored = omega.clone(), sums(omega)
    gradient, _ = streamed_pairs(step)
    still = ops.difference(step.A, step.B, (step.A, step.B), scale=1.7)
    ops.accumulate_(omega, gradient, still)
    ops.accumulate_(factored, gradient, still)
    assert torch.equal(omega, before)
    torch.testing.assert_close(factored, sums(before), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_streamed_consolidation_equals_the_reference(d_out: int, d_in: int, dtype: torch.dtype, block: int) -> None:
    _, delta = streamed_pairs(draw(d_out, d_in, dtype=dtype))
    omega = positive(d_out, d_in, dtype) - 0.3
    expected = equations.consolidate(omega, delta[0] @ delta[1], 1e-3)
    negative = int((omega < 0).sum())
    importance, share = ops.consolidate(omega, delta, 1e-3)
    torch.testing.assert_close(importance, expected, **TOLERANCE[dtype])
    assert share == negative / (d_out * d_in)


def test_factored_consolidation_is_the_row_and_column_sums_of_the_ratio_of_dense_forms(block: int) -> None:
    _, delta = streamed_pairs(draw(33, 17))
    omega = sums(positive(33, 17))
    moved = sums((delta[0] @ delta[1]) ** 2).dense()
    importance, share = ops.consolidate(omega, delta, 1e-3)
    assert isinstance(importance, Factored)
    torch.testing.assert_close(importance, sums(omega.dense() / (moved + 1e-3)), rtol=1e-10, atol=0)
    assert share == 0.0


def test_factored_consolidation_takes_negative_sums_as_zero_and_reports_their_share() -> None:
    _, delta = streamed_pairs(draw(3, 5))
    omega = Factored(torch.tensor([-1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 1.0, 1.0, 1.5, -0.5]).double())
    importance, share = ops.consolidate(omega, delta, 1e-3)
    assert share == 2 / 8
    assert isinstance(importance, Factored)
    assert importance.row[0] == 0
    assert importance.column[4] == 0
    assert importance.row[1] > 0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_consolidating_zero_omega_and_zero_movement_gives_zero(encoding: str) -> None:
    step = draw(7, 13)
    still = ops.difference(step.A, step.B, (step.A, step.B), scale=1.7)
    importance, share = ops.consolidate(encodings.zeros(encoding, 7, 13, device=torch.device("cpu")), still, 1e-3)
    assert float(encodings.norm(importance)) == 0.0
    assert share == 0.0


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_streamed_penalty_equals_the_reference(d_out: int, d_in: int, block: int) -> None:
    step = draw(d_out, d_in)
    importance = positive(d_out, d_in)
    theta, theta_nu = 1.7 * step.B_next @ step.A_next, 1.7 * step.B @ step.A
    expected = equations.layer_penalty(importance, theta, theta_nu)
    delta = ops.difference(step.A_next, step.B_next, (step.A, step.B), scale=1.7)
    torch.testing.assert_close(ops.penalty(importance, delta), expected, rtol=1e-11, atol=0)


def autograd_penalty(importance: Tensor, step: Step, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    A, B = step.A_next.clone().requires_grad_(), step.B_next.clone().requires_grad_()
    value = equations.layer_penalty(importance, scale * B @ A, scale * step.B @ step.A)
    return value.detach(), *torch.autograd.grad(value, (A, B))


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("encoding", ["dense", "factored"])
def test_closed_form_gradients_equal_autograd_of_the_reference(
    d_out: int, d_in: int, encoding: str, block: int
) -> None:
    step = draw(d_out, d_in)
    importance = positive(d_out, d_in) if encoding == "dense" else sums(positive(d_out, d_in))
    got = ops.penalty_with_gradients(importance, step.A_next, step.B_next, anchor=(step.A, step.B), scale=1.7)
    for mine, expected in zip(got, autograd_penalty(dense(importance), step, 1.7), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-11)


@given(
    d_out=dimensions,
    d_in=dimensions,
    rank=st.integers(1, 5),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    kept=st.sampled_from(ENCODINGS),
)
@settings(max_examples=60, deadline=None)
def test_penalty_of_any_shape_and_dtype_equals_float64_autograd(
    d_out: int, d_in: int, rank: int, seed: int, dtype: torch.dtype, kept: str
) -> None:
    """Factors in `dtype`, importance kept as `kept`; computed in float32 or wider whatever they are."""
    step = draw(d_out, d_in, rank, dtype, seed)
    importance = positive(d_out, d_in, torch.float32, seed)
    encoded = encode(importance, kept)
    value, grad_A, grad_B = ops.penalty_with_gradients(
        encoded, step.A_next, step.B_next, anchor=(step.A, step.B), scale=1.7
    )
    assert value.dtype == grad_A.dtype == grad_B.dtype == torch.promote_types(dtype, torch.float32)
    expected = autograd_penalty(dense(encoded).double(), Step(*(t.double() for t in step)), 1.7)
    for mine, other in zip((value, grad_A, grad_B), expected, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("encoding", ["dense", "factored"])
def test_factors_of_the_penalty_pass_gradcheck(encoding: str) -> None:
    step = draw(5, 7)
    importance = positive(5, 7) if encoding == "dense" else sums(positive(5, 7))

    class Penalty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, A: Tensor, B: Tensor) -> Tensor:
            value, *gradients = ops.penalty_with_gradients(importance, A, B, anchor=(step.A, step.B), scale=1.7)
            ctx.save_for_backward(*gradients)
            return value

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
            return tuple(upstream * gradient for gradient in ctx.saved_tensors)

    assert torch.autograd.gradcheck(Penalty.apply, (step.A_next.requires_grad_(), step.B_next.requires_grad_()))


def test_factored_penalty_equals_the_penalty_of_its_dense_form() -> None:
    step = draw(33, 17)
    factored = sums(positive(33, 17))
    delta = ops.difference(step.A_next, step.B_next, (step.A, step.B), scale=1.7)
    torch.testing.assert_close(ops.penalty(factored, delta), ops.penalty(factored.dense(), delta), rtol=1e-11, atol=0)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("anchored", [True, False])
def test_the_penalties_of_a_model_are_those_of_each_matrix(encoding: str, anchored: bool, block: int) -> None:
    steps = drawn_steps()
    importances = [
        encode(positive(d_out, d_in, torch.float32, number), encoding)
        for number, (d_out, d_in, *_) in enumerate(MATRICES)
    ]
    anchors = [(step.A, step.B) if anchored else None for step in steps]
    As, Bs = [step.A_next for step in steps], [step.B_next for step in steps]
    values, grad_As, grad_Bs = ops.penalties_with_gradients(importances, As, Bs, anchors=anchors, scales=SCALES)
    assert values.shape == (len(MATRICES),)
    for number, importance in enumerate(importances):
        reference = Step(
            *(
                torch.zeros_like(t) if t is None else t.double()
                for t in (
                    *(anchors[number] or (0 * steps[number].A, 0 * steps[number].B)),
                    As[number],
                    Bs[number],
                    As[number],
                    Bs[number],
                )
            )
        )
        expected = autograd_penalty(dense(importance).double(), reference, SCALES[number])
        for mine, other in zip((values[number], grad_As[number], grad_Bs[number]), expected, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zero_importance_costs_nothing_and_pulls_nowhere(encoding: str) -> None:
    step = draw(7, 13)
    zero = encodings.zeros(encoding, 7, 13, device=torch.device("cpu"))
    for result in ops.penalty_with_gradients(zero, step.A_next, step.B_next, anchor=(step.A, step.B), scale=1.7):
        assert not result.any()


@pytest.mark.parametrize("encoding", ["dense", "factored"])
def test_penalty_at_its_anchor_is_zero_with_zero_gradients(encoding: str) -> None:
    step = draw(7, 13, dtype=torch.float32)
    importance = positive(7, 13, torch.float32) if encoding == "dense" else sums(positive(7, 13, torch.float32))
    value, grad_A, grad_B = ops.penalty_with_gradients(importance, step.A, step.B, anchor=(step.A, step.B), scale=1.7)
    assert value.item() == 0.0
    assert not grad_A.any()
    assert not grad_B.any()


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that an operation makes; views and in-place results do not count."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            new = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.storages
            if new:
                self.largest = max(self.largest, tensor.numel())
        return result


def largest_tensor_made_by(operation: Callable[[], Any], *known: Tensor) -> int:
    with LargestTensor(list(known)) as mode:
        operation()
    return mode.largest


D_OUT, D_IN, RANK, BLOCK = 120, 90, 2, 900  # BLOCK is above every low-rank factor: 120·4 = 480 elements


def memory_cases() -> list[Any]:
    step = draw(D_OUT, D_IN, RANK, torch.float32)
    gradient, delta = streamed_pairs(step)
    exact = positive(D_OUT, D_IN, torch.float32)

    cases = []
    for encoding in ENCODINGS:
        kept = encodings.zeros(encoding, D_OUT, D_IN, device=torch.device("cpu"))
        importance = encode(exact, encoding)
        made = [*encodings.parts(kept).values(), *encodings.parts(importance).values()]
        for name, operation in {
            "recording": lambda m, _: ops.accumulate_(m, gradient, delta),
            "consolidation": lambda m, _: ops.consolidate(m, delta, 1e-3),
            "penalty": lambda _, m: ops.penalty_with_gradients(
                m, step.A_next, step.B_next, anchor=(step.A, step.B), scale=1.7
            ),
            "norm": lambda _, m: encodings.norm(m),
            "total": lambda _, m: encodings.total(m),
        }.items():
            case = partial(operation, kept, importance)
            cases.append(pytest.param(case, [exact, *made], id=f"{encoding}-{name}"))
    return cases


@pytest.mark.parametrize(("operation", "known"), memory_cases())
def test_no_operation_makes_a_tensor_larger_than_one_block(
    operation: Callable[[], Any], known: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encodings, "_BLOCK", BLOCK)
    largest = largest_tensor_made_by(operation, *known)
    assert 0 < largest <= BLOCK < D_OUT * D_IN


@pytest.mark.parametrize("name", ["factored-recording", "factored-penalty"])
def test_factored_recording_and_penalty_make_nothing_larger_than_the_low_rank_factors(name: str) -> None:
    """Not even one block: O((d_out + d_in) r)."""
    operation, known = next(case.values for case in memory_cases() if case.id == name)
    assert largest_tensor_made_by(operation, *known) <= D_OUT * 2 * RANK


def test_the_memory_measure_sees_a_dense_temporary() -> None:
    step = draw(D_OUT, D_IN, RANK, torch.float32)
    assert largest_tensor_made_by(lambda: reference_pairs(step)) == D_OUT * D_IN
