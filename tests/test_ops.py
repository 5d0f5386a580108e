"""The streamed operations against the reference in equations.py, their gradients, and their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hlora import encodings, equations, ops
from hlora.encodings import Factored

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


def streamed_pairs(step: Step, lr: float = 0.03, scale: float = 1.7) -> tuple[ops.Pair, ops.Pair]:
    gradient = ops.effective_gradient(step.A, step.B, step.grad_A, step.grad_B, lr, scale)
    return gradient, ops.difference(step.A_next, step.B_next, (step.A, step.B), scale)


def reference_pairs(step: Step, lr: float = 0.03, scale: float = 1.7) -> tuple[Tensor, Tensor]:
    gradient = equations.effective_gradient(step.A, step.B, step.grad_A, step.grad_B, lr, scale)
    return gradient, equations.movement(step.A, step.B, step.A_next, step.B_next, scale)


@pytest.fixture(params=[1, 50, 1 << 18], ids=["one-row-blocks", "small-blocks", "one-block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ops, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_row_blocks_cover_every_row_once(d_out: int, d_in: int, block: int) -> None:
    rows = torch.zeros(d_out)
    for rows_of_block in ops._row_blocks(d_out, d_in):
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
    left, right = ops.difference(A_next, B_next, (step.A, step.B), 1.0)
    naive = equations.movement(step.A, step.B, A_next, B_next, 1.0)
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


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_accumulation_of_a_dense_gradient_equals_the_reference(
    d_out: int, d_in: int, dtype: torch.dtype, block: int
) -> None:
    step = draw(d_out, d_in, dtype=dtype)
    _, delta = streamed_pairs(step)
    gradient = positive(d_out, d_in, dtype, seed=5) - 0.4
    omega, factored = positive(d_out, d_in, dtype), sums(positive(d_out, d_in, dtype))
    expected = equations.path_integral(omega, gradient, reference_pairs(step)[1])
    given = gradient.clone()
    ops.accumulate_(omega, gradient, delta)
    ops.accumulate_(factored, gradient, delta)
    torch.testing.assert_close(omega, expected, **TOLERANCE[dtype])
    torch.testing.assert_close(factored, sums(expected), rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-10)
    assert torch.equal(gradient, given)


def test_bfloat16_accumulation_of_a_dense_gradient_follows_float32_over_many_small_steps() -> None:
    torch.manual_seed(0)
    omega = torch.zeros(40, 50, dtype=torch.bfloat16)
    for _ in range(2000):
        ops.accumulate_(omega, torch.ones(40, 50), (-1e-3 * torch.ones(40, 1), torch.ones(1, 50)))
    assert float(omega.float().mean()) == pytest.approx(2.0, abs=5 * 0.0028)  # as below


def test_bfloat16_accumulation_follows_float32_over_many_small_steps() -> None:
    """ω grows to 2 by 2000 additions of 1e-3, each below the bfloat16 unit of 2⁻⁷ that rounding to nearest needs."""
    torch.manual_seed(0)
    ones = (torch.ones(40, 1), torch.ones(1, 50))
    minus = (-1e-3 * torch.ones(40, 1), torch.ones(1, 50))
    omega = torch.zeros(40, 50, dtype=torch.bfloat16)
    for _ in range(2000):
        ops.accumulate_(omega, ones, minus)
    # √(2·2⁻⁷) = 0.125 an element at most, 0.0028 over 2000 elements
    assert float(omega.float().mean()) == pytest.approx(2.0, abs=5 * 0.0028)


def test_zero_movement_leaves_omega_exactly_as_it_was(block: int) -> None:
    step = draw(7, 13)
    omega = positive(7, 13)
    before, factored = omega.clone(), sums(omega)
    gradient, _ = streamed_pairs(step)
    still = ops.difference(step.A, step.B, (step.A, step.B), 1.7)
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


@pytest.mark.parametrize("encoding", encodings.ENCODINGS)
def test_consolidating_zero_omega_and_zero_movement_gives_zero(encoding: str) -> None:
    step = draw(7, 13)
    still = ops.difference(step.A, step.B, (step.A, step.B), 1.7)
    importance, share = ops.consolidate(encodings.zeros(encoding, 7, 13, torch.device("cpu")), still, 1e-3)
    assert float(encodings.norm(importance)) == 0.0
    assert share == 0.0


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_streamed_penalty_equals_the_reference(d_out: int, d_in: int, block: int) -> None:
    step = draw(d_out, d_in)
    importance = positive(d_out, d_in)
    theta, theta_nu = 1.7 * step.B_next @ step.A_next, 1.7 * step.B @ step.A
    expected = equations.layer_penalty(importance, theta, theta_nu)
    delta = ops.difference(step.A_next, step.B_next, (step.A, step.B), 1.7)
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
    dense = importance.dense() if isinstance(importance, Factored) else importance
    got = ops.penalty_with_gradients(importance, step.A_next, step.B_next, (step.A, step.B), 1.7)
    for mine, expected in zip(got, autograd_penalty(dense, step, 1.7), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-11)


@given(
    d_out=dimensions,
    d_in=dimensions,
    rank=st.integers(1, 5),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    kept=st.sampled_from(["float32", "bfloat16", "factored"]),
)
@settings(max_examples=60, deadline=None)
def test_penalty_of_any_shape_and_dtype_equals_float64_autograd(
    d_out: int, d_in: int, rank: int, seed: int, dtype: torch.dtype, kept: str
) -> None:
    """Factors in `dtype`, importance kept as `kept`; computed in float32 or wider whatever they are."""
    step = draw(d_out, d_in, rank, dtype, seed)
    importance = positive(d_out, d_in, torch.float32, seed)
    encoded = sums(importance) if kept == "factored" else importance.to(getattr(torch, kept))
    dense = encoded.dense() if isinstance(encoded, Factored) else encoded
    value, grad_A, grad_B = ops.penalty_with_gradients(encoded, step.A_next, step.B_next, (step.A, step.B), 1.7)
    assert value.dtype == grad_A.dtype == grad_B.dtype == torch.promote_types(dtype, torch.float32)
    expected = autograd_penalty(dense.double(), Step(*(t.double() for t in step)), 1.7)
    for mine, other in zip((value, grad_A, grad_B), expected, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("encoding", ["dense", "factored"])
def test_factors_of_the_penalty_pass_gradcheck(encoding: str) -> None:
    step = draw(5, 7)
    importance = positive(5, 7) if encoding == "dense" else sums(positive(5, 7))

    class Penalty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, A: Tensor, B: Tensor) -> Tensor:
            value, *gradients = ops.penalty_with_gradients(importance, A, B, (step.A, step.B), 1.7)
            ctx.save_for_backward(*gradients)
            return value

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
            return tuple(upstream * gradient for gradient in ctx.saved_tensors)

    assert torch.autograd.gradcheck(Penalty.apply, (step.A_next.requires_grad_(), step.B_next.requires_grad_()))


def test_factored_penalty_equals_the_penalty_of_its_dense_form() -> None:
    step = draw(33, 17)
    factored = sums(positive(33, 17))
    delta = ops.difference(step.A_next, step.B_next, (step.A, step.B), 1.7)
    torch.testing.assert_close(ops.penalty(factored, delta), ops.penalty(factored.dense(), delta), rtol=1e-11, atol=0)


@pytest.mark.parametrize("encoding", encodings.ENCODINGS)
def test_zero_importance_costs_nothing_and_pulls_nowhere(encoding: str) -> None:
    step = draw(7, 13)
    zero = encodings.zeros(encoding, 7, 13, torch.device("cpu"))
    for result in ops.penalty_with_gradients(zero, step.A_next, step.B_next, (step.A, step.B), 1.7):
        assert not result.any()


@pytest.mark.parametrize("encoding", ["dense", "factored"])
def test_penalty_at_its_anchor_is_zero_with_zero_gradients(encoding: str) -> None:
    step = draw(7, 13, dtype=torch.float32)
    importance = positive(7, 13, torch.float32) if encoding == "dense" else sums(positive(7, 13, torch.float32))
    value, grad_A, grad_B = ops.penalty_with_gradients(importance, step.A, step.B, (step.A, step.B), 1.7)
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
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.storages:
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

    def penalty(importance: encodings.Encoded) -> Any:
        return lambda: ops.penalty_with_gradients(importance, step.A_next, step.B_next, (step.A, step.B), 1.7)

    cases = []
    for encoding in encodings.ENCODINGS:
        matrix = encodings.zeros(encoding, D_OUT, D_IN, torch.device("cpu"))
        for name, operation in {
            "recording": lambda m=matrix: ops.accumulate_(m, gradient, delta),
            "exact-recording": lambda m=matrix: ops.accumulate_(m, exact, delta),
            "consolidation": lambda m=matrix: ops.consolidate(m, delta, 1e-3),
            "penalty": penalty(matrix),
        }.items():
            cases.append(pytest.param(operation, [exact, *encodings.parts(matrix).values()], id=f"{encoding}-{name}"))
    return cases


@pytest.mark.parametrize(("operation", "known"), memory_cases())
def test_no_operation_makes_a_tensor_larger_than_one_block(
    operation: Callable[[], Any], known: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_BLOCK", BLOCK)
    largest = largest_tensor_made_by(operation, *known)
    assert 0 < largest <= BLOCK < D_OUT * D_IN


@pytest.mark.parametrize("name", ["factored-recording", "factored-exact-recording", "factored-penalty"])
def test_factored_recording_and_penalty_make_nothing_larger_than_the_low_rank_factors(name: str) -> None:
    """Not even one block: O((d_out + d_in) r)."""
    operation, known = next(case.values for case in memory_cases() if case.id == name)
    assert largest_tensor_made_by(operation, *known) <= D_OUT * 2 * RANK


def test_the_memory_measure_sees_a_dense_temporary() -> None:
    step = draw(D_OUT, D_IN, RANK, torch.float32)
    assert largest_tensor_made_by(lambda: reference_pairs(step)) == D_OUT * D_IN
