"""Row and column sums of squared gradients against the dense reference, in float64 on random shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hlora.numerics import equations, squares
from hlora.numerics.encodings import Factored

SHAPES = [(1, 1, 1, 1), (2, 5, 7, 13), (3, 9, 13, 7), (4, 6, 1, 5), (1, 17, 6, 6)]  # n, T, d_out, d_in


def drawn(n: int, tokens: int, d_out: int, d_in: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, tokens, d_in, dtype=torch.float64, generator=generator)
    return x, torch.randn(n, tokens, d_out, dtype=torch.float64, generator=generator)


def sketched(x: Tensor, gradient: Tensor, P: Tensor, Q: Tensor) -> Factored:
    return squares.sketched_sums(
        x, gradient, x_seen=squares.seen_through(x, P), gradient_seen=squares.seen_through(gradient, Q)
    )


@pytest.mark.parametrize("sizes", SHAPES)
def test_exact_sums_are_those_of_the_dense_squares(sizes: tuple[int, int, int, int]) -> None:
    x, gradient = drawn(*sizes)
    dense = equations.squared_gradients(x, gradient)
    assert dense.shape == sizes[2:] and (dense > 0).all()
    row, column = squares.exact_sums(x, gradient)
    torch.testing.assert_close(row, dense.sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(column, dense.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", SHAPES)
def test_sketched_sums_are_those_of_the_reference_at_the_same_signs(sizes: tuple[int, int, int, int]) -> None:
    x, gradient = drawn(*sizes)
    P, Q = (squares.random_signs(d, 3, d).double() for d in (x.shape[2], gradient.shape[2]))
    expected = equations.sketched_squares(x, gradient, P.T, Q.T)
    for mine, other in zip(sketched(x, gradient, P, Q), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_a_sketch_is_unbiased_and_has_the_stated_variance() -> None:
    """Over 4,000 draws of the signs, each row and column of one example."""
    x, gradient = drawn(1, 12, 5, 9)
    G = equations.exact_gradient(x[0], gradient[0])
    found = []
    for number in range(4000):
        P, Q = squares.random_signs(9, number, 0).double(), squares.random_signs(5, number, 1).double()
        found.append(torch.cat(sketched(x, gradient, P, Q)))
    estimates = torch.stack(found)
    for vectors, estimate in ((G, estimates[:, :5]), (G.T, estimates[:, 5:])):
        expected = vectors.square().sum(1)
        variance = 2 / squares.SKETCH * (expected**2 - (vectors**4).sum(1))
        error = (estimate.mean(0) - expected) / (variance / len(estimate)).sqrt()
        assert error.abs().max() < 4  # standard errors
        torch.testing.assert_close(estimate.var(0), variance, rtol=0.15, atol=0)


def test_signs_are_balanced_independent_and_determined_by_their_key() -> None:
    signs = (squares.random_signs(20_000, 1, 2) * squares.SKETCH**0.5).round()
    assert signs.dtype == torch.float32 and set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean(1).abs().max() < 0.04  # 5.6 standard errors
    correlation = signs @ signs.T / signs.shape[1] - torch.eye(squares.SKETCH)
    assert correlation.abs().max() < 0.04
    assert torch.equal(squares.random_signs(20_000, 1, 2), squares.random_signs(20_000, 1, 2))
    assert not torch.equal(squares.random_signs(20_000, 1, 2), squares.random_signs(20_000, 1, 3))


def test_the_exact_form_is_taken_where_it_has_fewer_products() -> None:
    """2 T² (d_in + d_out) against 2 T k (d_in + d_out) products an example."""
    for tokens in (1, 7, 8, 9, 128):
        assert squares.is_exact_cheaper(tokens) == (2 * tokens**2 <= 2 * tokens * squares.SKETCH)
