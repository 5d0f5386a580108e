"""Encodings of ω and Ω: bytes, round trips, and what factoring keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlora.numerics import encodings
from hlora.numerics.encodings import ENCODINGS, Factored

CPU = torch.device("cpu")


def positive(d_out: int, d_in: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(d_out, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01


def factored(matrix: torch.Tensor) -> Factored:
    return Factored(matrix.sum(1), matrix.sum(0))


@pytest.mark.parametrize(("encoding", "expected"), [("float32", 4 * 15), ("factored", 4 * 8)])
def test_bytes_of_a_3_by_5_matrix(encoding: str, expected: int) -> None:
    assert encodings.nbytes(encodings.zeros(encoding, 3, 5, device=CPU)) == expected


def test_bytes_of_llama_are_those_of_the_docstring() -> None:
    shapes = [(3072, 3072), (1024, 3072)] * 28
    assert sum(4 * rows * columns for rows, columns in shapes) / 2**30 == pytest.approx(1.31, abs=0.005)
    assert sum(4 * (rows + columns) for rows, columns in shapes) / 1e6 == pytest.approx(1.1, abs=0.1)


def test_factored_importance_of_llama_is_a_thousandth_of_the_papers_and_of_all_linear_layers_below_40_megabytes() -> (
    None
):
    def factored(shapes: list[tuple[int, int]]) -> int:
        return sum(
            encodings.nbytes(encodings.zeros("factored", *shape, device=torch.device("meta"))) for shape in shapes
        )

    assert factored([(3072, 3072), (1024, 3072)] * 28) <= 1.3e9 / 1000  # 3B, q_proj and v_proj; Fig. 5
    layer = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    assert factored(layer * 32) < 40e6  # 8B, all-linear


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zeros_are_zero_in_every_encoding(encoding: str) -> None:
    zero = encodings.zeros(encoding, 3, 5, device=CPU)
    dense = zero if isinstance(zero, torch.Tensor) else zero.dense()
    assert dense.shape == (3, 5)
    assert not dense.any()
    assert float(encodings.norm(zero)) == 0.0


def test_unknown_encoding_is_refused_with_the_valid_names() -> None:
    with pytest.raises(ValueError, match="float32, factored, got 'int3'"):
        encodings.zeros("int3", 3, 5, device=CPU)


@given(d_out=st.integers(1, 9), d_in=st.integers(1, 9), seed=st.integers(0, 1000), unit=st.floats(1e-30, 1e10))
@settings(max_examples=50, deadline=None)
def test_factored_has_the_row_and_column_sums_of_the_dense(d_out: int, d_in: int, seed: int, unit: float) -> None:
    matrix = unit * positive(d_out, d_in, seed)
    dense = factored(matrix).dense()
    torch.testing.assert_close(dense.sum(1), matrix.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(dense.sum(0), matrix.sum(0), rtol=1e-12, atol=0)


def test_factored_of_float32_values_far_below_one_does_not_vanish() -> None:
    """1e-25 · 1e-25 is zero in float32: the total must not be taken from a product."""
    matrix = (1e-25 * positive(4, 6)).float()
    dense = factored(matrix).dense()
    torch.testing.assert_close(dense.sum(1), matrix.sum(1), rtol=1e-5, atol=0)


def test_factored_keeps_the_sign_of_a_negative_total() -> None:
    matrix = -positive(4, 6)
    torch.testing.assert_close(factored(matrix).dense().sum(), matrix.sum(), rtol=1e-12, atol=0)


def test_factored_is_exact_for_a_rank_one_matrix() -> None:
    matrix = torch.outer(positive(1, 5)[0], positive(1, 7, seed=1)[0])
    torch.testing.assert_close(factored(matrix).dense(), matrix, rtol=1e-13, atol=0)


def test_factored_with_a_zero_total_stands_for_zero() -> None:
    zero = Factored(torch.zeros(3), torch.zeros(4))
    assert torch.equal(zero.dense(), torch.zeros(3, 4))


def test_norm_of_factored_is_the_norm_of_its_dense_form() -> None:
    matrix = factored(positive(6, 4))
    torch.testing.assert_close(encodings.norm(matrix), torch.linalg.matrix_norm(matrix.dense()), rtol=1e-13, atol=0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_norm_total_and_add_agree_with_the_dense_form_over_many_blocks(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encodings, "_BLOCK", 400)
    matrix = positive(13, 150).float()
    encoded = matrix if encoding == "float32" else factored(matrix)
    assert encodings.shape(encoded) == (13, 150)
    whole = (encoded if isinstance(encoded, torch.Tensor) else encoded.dense()).double()
    if encoding == "factored":
        torch.testing.assert_close(whole.sum(1), matrix.double().sum(1), rtol=1e-5, atol=0)
    else:
        assert torch.equal(whole, matrix.double())
    assert float(encodings.norm(encoded)) == pytest.approx(float(whole.norm()), rel=1e-6)
    assert float(encodings.total(encoded)) == pytest.approx(float(whole.sum()), rel=1e-6)
    twice = encodings.add(encoded, encoded)
    assert type(twice) is type(encoded)
    torch.testing.assert_close(
        (twice if isinstance(twice, torch.Tensor) else twice.dense()).double(), 2 * whole, rtol=1e-6, atol=0
    )


def test_parts_of_another_encoding_dtype_or_shape_are_refused_by_name() -> None:
    parts = encodings.parts(encodings.zeros("factored", 3, 5, device=CPU))
    encodings.check(parts, "factored", (3, 5))
    wrong = {
        r"w\.row: factored has torch.float32 of \(3,\) there, got torch.int8 of": {"row": parts["row"].to(torch.int8)},
        r"w\.column: .* got torch.float32 of \(4,\)": {"column": parts["column"][1:]},
        r"w\.row: .* got torch.bfloat16": {"row": parts["row"].to(torch.bfloat16)},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            encodings.check({**parts, **change}, "factored", (3, 5), name="w")
    with pytest.raises(ValueError, match=r"omega\.dense: float32 has .* there, got nothing"):
        encodings.check(parts, "float32", (3, 5))
    encodings.check(
        encodings.parts(encodings.zeros("factored", 3, 5, device=CPU, dtype=torch.float64)), "factored", (3, 5)
    )


def test_row_blocks_are_larger_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "_BLOCK", 10)
    assert [rows.stop - rows.start for rows in encodings.row_blocks(20, 5, CPU)] == [2] * 10
    assert [rows.stop - rows.start for rows in encodings.row_blocks(20, 5, torch.device("meta"))] == [16, 4]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_parts_and_from_parts_are_inverse(encoding: str) -> None:
    matrix = encodings.zeros(encoding, 3, 5, device=CPU)
    for part in encodings.parts(matrix).values():
        part.copy_(torch.rand(part.shape))
    again = encodings.from_parts(encodings.parts(matrix))
    assert type(again) is type(matrix)
    for name, part in encodings.parts(matrix).items():
        assert torch.equal(encodings.parts(again)[name], part)


def test_sum_of_two_factored_matrices_has_the_row_and_column_sums_of_the_sum() -> None:
    first, second = positive(3, 5), positive(3, 5, seed=1)
    total = encodings.add(factored(first), factored(second))
    torch.testing.assert_close(total, factored(first + second), rtol=1e-14, atol=0)


def test_sum_of_two_dense_matrices_keeps_the_encoding() -> None:
    first, second = positive(3, 5).float(), positive(3, 5, seed=1).float()
    total = encodings.add(first, second)
    assert isinstance(total, torch.Tensor)
    assert total.dtype == torch.float32
    assert torch.equal(total, first + second)
