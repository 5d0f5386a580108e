"""Dense recording and penalty compiled over whole matrices, as on an accelerator, against the equations in float64."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_ops import autograd_penalty, draw, positive, reference_pairs, streamed_pairs
from torch import Tensor
from torch._dynamo.utils import counters

from hlora.numerics import compiled, equations, ops

SHAPES = [(7, 13), (33, 17), (64, 3), (5, 101), (257, 130), (40, 40), (16, 576), (130, 64)]


@pytest.fixture(autouse=True)
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU stands in for an accelerator."""
    monkeypatch.setattr(compiled, "_STREAMED", ("meta",))
    compiled._compiled.cache_clear()
    torch.compiler.reset()
    counters.clear()
    yield
    compiled._compiled.cache_clear()
    torch.compiler.reset()


def both_operations(d_out: int, d_in: int, rank: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    """What came out, and by the equations in float64."""
    step, matrix = draw(d_out, d_in, rank, torch.float32), positive(d_out, d_in, torch.float32)
    omega, exact = matrix.clone(), type(step)(*(factor.double() for factor in step))
    ops.accumulate_(omega, *streamed_pairs(step))
    yield omega, equations.path_integral(matrix.double(), *reference_pairs(exact))
    found = ops.penalty_with_gradients(matrix, step.A_next, step.B_next, anchor=(step.A, step.B), scale=1.7)
    yield from zip(found, autograd_penalty(matrix.double(), exact, 1.7), strict=True)


def assert_equations(d_out: int, d_in: int, rank: int = 2) -> None:
    for mine, expected in both_operations(d_out, d_in, rank):
        torch.testing.assert_close(mine.double(), expected, rtol=2e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.slow
def test_the_compiled_form_equals_the_equations_and_one_graph_serves_many_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "_Scratch", None)  # nothing is streamed
    for d_out, d_in in SHAPES:
        assert_equations(d_out, d_in)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a user's region around the loss
        assert_equations(33, 17)
    assert 2 <= counters["stats"]["unique_graphs"] <= 4


@pytest.mark.slow
def test_without_a_compiler_everything_is_streamed_after_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    without = {"cpp.cxx": ("/nonexistent/c++",), "force_disable_caches": True}
    with torch._inductor.config.patch(without), caplog.at_level(logging.WARNING, "hlora"):
        for _ in range(2):
            assert_equations(33, 17)
    (line,) = (record.getMessage() for record in caplog.records if record.name == "hlora")
    assert line.startswith("dense importance is computed in blocks on cpu, with more launches: ")


def test_a_platform_without_torch_compile_streams(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("torch.compile is not supported on this platform\nand more")

    monkeypatch.setattr(torch, "compile", unsupported)
    assert_equations(33, 17)
    assert [record.getMessage() for record in caplog.records] == [
        "dense importance is computed in blocks on cpu, with more launches: "
        "RuntimeError: torch.compile is not supported on this platform"
    ]


def test_a_high_rank_is_streamed() -> None:
    assert_equations(80, 90, rank=17)
    assert not counters["stats"]
