"""Path-integral accumulation of all matrices at once: streamed and in Triton, against the equations in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from grouped import BLOCKS, DEVICE, EVEN_ROWS, ON_GPU, SHAPES, TILE, TOLERANCE, Memory, scales, wide
from torch import Tensor

from hlora import equations, kernels, ops
from hlora.kernels import Step, accumulate

triton_accumulate_ = partial(kernels.accumulate_, blocks=BLOCKS)
ALL = torch.ones(1, dtype=torch.bool, device=DEVICE)


pytestmark = pytest.mark.usefixtures("streamed_is_streamed")


def reference(
    omegas: Sequence[Tensor], steps: Sequence[Sequence[Step]], scales: Sequence[float], counted: Tensor
) -> list[Tensor]:
    """ω after the counted steps, in float64."""
    after = []
    for omega, mine, scale in zip(omegas, steps, scales, strict=True):
        omega = omega.double()
        for step, counts in zip(map(wide, mine), counted.tolist(), strict=True):
            if counts:
                gradient = equations.effective_gradient(*step[:5], scale)
                delta = equations.movement(step.A, step.B, step.A_next, step.B_next, scale)
                omega = equations.path_integral(omega, gradient, delta)
        after.append(omega)
    return after


@pytest.mark.parametrize("accumulate_", [ops.accumulate_all_, triton_accumulate_], ids=["streamed", "triton"])
@pytest.mark.parametrize(("shapes", "count"), [(SHAPES, 1), (SHAPES[1:4], 2), (EVEN_ROWS, 2)])
def test_accumulation_of_all_matrices_equals_the_reference(
    accumulate_: Callable[..., None], shapes: list[tuple[int, int, int]], count: int
) -> None:
    memory = Memory()
    omegas = [memory.normal(d_out, d_in) for d_out, d_in, _ in shapes]
    steps = [[memory.step(*shape) for _ in range(count)] for shape in shapes]
    counted = ALL.expand(count)
    expected = reference(omegas, steps, scales(len(shapes)), counted)
    accumulate_(omegas, steps, scales(len(shapes)), counted)
    for omega, after in zip(omegas, expected, strict=True):
        torch.testing.assert_close(omega.double(), after, rtol=2e-4, atol=2e-5 * float(after.abs().max()))
    memory.assert_clean()


@pytest.mark.parametrize("accumulate_", [ops.accumulate_all_, triton_accumulate_], ids=["streamed", "triton"])
def test_several_steps_in_one_pass_equal_as_many_passes_bit_by_bit(accumulate_: Callable[..., None]) -> None:
    memory, shapes = Memory(), [(TILE + 3, TILE + 4, 3), (5, 7, 2)]
    steps = [[memory.step(*shape) for _ in range(3)] for shape in shapes]
    together = [torch.randn(d_out, d_in).to(DEVICE) for d_out, d_in, _ in shapes]
    one_by_one = [omega.clone() for omega in together]
    accumulate_(together, steps, scales(2), ALL.expand(3))
    for k in range(3):
        accumulate_(one_by_one, [[mine[k]] for mine in steps], scales(2), ALL)
    for omega, expected in zip(together, one_by_one, strict=True):
        assert torch.equal(omega, expected)


@pytest.mark.parametrize("accumulate_", [ops.accumulate_all_, triton_accumulate_], ids=["streamed", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_counted_adds_nothing_even_if_it_is_not_finite(
    accumulate_: Callable[..., None], dtype: torch.dtype
) -> None:
    memory, shape = Memory(), (5, 7, 2)
    steps = [memory.step(*shape) for _ in range(2)]
    steps[0].A_next[0, 0] = torch.inf
    steps[0].grad_B.fill_(torch.nan)
    omegas = [torch.randn(5, 7).to(DEVICE, dtype)]
    counted = torch.tensor([False, True], device=DEVICE)
    (expected,) = reference(omegas, [steps], [1.7], counted)
    accumulate_(omegas, [steps], [1.7], counted)
    bound = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else TOLERANCE
    torch.testing.assert_close(omegas[0].double(), expected, **bound)


@pytest.mark.parametrize("accumulate_", [ops.accumulate_all_, triton_accumulate_], ids=["streamed", "triton"])
def test_bfloat16_is_rounded_to_a_neighbour_of_the_reference(accumulate_: Callable[..., None]) -> None:
    memory, shapes = Memory(), [(TILE + 3, TILE + 4, 3), (1, 1, 1)]
    omegas = [memory.normal(d_out, d_in).bfloat16() for d_out, d_in, _ in shapes]
    steps = [[memory.step(*shape) for _ in range(2)] for shape in shapes]
    expected = reference(omegas, steps, scales(2), ALL.expand(2))
    accumulate_(omegas, steps, scales(2), ALL.expand(2))
    for omega, after in zip(omegas, expected, strict=True):
        # Neighbours are 2⁻⁷ of a power of two apart; float32's own error is far below.
        torch.testing.assert_close(omega.double(), after, rtol=2**-7, atol=1e-5 * float(after.abs().max()))


def adding(amount: float, d_out: int, d_in: int) -> Step:
    """A step with g̃ = 1 and Δθ = −amount everywhere, at scale 1."""
    ones, zeros = torch.ones(1, d_in, device=DEVICE), torch.zeros(d_out, 1, device=DEVICE)
    return Step(ones, zeros, torch.zeros_like(ones), zeros + 1, 0.03, ones, zeros - amount)


def test_stochastic_rounding_is_unbiased_and_only_takes_the_two_neighbours() -> None:
    omegas = [torch.ones(200, 500, dtype=torch.bfloat16, device=DEVICE)]
    blocks = BLOCKS and (256, 512)
    kernels.accumulate_(omegas, [[adding(0.3 * 2**-7, 200, 500)]], [1.0], blocks=blocks)
    up = (omegas[0] > 1).double()
    assert set(omegas[0].double().unique().tolist()) == {1.0, 1 + 2**-7}
    assert float(up.mean()) == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 100_000) ** 0.5)
    for neighbour in (up.roll(1, 0), up.roll(1, 1), up.roll(2, 1), up.roll(4, 1), up.roll(8, 1)):  # independent of it
        assert float((up * neighbour).mean()) == pytest.approx(0.09, abs=5 * (0.12 / 100_000) ** 0.5)


def test_stochastic_rounding_depends_on_the_seed_and_the_matrix_but_not_on_the_blocks() -> None:
    def rounded(seed: int, blocks: tuple[int, int]) -> list[Tensor]:
        omegas = [torch.ones(5, 20, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
        kernels.accumulate_(omegas, [[adding(2**-8, 5, 20)]] * 2, [1.0, 1.0], seed=seed, blocks=blocks)
        return omegas

    first, second = rounded(7, (16, 16))
    assert not torch.equal(first, second)
    assert not torch.equal(first, rounded(8, (16, 16))[0])
    assert torch.equal(first, rounded(7, (32, 64))[0])


def test_factors_of_any_layout_and_precision_are_read() -> None:
    memory, shape = Memory(), (5, 7, 2)
    step = memory.step(*shape)
    (expected,) = reference([torch.ones(5, 7, device=DEVICE)], [[step]], [1.7], ALL)
    odd = step._replace(grad_A=step.grad_A.T.contiguous().T, A=step.A.double())
    omegas = [torch.ones(5, 7, device=DEVICE)]
    triton_accumulate_(omegas, [[odd]], [1.7])
    torch.testing.assert_close(omegas[0].double(), expected, **TOLERANCE)


@pytest.mark.skipif(ON_GPU, reason="on a GPU every other test tunes for real")
def test_the_autotuner_leaves_omega_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs each candidate several times. The timer alone is made up: the interpreter has none."""

    def measure(run: Callable[[], Any], quantiles: Any) -> float:
        runs.append(run())
        run()
        return 1.0

    runs: list[Any] = []
    monkeypatch.setattr(accumulate._accumulate, "_do_bench", measure)
    monkeypatch.setattr(accumulate._accumulate, "cache", {})
    monkeypatch.setattr(accumulate, "_tuned", set())
    memory = Memory()
    omegas, steps = [memory.normal(5, 7)], [[memory.step(5, 7, 2)]]
    (expected,) = reference(omegas, steps, [1.7], ALL)
    kernels.accumulate_(omegas, steps, [1.7])
    assert len(runs) == len(accumulate._CANDIDATES) > 1
    torch.testing.assert_close(omegas[0].double(), expected, **TOLERANCE)


def test_omegas_that_are_not_contiguous_or_of_two_kinds_are_refused() -> None:
    step = Memory().step(5, 7, 2)
    with pytest.raises(ValueError, match="expected contiguous matrices, got strides"):
        triton_accumulate_([torch.ones(7, 5, device=DEVICE).T], [[step]], [1.7])
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match="expected matrices of one dtype"):
            triton_accumulate_(
                [torch.ones(5, 7, device=DEVICE), torch.ones(5, 7, device=DEVICE, dtype=dtype)], [[step]] * 2, [1.7] * 2
            )


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU to wait for")
def test_no_call_waits_for_the_gpu() -> None:
    memory = Memory()
    omegas, steps = [memory.normal(50, 70)], [[memory.step(50, 70, 8)]]
    factors = (omegas, [steps[0][0].A], [steps[0][0].B], [None], [1.7])
    for mode in ("default", "error"):  # the first calls compile and tune
        torch.cuda.set_sync_debug_mode(mode)
        try:
            kernels.accumulate_(omegas, steps, [1.7])
            kernels.penalties_with_gradients(*factors)
        finally:
            torch.cuda.set_sync_debug_mode("default")
