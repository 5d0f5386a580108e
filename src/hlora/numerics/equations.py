"""Equations 7–16 of the paper in plain PyTorch: slow, obvious, any dtype. Faster code is tested against it.

Notation: θ = W₀ + s·B·A, s the LoRA scale (alpha/r), ν the general task, μ the domain task, η the learning
rate of the step, ω the path integral, Ω the consolidated importance, ξ its damping, φ the penalty's weight.
docs/equations.md has each equation's derivation, reading and test.
"""

from __future__ import annotations

import torch
from torch import Tensor


def movement(
    A: Tensor,  # (r, d_in) before the step
    B: Tensor,  # (d_out, r)
    A_next: Tensor,  # (r, d_in) after the step
    B_next: Tensor,  # (d_out, r)
    *,
    scale: float,
) -> Tensor:  # (d_out, d_in)
    """Movement of the weight in one step of any optimizer, Δθ = s(B⁺A⁺ − BA) (Eqs. 7–10)."""
    return scale * (B_next @ A_next - B @ A)


def effective_gradient(
    A: Tensor,  # (r, d_in)
    B: Tensor,  # (d_out, r)
    grad_A: Tensor,  # (r, d_in)
    grad_B: Tensor,  # (d_out, r)
    *,
    lr: float,
    scale: float,
) -> Tensor:  # (d_out, d_in)
    """g̃ = s(g^B A + B g^A − η g^B g^A) (Eq. 11). Under plain SGD, Δθ = −η g̃ exactly."""
    return scale * (grad_B @ A + B @ grad_A - lr * grad_B @ grad_A)


def exact_gradient(
    x: Tensor,  # (tokens, d_in)
    grad_y: Tensor,  # (tokens, d_out), ∂L/∂y of y = θx
) -> Tensor:  # (d_out, d_in)
    """G = ∂L/∂θ = Σ_t ∂L/∂y_t ⊗ x_t (Eqs. 3–6). g^B = s G Aᵀ and g^A = s Bᵀ G (reading 7 in docs/equations.md)."""
    return torch.einsum("to,ti->oi", grad_y, x)


def squared_gradients(
    x: Tensor,  # (examples, tokens, d_in)
    grad_y: Tensor,  # (examples, tokens, d_out), ∂L/∂y
) -> Tensor:  # (d_out, d_in)
    """Σ_b G_b², with G_b the gradient of example b alone, L summed over its tokens.

    Divided by the number of tokens it is the diagonal of the empirical Fisher information, per token.
    """
    return sum((exact_gradient(*example) ** 2 for example in zip(x, grad_y, strict=True)), start=torch.zeros(()).to(x))


def sketched_squares(
    x: Tensor,  # (examples, tokens, d_in)
    grad_y: Tensor,  # (examples, tokens, d_out)
    P: Tensor,  # (d_in, k) random, of mean 0 and variance 1/k
    Q: Tensor,  # (d_out, k) random, of mean 0 and variance 1/k
) -> tuple[Tensor, Tensor]:  # (d_out,), (d_in,)
    """Estimated row and column sums of Σ_b G_b², by a sketch: Σ_b ‖(G_b P)_i‖² and Σ_b ‖(G_bᵀ Q)_j‖²."""
    gradients = [exact_gradient(*example) for example in zip(x, grad_y, strict=True)]
    rows = sum((G @ P).square().sum(1) for G in gradients)
    columns = sum((G.T @ Q).square().sum(1) for G in gradients)
    return torch.as_tensor(rows), torch.as_tensor(columns)


def path_integral(omega: Tensor, gradient: Tensor, delta: Tensor) -> Tensor:
    """ω after one more step, ω − g̃ ⊙ Δθ (Eq. 12); G can replace g̃. All (d_out, d_in)."""
    return omega - gradient * delta


def consolidate(omega: Tensor, delta: Tensor, xi: float) -> Tensor:
    """Ω = max(ω, 0) / (Δ² + ξ) (Eq. 13), Δ the movement of the whole phase. All (d_out, d_in).

    ω is clamped since a negative value would reward drift (reading 2 in docs/equations.md).
    """
    return omega.clamp(min=0) / (delta**2 + xi)


def layer_penalty(importance: Tensor, theta: Tensor, theta_nu: Tensor) -> Tensor:
    """L_reg,l = Σ_i Ω_i (θ_i − θ_i^ν)² (Eq. 14), a scalar."""
    return (importance * (theta - theta_nu) ** 2).sum()


def layer_weights(norms: Tensor, kind: str = "softmax") -> Tensor:
    """One coefficient c_l for each ‖Ω_l‖₂ in `norms` (L,). They sum to one, except with "sum" and "root" (Eq. 15).

    softmax: Eq. 15 as written, which depends on the unit of Ω. norm_share: ‖Ω_l‖ / Σ ‖Ω_k‖, which does not.
    uniform: 1/L, the ablation without layer weights. sum: all ones, the plain sum over all matrices, as in EWC.
    root: √(mean ‖Ω_k‖ / ‖Ω_l‖), halfway from "sum" to matrices that count alike; 0 for a matrix without importance.
    """
    if kind == "softmax":
        return torch.softmax(norms, dim=0)
    if kind == "norm_share":
        return norms / norms.sum()
    if kind == "uniform":
        return torch.full_like(norms, 1 / len(norms))
    if kind == "sum":
        return torch.ones_like(norms)
    if kind == "root":
        return torch.where(norms > 0, (norms.mean() / norms).sqrt(), 0)
    raise ValueError(f"layer weights: expected softmax, norm_share, uniform, sum or root, got {kind!r}")


def regularisation(weights: Tensor, layer_penalties: Tensor) -> Tensor:
    """L_reg = Σ_l c_l L_reg,l (Eq. 15), a scalar from two (L,) vectors."""
    return (weights * layer_penalties).sum()


def total_loss(task_loss: Tensor, regularisation_loss: Tensor, phi: float) -> Tensor:
    """L = L_task + φ L_reg (Eq. 16)."""
    return task_loss + phi * regularisation_loss
