"""Consolidation of all matrices at once, and what it sees of Ω: streamed and in Triton, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from grouped import BLOCKS, DEVICE, EVEN_ROWS, ON_GPU, SHAPES, Memory, scales
from torch import Tensor

from hlora import equations, kernels, ops
from hlora.encodings import Eight
from hlora.kernels import Consolidated

XI = 0.3


pytestmark = pytest.mark.usefixtures("streamed_is_streamed")


def reference(
    omegas: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    starts: Sequence[ops.Factors],
    scales: Sequence[float],
) -> list[tuple[Tensor, Tensor, float]]:
    """Ω, Δ and the share of negative ω, in float64."""
    found = []
    for omega, A, B, (A_start, B_start), scale in zip(omegas, As, Bs, starts, scales, strict=True):
        delta = equations.movement(A_start.double(), B_start.double(), A.double(), B.double(), scale)
        share = float((omega < 0).double().mean())
        found.append((equations.consolidate(omega.double(), delta, XI), delta, share))
    return found


CASES = [
    pytest.param("float32", SHAPES, BLOCKS, id="float32"),
    pytest.param("float32", EVEN_ROWS, BLOCKS, id="float32-even-rows"),
    pytest.param("bfloat16", SHAPES[:3], BLOCKS, id="bfloat16"),
    pytest.param("int8", [(20, 300, 3), (1, 1, 1), (3, 128, 2)], None, id="int8"),
]


@pytest.mark.parametrize("version", ["streamed", "triton"])
@pytest.mark.parametrize(("encoding", "shapes", "blocks"), CASES)
def test_consolidation_of_all_matrices_equals_the_reference(
    version: str, encoding: str, shapes: list[tuple[int, int, int]], blocks: tuple[int, int] | None
) -> None:
    memory = Memory()
    consolidate_: Callable[..., list[Consolidated]] = (
        ops.consolidate_all if version == "streamed" else partial(kernels.consolidate_, blocks=blocks)
    )
    omegas = [memory.normal(d_out, d_in) for d_out, d_in, _ in shapes]
    if encoding != "float32":
        omegas = [omega.bfloat16() for omega in omegas]
    steps = [memory.step(*shape) for shape in shapes]
    factors = ([s.A_next for s in steps], [s.B_next for s in steps], [(s.A, s.B) for s in steps], scales(len(shapes)))
    expected = reference(omegas, *factors)
    found = consolidate_(omegas, *factors, XI, encoding)
    memory.assert_clean()
    for omega, (importance, share, undo_cost, norm), (exact, delta, negative) in zip(
        omegas, found, expected, strict=True
    ):
        if encoding == "int8":
            assert isinstance(importance, Eight)
            kept = importance.dense(torch.float64)
            step = importance.scale.double().repeat_interleave(128, 1)[:, : kept.shape[1]]
            steps_off = float(((kept.sqrt() - exact.sqrt()).abs() / (step + 1e-30)).max())
            assert steps_off < 0.5 + 1e-3  # rounded to the nearest, but for float32's own error
            assert torch.equal(importance.codes.amax(1) == 255, (exact > 0).any(1))
        else:
            assert importance is omega  # in place
            kept = omega.double()
            # A bfloat16 is within 2⁻⁸ of what is rounded to it; the interpreter cuts off instead, 2⁻⁷.
            cut_off = version == "triton" and not ON_GPU
            unit = 2e-4 if encoding == "float32" else 1.01 * 2 ** (-7 if cut_off else -8)
            torch.testing.assert_close(kept, exact, rtol=unit, atol=2e-5 * float(exact.max()))
        assert share == pytest.approx(negative, abs=1e-12)
        assert norm == pytest.approx(float(kept.norm()), rel=1e-5)
        assert undo_cost == pytest.approx(float((kept * delta**2).sum()), rel=1e-4)


def test_what_is_zero_stays_zero_in_8_bits() -> None:
    memory = Memory()
    step = memory.step(3, 5, 2)
    omegas = [-torch.ones(3, 5, dtype=torch.bfloat16, device=DEVICE)]
    (found,) = kernels.consolidate_(omegas, [step.A_next], [step.B_next], [(step.A, step.B)], [1.7], XI, "int8")
    assert isinstance(found.importance, Eight)
    assert not found.importance.dense().any()
    assert (found.negative, found.undo_cost, found.norm) == (1.0, 0.0, 0.0)
