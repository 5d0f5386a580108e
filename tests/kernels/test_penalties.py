"""The penalty of all matrices at once and its gradients: streamed and in Triton, against float64 autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conftest import move_adapter, record
from grouped import BLOCKS, DEVICE, EVEN_ROWS, ON_GPU, SHAPES, Memory, scales
from torch import Tensor

from hlora import encodings, equations, kernels, ops
from hlora.adapters import adapted_matrices
from hlora.encodings import Eight
from hlora.kernels import penalties
from hlora.penalty import ImportancePenalty

triton_penalties = partial(kernels.penalties_with_gradients, blocks=BLOCKS)
versions = pytest.mark.parametrize(
    "version", [ops.penalties_with_gradients, triton_penalties], ids=["streamed", "triton"]
)
pytestmark = pytest.mark.usefixtures("streamed_is_streamed")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so an element of an output that nothing is written to is one."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))


def reference(
    importances: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    anchors: Sequence[Any],
    scales: Sequence[float],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The equations and autograd, in float64."""
    values, grads_A, grads_B = [], [], []
    for importance, A, B, anchor, scale in zip(importances, As, Bs, anchors, scales, strict=True):
        A, B = A.detach().double().requires_grad_(), B.detach().double().requires_grad_()
        start = torch.zeros((), dtype=torch.float64, device=A.device)
        if anchor is not None:
            start = scale * anchor[1].double() @ anchor[0].double()
        value = equations.layer_penalty(importance.double(), scale * B @ A, start)
        grad_A, grad_B = torch.autograd.grad(value, (A, B))
        values.append(value.detach())
        grads_A.append(grad_A)
        grads_B.append(grad_B)
    return values, grads_A, grads_B


def assert_equal(found: tuple[Tensor, list[Tensor], list[Tensor]], expected: tuple[list[Tensor], ...]) -> None:
    for mine, exact in zip(found, expected, strict=True):
        assert len(mine) == len(exact)
        for got, other in zip(mine, exact, strict=True):
            assert got.shape == other.shape
            torch.testing.assert_close(got.double(), other, rtol=2e-4, atol=2e-5 * float(other.abs().max()))


@versions
@pytest.mark.parametrize(
    ("encoding", "shapes", "anchored"),
    [
        ("float32", SHAPES, "either"),
        ("float32", EVEN_ROWS, "general"),
        ("bfloat16", SHAPES[:2], "base"),
        ("int8", [(5, 293, 3), (20, 17, 2)], "general"),
        ("int8", [(3, 129, 3), (1, 1, 1)], "base"),
    ],
)
def test_penalties_of_all_matrices_and_their_gradients_equal_autograd(
    version: Callable[..., Any], encoding: str, shapes: list[tuple[int, int, int]], anchored: str
) -> None:
    memory = Memory()
    dense = [
        memory.keep(torch.randn(d_out, d_in, generator=memory.generator).abs() + 0.01) for d_out, d_in, _ in shapes
    ]
    importances = [encodings.encode(matrix, encoding) for matrix in dense]
    exact = [omega.dense(torch.float64) if isinstance(omega, Eight) else omega for omega in importances]
    steps = [memory.step(*shape) for shape in shapes]
    anchors = [
        (s.A, s.B) if anchored == "general" or (anchored == "either" and n % 2) else None for n, s in enumerate(steps)
    ]
    factors = ([s.A_next for s in steps], [s.B_next for s in steps], anchors, scales(len(shapes)))
    found = version(importances, *factors)
    assert_equal(found, reference(exact, *factors))
    assert {part.dtype for part in (found[0], *found[1], *found[2])} == {torch.float32}
    memory.assert_clean()


