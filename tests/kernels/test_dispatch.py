"""Whether recorder and penalty run the fused kernels where they can, and what they say then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from grouped import BLOCKS, ON_GPU, TOLERANCE
from peft import PeftModel
from torch import Tensor

from hlora import kernels, ops
from hlora.adapters import adapted_matrices
from hlora.importance import Importance
from hlora.penalty import ImportancePenalty
from hlora.recorder import ImportanceRecorder

NAMES = ("accumulate_", "consolidate_", "penalties_with_gradients")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel is called. The interpreter stands in for the GPU where there is none."""
    counter: Counter[str] = Counter()

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            counter[name] += 1
            return kernel(*arguments, **named)

        return call

    for name in NAMES:
        kernel = getattr(kernels, name)
        blocks = (16, 128) if name == "consolidate_" else BLOCKS
        here = kernel if ON_GPU else partial(kernel, blocks=blocks)
        monkeypatch.setattr(kernels, name, counted(name, here), raising=False)
    return counter


def recorded_and_penalised(model: PeftModel, **options: Any) -> tuple[Importance, Tensor, list[Tensor]]:
    """Three random steps recorded, then the penalty and its gradients after a fourth."""
    torch.manual_seed(0)
    recorder = ImportanceRecorder(model, **options)
    factors = [factor for matrix in adapted_matrices(model) for factor in (matrix.A, matrix.B)]
    moves = torch.Generator().manual_seed(1)

    def move(size: float) -> None:
        with torch.no_grad():
            for factor in factors:
                factor.add_(size * torch.randn(factor.shape, generator=moves).to(factor))

    for _ in range(3):
        for factor in factors:
            factor.grad = torch.randn(factor.shape, generator=moves).to(factor)
        with recorder.step(0.01):
            move(0.1)
    importance = recorder.consolidate(1e-3)
    penalty = ImportancePenalty(model, importance, 1.0, offload=bool(options.get("offload")))
    move(0.1)
    for factor in factors:
        factor.grad = None
    value = penalty.add_gradients_()
    return importance, value, [factor.grad for factor in factors if factor.grad is not None]


@pytest.mark.parametrize("encoding", ["float32", "int8"])
@pytest.mark.parametrize("flush_every", [1, 3])
def test_the_fused_kernels_do_what_the_streamed_operations_do(
    peft_model: PeftModel,
    encoding: str,
    flush_every: int,
    calls: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = {name: tensor.clone() for name, tensor in peft_model.state_dict().items()}
    monkeypatch.setattr(kernels, "available", lambda device: False)
    expected, value, gradients = recorded_and_penalised(peft_model, encoding=encoding, flush_every=flush_every)
    assert not calls
    peft_model.load_state_dict(start)
    monkeypatch.setattr(kernels, "available", lambda device: True)
    found, fused_value, fused_gradients = recorded_and_penalised(peft_model, encoding=encoding, flush_every=flush_every)
    assert calls == {"accumulate_": 3 // flush_every, "consolidate_": 1, "penalties_with_gradients": 1}
    # int8 comes from ω in bfloat16, rounded by other random numbers here and there: each of 8 bits, for three steps.
    close = TOLERANCE if encoding == "float32" else {"rtol": 0.05, "atol": 0.05 * float(value)}
    torch.testing.assert_close(fused_value, value, **close)
    if encoding == "float32":
        for mine, theirs in zip(fused_gradients, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, **TOLERANCE)
    for name, matrix in expected.matrices.items():
        assert found.matrices[name].undo_cost == pytest.approx(matrix.undo_cost, rel=0.05)
        if encoding == "float32":
            torch.testing.assert_close(found.matrices[name].omega, matrix.omega, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"encoding": "factored"}, {"encoding": "float32", "offload": True}])
def test_what_the_kernels_do_not_take_is_streamed(
    peft_model: PeftModel, options: dict[str, Any], calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "available", lambda device: True)
    recorded_and_penalised(peft_model, **options)
    assert not calls


def test_float64_is_streamed(peft_model: PeftModel, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda device: True)
    recorded_and_penalised(peft_model.double(), encoding="float32")
    assert not calls


def test_matrices_come_back_in_their_order_whatever_device_they_are_on(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of matrices, as on two devices, interleaved."""
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(ops, "_by_device", lambda matrices: {"one": [0, 2], "other": [1]})
    made = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (9, 4), (3, 20)]
    importances = [torch.rand(*shape, generator=made) for shape in shapes]
    As = [torch.randn(2, d_in, generator=made) for _, d_in in shapes]
    Bs = [torch.randn(d_out, 2, generator=made) for d_out, _ in shapes]
    found = ops.penalties_with_gradients(importances, As, Bs, [None] * 3, [1.0] * 3)
    assert calls == {"penalties_with_gradients": 2}
    monkeypatch.setattr(kernels, "available", lambda device: False)
    expected = ops.penalties_with_gradients(importances, As, Bs, [None] * 3, [1.0] * 3)
    for mine, theirs in zip((found[0], *found[1], *found[2]), (expected[0], *expected[1], *expected[2]), strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)
