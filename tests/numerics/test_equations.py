"""Each equation of the reference, in float64, against a hand-computed value or an element-wise loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hlora.numerics import equations

D_OUT, D_IN, RANK, SCALE, LR = 5, 7, 3, 1.7, 0.03


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def product_element(left: Tensor, right: Tensor, i: int, j: int) -> float:
    return sum(left[i, k].item() * right[k, j].item() for k in range(left.shape[1]))


def test_movement_is_the_scaled_change_of_the_product(draw) -> None:
    A, B, A_next, B_next = draw(RANK, D_IN), draw(D_OUT, RANK), draw(RANK, D_IN), draw(D_OUT, RANK)
    moved = equations.movement(A, B, A_next, B_next, scale=SCALE)
    assert moved.shape == (D_OUT, D_IN)
    for i in range(D_OUT):
        for j in range(D_IN):
            expected = SCALE * (product_element(B_next, A_next, i, j) - product_element(B, A, i, j))
            assert moved[i, j].item() == pytest.approx(expected, rel=1e-13, abs=1e-13)


def test_movement_of_a_rank_one_matrix_by_hand() -> None:
    A, B = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    moved = equations.movement(A, B, A + 1, 2 * B, scale=0.5)
    # 0.5·([6, 8]ᵀ[2, 3] − [3, 4]ᵀ[1, 2])
    assert torch.equal(moved, torch.tensor([[4.5, 6.0], [6.0, 8.0]], dtype=torch.float64))


def test_effective_gradient_is_the_sum_of_its_three_terms(draw) -> None:
    A, B, grad_A, grad_B = draw(RANK, D_IN), draw(D_OUT, RANK), draw(RANK, D_IN), draw(D_OUT, RANK)
    gradient = equations.effective_gradient(A, B, grad_A, grad_B, lr=LR, scale=SCALE)
    for i in range(D_OUT):
        for j in range(D_IN):
            expected = SCALE * (
                product_element(grad_B, A, i, j)
                + product_element(B, grad_A, i, j)
                - LR * product_element(grad_B, grad_A, i, j)
            )
            assert gradient[i, j].item() == pytest.approx(expected, rel=1e-13, abs=1e-13)


def test_movement_equals_minus_lr_times_effective_gradient_under_sgd(draw) -> None:
    A, B, grad_A, grad_B = draw(RANK, D_IN), draw(D_OUT, RANK), draw(RANK, D_IN), draw(D_OUT, RANK)
    moved = equations.movement(A, B, A - LR * grad_A, B - LR * grad_B, scale=SCALE)
    gradient = equations.effective_gradient(A, B, grad_A, grad_B, lr=LR, scale=SCALE)
    torch.testing.assert_close(moved, -LR * gradient, rtol=1e-12, atol=1e-14)


def test_importance_equals_lr_times_squared_effective_gradient_under_sgd(draw) -> None:
    """Eight steps of SGD on a quadratic loss with a changing learning rate: ω = Σ η g̃², element by element."""
    target = draw(D_OUT, D_IN)
    A, B = draw(RANK, D_IN).requires_grad_(), draw(D_OUT, RANK).requires_grad_()
    omega, expected = torch.zeros(D_OUT, D_IN, dtype=torch.float64), torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for step in range(8):
        lr = 0.01 / (step + 1)
        grad_A, grad_B = torch.autograd.grad(((SCALE * B @ A - target) ** 2).mean(), (A, B))
        with torch.no_grad():
            A_next, B_next = A - lr * grad_A, B - lr * grad_B
            gradient = equations.effective_gradient(A, B, grad_A, grad_B, lr=lr, scale=SCALE)
            omega = equations.path_integral(omega, gradient, equations.movement(A, B, A_next, B_next, scale=SCALE))
            expected += lr * gradient**2
            A.copy_(A_next)
            B.copy_(B_next)
    assert omega.abs().min() > 0
    torch.testing.assert_close(omega, expected, rtol=1e-9, atol=0)


def test_the_exact_gradient_is_that_of_autograd_on_the_dense_weight(draw) -> None:
    theta, x, target = draw(D_OUT, D_IN).requires_grad_(), draw(11, D_IN), draw(11, D_OUT)
    y = x @ theta.T
    y.retain_grad()
    (torch.tanh(y) - target).square().sum().backward()
    assert theta.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(equations.exact_gradient(x, y.grad), theta.grad, rtol=1e-13, atol=1e-13)


def test_the_effective_gradient_is_to_first_order_the_exact_one_seen_through_the_factors(draw) -> None:
    """g^B = s G Aᵀ and g^A = s Bᵀ G, by autograd; so g̃ = s²(G AᵀA + B Bᵀ G) − η s³ G Aᵀ Bᵀ G (reading 7)."""
    A, B = draw(RANK, D_IN).requires_grad_(), draw(D_OUT, RANK).requires_grad_()
    base, x, target = draw(D_OUT, D_IN), draw(11, D_IN), draw(11, D_OUT)
    theta = base + SCALE * B @ A
    theta.retain_grad()
    (torch.tanh(x @ theta.T) - target).square().sum().backward()
    G, grad_A, grad_B = theta.grad, A.grad, B.grad
    assert G is not None
    assert grad_A is not None
    assert grad_B is not None
    A, B = A.detach(), B.detach()
    exactly = {"rtol": 1e-12, "atol": 1e-11}
    torch.testing.assert_close(grad_B, SCALE * G @ A.T, **exactly)
    torch.testing.assert_close(grad_A, SCALE * B.T @ G, **exactly)
    first_order = SCALE**2 * (G @ A.T @ A + B @ B.T @ G)
    second_order = SCALE**3 * G @ A.T @ B.T @ G
    gradient = equations.effective_gradient(A, B, grad_A, grad_B, lr=0.0, scale=SCALE)
    torch.testing.assert_close(gradient, first_order, **exactly)
    gradient = equations.effective_gradient(A, B, grad_A, grad_B, lr=LR, scale=SCALE)
    torch.testing.assert_close(gradient, first_order - LR * second_order, rtol=1e-12, atol=1e-10)


def test_path_integral_subtracts_gradient_times_movement_elementwise(draw) -> None:
    omega, gradient, delta = draw(D_OUT, D_IN), draw(D_OUT, D_IN), draw(D_OUT, D_IN)
    after = equations.path_integral(omega, gradient, delta)
    for i in range(D_OUT):
        for j in range(D_IN):
            assert after[i, j].item() == pytest.approx(
                omega[i, j].item() - gradient[i, j].item() * delta[i, j].item(), rel=1e-14
            )


def test_path_integral_of_the_parts_of_a_step_sums_to_the_whole(draw) -> None:
    gradient, delta = draw(D_OUT, D_IN), draw(D_OUT, D_IN)
    zero = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    whole = equations.path_integral(zero, gradient, delta)
    parts = zero
    for share in (0.5, 0.25, 0.25):
        parts = equations.path_integral(parts, gradient, share * delta)
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=1e-15)


def test_consolidation_divides_by_squared_movement_plus_xi_and_clamps_negatives() -> None:
    omega = torch.tensor([[2.0, -3.0], [0.0, 1.0]], dtype=torch.float64)
    delta = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[2.0 / 1.5, 0.0], [0.0, 1.0 / 0.5]], dtype=torch.float64)
    assert torch.equal(equations.consolidate(omega, delta, xi=0.5), expected)


def test_layer_penalty_is_the_importance_weighted_squared_distance(draw) -> None:
    importance, theta, theta_nu = draw(D_OUT, D_IN).abs(), draw(D_OUT, D_IN), draw(D_OUT, D_IN)
    expected = sum(
        importance[i, j].item() * (theta[i, j].item() - theta_nu[i, j].item()) ** 2
        for i in range(D_OUT)
        for j in range(D_IN)
    )
    assert equations.layer_penalty(importance, theta, theta_nu).item() == pytest.approx(expected, rel=1e-13)


def test_penalty_of_the_parts_of_a_matrix_sums_to_the_penalty_of_the_whole(draw) -> None:
    importance, theta, theta_nu = draw(D_OUT, D_IN).abs(), draw(D_OUT, D_IN), draw(D_OUT, D_IN)
    rows = [slice(0, 2), slice(2, 3), slice(3, D_OUT)]
    parts = sum(equations.layer_penalty(importance[r], theta[r], theta_nu[r]) for r in rows)
    torch.testing.assert_close(parts, equations.layer_penalty(importance, theta, theta_nu), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["softmax", "norm_share", "uniform"])
def test_layer_weights_sum_to_one_and_keep_the_order_of_the_norms(kind: str) -> None:
    norms = torch.tensor([0.06, 2.2, 0.75, 400.0], dtype=torch.float64)
    weights = equations.layer_weights(norms, kind)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-15)
    assert weights.argmax() == (0 if kind == "uniform" else 3)
    assert (weights >= 0).all()


def test_softmax_weights_by_hand() -> None:
    norms = torch.tensor([math.log(1.0), math.log(2.0), math.log(5.0)], dtype=torch.float64)
    expected = torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=torch.float64)
    torch.testing.assert_close(equations.layer_weights(norms, "softmax"), expected, rtol=1e-14, atol=0)


def test_norm_shares_do_not_depend_on_the_unit_of_importance_but_softmax_does() -> None:
    norms = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    shares = equations.layer_weights(norms, "norm_share")
    torch.testing.assert_close(shares, norms / 8, rtol=1e-15, atol=0)
    torch.testing.assert_close(equations.layer_weights(1000 * norms, "norm_share"), shares, rtol=1e-14, atol=0)
    assert equations.layer_weights(1000 * norms, "softmax").max() == 1.0


def test_sum_gives_every_matrix_the_weight_one() -> None:
    weights = equations.layer_weights(torch.tensor([0.06, 2.2, 400.0], dtype=torch.float64), "sum")
    assert weights.tolist() == [1.0, 1.0, 1.0]


def test_roots_are_halfway_from_a_plain_sum_to_matrices_that_count_alike() -> None:
    norms = torch.tensor([0.25, 4.0, 0.0, 1.0], dtype=torch.float64)
    weights = equations.layer_weights(norms, "root")
    expected = torch.tensor([5.25, 5.25 / 16, 0.0, 5.25 / 4], dtype=torch.float64).sqrt()  # 1.3125 / norm
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(equations.layer_weights(1000 * norms, "root"), weights, rtol=1e-14, atol=0)
    torch.testing.assert_close(equations.layer_weights(torch.full((3,), 7.0), "root"), torch.ones(3))
    assert not equations.layer_weights(torch.zeros(2), "root").any()


def test_unknown_layer_weights_are_refused_with_the_valid_names() -> None:
    with pytest.raises(ValueError, match=r"softmax, norm_share, uniform, sum or root, got 'sofmax'"):
        equations.layer_weights(torch.ones(2), "sofmax")


def test_regularisation_and_total_loss_by_hand() -> None:
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    penalties = torch.tensor([4.0, 8.0], dtype=torch.float64)
    regularisation = equations.regularisation(weights, penalties)
    assert regularisation.item() == 7.0
    assert equations.total_loss(torch.tensor(2.0, dtype=torch.float64), regularisation, phi=3.0).item() == 23.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equations_keep_the_dtype_they_are_given(dtype: torch.dtype, draw) -> None:
    A, B = draw(RANK, D_IN).to(dtype), draw(D_OUT, RANK).to(dtype)
    gradient = equations.effective_gradient(A, B, A, B, lr=LR, scale=SCALE)
    omega = equations.path_integral(
        torch.zeros_like(gradient), gradient, equations.movement(A, B, A, 2 * B, scale=SCALE)
    )
    importance = equations.consolidate(omega, gradient, 1e-3)
    assert {gradient.dtype, omega.dtype, importance.dtype} == {dtype}
    assert equations.layer_penalty(importance, gradient, omega).dtype == dtype
