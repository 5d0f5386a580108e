"""Encodings of ω and Ω: bytes, round trips, and what factoring and stochastic rounding keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlora import encodings
from hlora.encodings import ENCODINGS, Eight, Factored

CPU = torch.device("cpu")


def positive(d_out: int, d_in: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(d_out, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01


def factored(matrix: torch.Tensor) -> Factored:
    return Factored(matrix.sum(1), matrix.sum(0))


@pytest.mark.parametrize(
    ("encoding", "expected"), [("float32", 4 * 15), ("bfloat16", 2 * 15), ("int8", 15 + 4 * 3), ("factored", 4 * 8)]
)
def test_bytes_of_a_3_by_5_matrix(encoding: str, expected: int) -> None:
    assert encodings.nbytes(encodings.zeros(encoding, 3, 5, CPU)) == expected


def test_bytes_of_llama_are_those_of_the_docstring() -> None:
    shapes = [(3072, 3072), (1024, 3072)] * 28
    assert sum(4 * rows * columns for rows, columns in shapes) / 2**30 == pytest.approx(1.31, abs=0.005)
    device = torch.device("meta")
    int8 = sum(encodings.nbytes(encodings.zeros("int8", *shape, device)) for shape in shapes)
    assert int8 / 2**30 == pytest.approx(0.34, abs=0.005)
    assert sum(4 * (rows + columns) for rows, columns in shapes) / 1e6 == pytest.approx(1.1, abs=0.1)


def test_factored_importance_of_llama_is_a_thousandth_of_the_papers_and_of_all_linear_layers_below_40_megabytes() -> (
    None
):
    def factored(shapes: list[tuple[int, int]]) -> int:
        return sum(encodings.nbytes(encodings.zeros("factored", *shape, torch.device("meta"))) for shape in shapes)

    assert factored([(3072, 3072), (1024, 3072)] * 28) <= 1.3e9 / 1000  # 3B, q_proj and v_proj; Fig. 5
    layer = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    assert factored(layer * 32) < 40e6  # 8B, all-linear


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zeros_are_zero_in_every_encoding(encoding: str) -> None:
    zero = encodings.zeros(encoding, 3, 5, CPU)
    dense = zero if isinstance(zero, torch.Tensor) else zero.dense()
    assert dense.shape == (3, 5)
    assert not dense.any()
    assert float(encodings.norm(zero)) == 0.0


def test_unknown_encoding_is_refused_with_the_valid_names() -> None:
    with pytest.raises(ValueError, match="float32, bfloat16, int8, factored, got 'int3'"):
        encodings.zeros("int3", 3, 5, CPU)


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


def test_norm_of_bfloat16_is_summed_in_float32() -> None:
    matrix = torch.full((300, 300), 1.0, dtype=torch.bfloat16)
    assert encodings.norm(matrix).dtype == torch.float32
    assert float(encodings.norm(matrix)) == pytest.approx(300.0, rel=1e-6)


# int8


@pytest.mark.parametrize("d_in", [1, 5, 127, 128, 129, 300])
def test_int8_is_the_square_of_code_times_the_scale_of_its_128_neighbours(d_in: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, d_in), dtype=torch.uint8, generator=generator)
    scale = torch.rand(3, -(-d_in // 128), generator=generator)
    dense = Eight(codes, scale).dense(torch.float64)
    for i in range(3):
        for j in range(d_in):
            assert float(dense[i, j]) == pytest.approx((int(codes[i, j]) * float(scale[i, j // 128])) ** 2, rel=1e-14)


@pytest.mark.parametrize("d_in", [1, 5, 128, 300])
def test_int8_is_within_half_a_step_of_the_root_and_exact_at_each_largest_element(d_in: int) -> None:
    matrix = positive(7, d_in) ** 4
    eight = Eight.of(matrix)
    assert (eight.codes.dtype, eight.scale.dtype) == (torch.uint8, torch.float32)
    assert eight.scale.shape == (7, -(-d_in // 128))
    step = eight.scale.double().repeat_interleave(128, 1)[:, :d_in]
    root, got = matrix.sqrt(), eight.dense(torch.float64).sqrt()
    assert ((got - root).abs() <= 0.5001 * step).all()
    for start in range(0, d_in, 128):
        largest = matrix[:, start : start + 128].argmax(1, keepdim=True) + start
        torch.testing.assert_close(got.gather(1, largest), root.gather(1, largest), rtol=1e-6, atol=0)


def test_int8_keeps_a_heavy_tail_in_one_block_from_hiding_the_others() -> None:
    """A million times as important as all else: its own block loses the small ones, the neighbours lose nothing."""
    matrix = positive(2, 384)
    alone = Eight.of(matrix).dense()
    matrix[0, 200] = 1e6
    with_tail = Eight.of(matrix).dense()
    assert float(with_tail[0, 200]) == pytest.approx(1e6, rel=1e-6)
    rest = torch.ones(2, 384, dtype=torch.bool)
    rest[0, 128:256] = False
    assert torch.equal(with_tail[rest], alone[rest])


def test_int8_of_zeros_and_of_values_far_below_one_is_finite() -> None:
    matrix = torch.zeros(2, 200, dtype=torch.float64)
    matrix[1, 150:] = 1e-25 * positive(1, 50)
    dense = Eight.of(matrix).dense(torch.float64)
    assert not dense[0].any() and not dense[1, :128].any()
    torch.testing.assert_close(dense[1, 150:].sqrt(), matrix[1, 150:].sqrt(), rtol=0, atol=1e-12 / 255)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encode_norm_total_and_add_agree_with_the_dense_form_over_many_blocks(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encodings, "_BLOCK", 400)
    matrix = positive(13, 150).float()
    encoded = encodings.encode(matrix, encoding)
    assert encodings.shape(encoded) == (13, 150)
    whole = (encoded if isinstance(encoded, torch.Tensor) else encoded.dense()).double()
    if encoding == "factored":
        torch.testing.assert_close(whole.sum(1), matrix.double().sum(1), rtol=1e-5, atol=0)
    else:  # half a unit of bfloat16, half a step of √Ω, for which all is within a factor of ten of the largest root
        bound = {"float32": 0.0, "bfloat16": 2**-8, "int8": 2 * 0.5 / 255 * 10}[encoding]
        assert ((whole - matrix).abs() <= bound * matrix).all()
    assert float(encodings.norm(encoded)) == pytest.approx(float(whole.norm()), rel=1e-6)
    assert float(encodings.total(encoded)) == pytest.approx(float(whole.sum()), rel=1e-6)
    twice = encodings.add(encoded, encoded)
    assert type(twice) is type(encoded)
    torch.testing.assert_close(
        (twice if isinstance(twice, torch.Tensor) else twice.dense()).double(), 2 * whole, rtol=1e-6, atol=0
    )


def test_int8_of_a_bfloat16_matrix_takes_its_roots_in_float32() -> None:
    matrix = positive(5, 150).to(torch.bfloat16)
    for mine, other in zip(encodings.encode(matrix, "int8"), encodings.encode(matrix.float(), "int8"), strict=True):
        assert torch.equal(mine, other)


def test_only_int8_is_recorded_in_another_encoding_since_it_has_no_sign() -> None:
    kept = {encoding: encodings.while_recording(encoding) for encoding in ENCODINGS}
    assert kept == {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16", "factored": "factored"}


def test_parts_of_another_encoding_dtype_or_shape_are_refused_by_name() -> None:
    parts = encodings.parts(encodings.zeros("int8", 3, 130, CPU))
    encodings.check(parts, "int8", 3, 130)
    wrong = {
        r"w\.codes: int8 has torch.uint8 of \(3, 130\) there, got torch.int8 of": {
            "codes": parts["codes"].to(torch.int8)
        },
        r"w\.codes: .* got torch.uint8 of \(3, 129\)": {"codes": parts["codes"][:, 1:]},
        r"w\.scale: .*torch.float32 of \(3, 2\) there, got torch.float32 of \(3, 1\)": {"scale": parts["scale"][:, 1:]},
        r"w\.scale: .* got torch.bfloat16": {"scale": parts["scale"].to(torch.bfloat16)},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            encodings.check({**parts, **change}, "int8", 3, 130, "w")
    with pytest.raises(ValueError, match=r"omega\.dense: float32 has .* there, got nothing"):
        encodings.check(parts, "float32", 3, 130)
    encodings.check(encodings.parts(encodings.zeros("factored", 3, 5, CPU, torch.float64)), "factored", 3, 5)


def test_row_blocks_are_larger_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "_BLOCK", 10)
    assert [rows.stop - rows.start for rows in encodings.row_blocks(20, 5, CPU)] == [2] * 10
    assert [rows.stop - rows.start for rows in encodings.row_blocks(20, 5, torch.device("meta"))] == [16, 4]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_parts_and_from_parts_are_inverse(encoding: str) -> None:
    matrix = encodings.zeros(encoding, 3, 5, CPU)
    for part in encodings.parts(matrix).values():
        part.copy_(255 * torch.rand(part.shape))
    again = encodings.from_parts(encodings.parts(matrix))
    assert type(again) is type(matrix)
    for name, part in encodings.parts(matrix).items():
        assert torch.equal(encodings.parts(again)[name], part)


def test_sum_of_two_factored_matrices_has_the_row_and_column_sums_of_the_sum() -> None:
    first, second = positive(3, 5), positive(3, 5, seed=1)
    total = encodings.add(factored(first), factored(second))
    torch.testing.assert_close(total, factored(first + second), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_of_two_dense_matrices_keeps_the_encoding(dtype: torch.dtype) -> None:
    first, second = positive(3, 5).to(dtype), positive(3, 5, seed=1).to(dtype)
    total = encodings.add(first, second)
    assert isinstance(total, torch.Tensor)
    assert total.dtype == dtype
    assert torch.equal(total, (first.double() + second.double()).to(dtype))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_thousands_of_additions_below_one_bfloat16_unit_are_not_lost(sign: float) -> None:
    """4000 additions of 1e-4 to 1: each is 1/78 of the unit 2⁻⁷, which rounding to nearest would drop."""
    torch.manual_seed(0)
    target = torch.full((2000,), sign, dtype=torch.bfloat16)
    nearest = target.clone()
    for _ in range(4000):
        encodings.round_stochastically_(target, target.float() + sign * 1e-4)
        nearest.copy_(nearest.float() + sign * 1e-4)
    assert torch.equal(nearest, torch.full_like(nearest, sign))
    # Mean 1.4. The random walk has a standard deviation of √(0.4·2⁻⁷) = 0.056 an element, 0.00125 over 2000.
    assert float(target.float().mean()) == pytest.approx(sign * 1.4, abs=5 * 0.00125)


def test_stochastic_rounding_is_unbiased_and_only_takes_the_two_neighbours() -> None:
    torch.manual_seed(0)
    value = 1 + 0.3 * 2**-7
    target = torch.empty(100_000, dtype=torch.bfloat16)
    encodings.round_stochastically_(target, torch.full((100_000,), value))
    assert set(target.float().unique().tolist()) == {1.0, 1 + 2**-7}
    share = float((target > 1).float().mean())
    assert share == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 100_000) ** 0.5)


def test_stochastic_rounding_leaves_what_bfloat16_can_hold() -> None:
    value = torch.tensor([0.0, 1.0, -2.5, 2.0**-100, float("inf")])
    target = torch.empty(5, dtype=torch.bfloat16)
    encodings.round_stochastically_(target, value)
    assert torch.equal(target.float(), value)