def test_nothing_is_added_beyond_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around them lies −0, which even adding 0 turns into 0."""
    step, importances = Memory().step(5, 7, 2), [torch.ones(5, 7, device=DEVICE)]
    around, zeros = torch.full((2000,), -0.0, device=DEVICE), torch.zeros

    def zeros_inside(*size: int, device: torch.device) -> Tensor:
        return zeros(*size, device=device) if len(size) > 1 else around[992 : 992 + size[0]].zero_()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", zeros_inside)
        _, (grad_A,), _ = triton_penalties(importances, [step.A], [step.B], [None], [1.7])
    assert grad_A.data_ptr() == around[992:].data_ptr()
    assert around[:992].signbit().all()
    assert around[992 + grad_A.numel() :].signbit().all()


@pytest.fixture
def in_order() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("in_order")
def test_sums_in_a_fixed_order_equal_the_reference_and_repeat_bit_by_bit() -> None:
    memory = Memory()
    importances = [memory.normal(d_out, d_in).abs_() for d_out, d_in, _ in SHAPES[:2]]
    steps = [memory.step(*shape) for shape in SHAPES[:2]]
    factors = ([s.A_next for s in steps], [s.B_next for s in steps], [(s.A, s.B) for s in steps], scales(2))
    first, second = (triton_penalties(importances, *factors) for _ in range(2))
    assert_equal(first, reference(importances, *factors))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_penalty_at_its_anchor_is_zero_with_zero_gradients() -> None:
    memory = Memory()
    step = memory.step(20, 17, 3)
    value, (grad_A,), (grad_B,) = triton_penalties(
        [memory.normal(20, 17).abs_()], [step.A], [step.B], [(step.A, step.B)], [1.7]
    )
    assert float(value) == 0.0
    assert not grad_A.any()
    assert not grad_B.any()


def test_gradients_of_a_models_penalty_equal_autograd_of_eqs_14_to_16(peft_model: Any, token_ids: Tensor) -> None:
    """The whole penalty of a model as ImportancePenalty weighs it, from the kernels' values and gradients."""
    peft_model.to(DEVICE)
    importance = record(peft_model, token_ids.to(DEVICE))
    move_adapter(peft_model)
    penalty = ImportancePenalty(peft_model, importance, phi=3.0, layer_weights="norm_share")
    matrices = adapted_matrices(peft_model)
    mine = [importance.matrices[matrix.name] for matrix in matrices]
    values, grads_A, grads_B = triton_penalties(
        [m.omega for m in mine],
        [m.A for m in matrices],
        [m.B for m in matrices],
        [(m.A, m.B) for m in mine],
        [m.scale for m in matrices],
    )
    weights = torch.tensor([penalty.coefficients[m.name] / penalty.unit for m in matrices], device=DEVICE).double()

    wide = [(m.A.detach().double().requires_grad_(), m.B.detach().double().requires_grad_()) for m in matrices]
    each = [
        equations.layer_penalty(m.omega.double(), m.scale * B @ A, m.scale * m.B.double() @ m.A.double())
        for m, (A, B) in zip(mine, wide, strict=True)
    ]
    loss = equations.total_loss(
        torch.zeros((), device=DEVICE), equations.regularisation(weights, torch.stack(each)), penalty.phi
    )
    loss.backward()
    assert penalty.phi * (weights * values).sum().item() == pytest.approx(loss.item(), rel=1e-5)
    peft_model.zero_grad()
    penalty.add_gradients_()
    for matrix, (A, B), grad_A, grad_B, weight in zip(matrices, wide, grads_A, grads_B, weights, strict=True):
        for exact, got, theirs in ((A.grad, grad_A, matrix.A.grad), (B.grad, grad_B, matrix.B.grad)):
            bound = {"rtol": 2e-4, "atol": 2e-5 * float(exact.abs().max())}
            torch.testing.assert_close(penalty.phi * weight * got.double(), exact, **bound)
            torch.testing.assert_close(theirs.double(), exact, **bound)


@pytest.mark.skipif(ON_GPU, reason="on a GPU every other test tunes for real")
def test_the_autotuner_does_not_add_its_own_runs_to_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(run: Callable[[], Any], quantiles: Any) -> float:
        runs.append(run())
        run()
        return 1.0

    runs: list[Any] = []
    monkeypatch.setattr(penalties._penalties, "_do_bench", measure)
    monkeypatch.setattr(penalties._penalties, "cache", {})
    memory = Memory()
    step, importances = memory.step(5, 7, 2), [memory.normal(5, 7).abs_()]
    factors = ([step.A_next], [step.B_next], [(step.A, step.B)], [1.7])
    found = kernels.penalties_with_gradients(importances, *factors)
    assert len(runs) == len(penalties._CANDIDATES) > 1
    assert_equal(found, reference(importances, *factors))


def test_importances_of_two_encodings_are_refused() -> None:
    step = Memory().step(5, 7, 2)
    importances = [torch.ones(5, 7, device=DEVICE), torch.ones(5, 7, device=DEVICE, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match=r"one dtype .* got torch.float32 on .* and torch.bfloat16"):
        triton_penalties(importances, [step.A] * 2, [step.B] * 2, [None] * 2, [1.0] * 2)
