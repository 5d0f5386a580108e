"""The two hot operations and the consolidation, streamed over blocks of rows: no d×d temporary beyond one block.

Low-rank products come as a pair (left, right) that stands for left @ right. A difference of two adapters is
taken as s(BA − B₀A₀) = s·[B − B₀, B₀]·[A; A − A₀]: rank 2r, and nothing cancels in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hlora.encodings import Encoded, Factored, round_stochastically_

Pair = tuple[Tensor, Tensor]  # (d_out, k), (k, d_in)
Factors = tuple[Tensor, Tensor]  # A (r, d_in), B (d_out, r)

_BLOCK = 1 << 18  # elements of one block. 3072², r 8, 2 cores: recording 13 ms (2¹⁶ 25, 2²⁰ 34), penalty 23 (35, 23)


def difference(A: Tensor, B: Tensor, start: Factors | None, scale: float) -> Pair:
    """s(BA − B₀A₀) as a pair of rank 2r, in float32 or wider. A: (r, d_in), B: (d_out, r).

    start: A₀ and B₀; None for W₀, from where the difference is sBA, of rank r.
    """
    A, B = _wide(A), _wide(B)
    if start is None:
        return scale * B, A
    A_start, B_start = (_wide(factor) for factor in start)
    return scale * torch.cat([B - B_start, B_start], 1), torch.cat([A, A - A_start], 0)


def effective_gradient(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, lr: float, scale: float) -> Pair:
    """g̃ of Eq. 11 as a pair of rank 2r: s·[g^B, B]·[A − ηg^A; g^A]."""
    A, B, grad_A, grad_B = (_wide(factor) for factor in (A, B, grad_A, grad_B))
    return scale * torch.cat([grad_B, B], 1), torch.cat([A - lr * grad_A, grad_A], 0)


def accumulate_(omega: Encoded, gradient: Pair | Tensor, delta: Pair) -> None:
    """ω −= g̃ ⊙ Δθ (Eq. 12), in place. One pass over ω, or O((d_out + d_in) r²) when it is factored.

    gradient: g̃ as a pair, or the exact gradient G, dense (d_out, d_in), which is passed over once in any encoding.
    """
    if isinstance(omega, Factored):
        row, column = product_sums(gradient, delta)
        omega.row.sub_(row)
        omega.column.sub_(column)
        return
    U, V = delta
    # One visible line for a fused kernel: `if omega.is_cuda: return kernels.accumulate_(omega, *gradient, U, V)`
    for rows in _row_blocks(*omega.shape):
        change = (U[rows] @ V).mul_(_rows(gradient, rows))
        if omega.dtype == torch.bfloat16:
            round_stochastically_(omega[rows], change.neg_().add_(omega[rows]))
        else:
            omega[rows].sub_(change)


def product_sums(first: Pair | Tensor, second: Pair) -> tuple[Tensor, Tensor]:  # (d_out,), (d_in,)
    """Row and column sums of (PQ) ⊙ (UV) without forming it: Σ_j (PQ)_ij (UV)_ij = Σ_km P_ik (QVᵀ)_km U_im.

    A dense G in place of PQ: Σ_j G_ij (UV)_ij = Σ_m (G Vᵀ)_im U_im.
    """
    U, V = second
    if isinstance(first, Tensor):
        return (first @ V.T).mul_(U).sum(1), (U.T @ first).mul_(V).sum(0)
    P, Q = first
    return (P @ (Q @ V.T)).mul_(U).sum(1), ((U.T @ P) @ Q).mul_(V).sum(0)


def consolidate(omega: Encoded, delta: Pair, xi: float) -> tuple[Encoded, float]:
    """Ω (Eq. 13) and the share of elements whose ω was negative and is taken as 0.

    Dense: in place, streamed. Factored: ω and Δ² are each row ⊗ column / total, and Ω is kept by the row and
    column sums of their ratio, again streamed; the share is that of the row and column sums.
    """
    P, Q = delta
    if isinstance(omega, Factored):
        negative = int((omega.row < 0).sum() + (omega.column < 0).sum())
        count = omega.row.numel() + omega.column.numel()
        clamped = Factored(omega.row.clamp(min=0), omega.column.clamp(min=0))
        u, v = clamped.scaled()
        p, q = Factored(*product_sums(delta, delta)).scaled()
        row, column = torch.empty_like(u), torch.zeros_like(v)
        for rows in _row_blocks(len(u), len(v)):
            block = torch.outer(u[rows], v) / (torch.outer(p[rows], q) + xi)
            row[rows] = block.sum(1)
            column += block.sum(0)
        return Factored(row, column), negative / count
    negative = 0
    for rows in _row_blocks(*omega.shape):
        block = omega[rows]
        negative += int((block < 0).sum())
        block.copy_(_wide(block).clamp(min=0) / ((P[rows] @ Q).square_() + xi))
    return omega, negative / omega.numel()


def penalty(importance: Encoded, delta: Pair) -> Tensor:
    """Σ_i Ω_i D_i² (Eq. 14) with D = left @ right, a scalar."""
    return _penalty(importance, delta, None)[0]


def penalty_with_gradients(
    importance: Encoded,  # (d_out, d_in)
    A: Tensor,  # (r, d_in)
    B: Tensor,  # (d_out, r)
    anchor: Factors | None,  # of θ^ν; None for W₀
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # scalar, (r, d_in), (d_out, r)
    """Σ Ω D² (Eq. 14), D = s(BA − B_νA_ν) or sBA, with ∂/∂A = 2s Bᵀ(Ω⊙D) and ∂/∂B = 2s (Ω⊙D) Aᵀ, in one pass over Ω."""
    value, grad_A, grad_B = _penalty(importance, difference(A, B, anchor, scale), (_wide(A), _wide(B)))
    assert grad_A is not None and grad_B is not None
    return value, grad_A.mul_(2 * scale), grad_B.mul_(2 * scale)


def _penalty(
    importance: Encoded, delta: Pair, factors: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Σ Ω D², and for factors (A, B) also Bᵀ(Ω⊙D) and (Ω⊙D)Aᵀ."""
    P, Q = delta
    if isinstance(importance, Factored):
        u, v = (vector.to(P.dtype) for vector in importance.scaled())
        weighted = u[:, None] * P  # (d_out, 2r)
        value = ((P.T @ weighted) * ((Q * v) @ Q.T)).sum()
        if factors is None:
            return value, None, None
        A, B = factors
        return value, ((B.T @ weighted) @ Q) * v, weighted @ ((Q * v) @ A.T)
    # One visible line for a fused kernel: `if P.is_cuda: return kernels.penalty(importance, P, Q, *factors)`
    value = P.new_zeros(())
    grad_A = grad_B = None
    if factors is not None:
        A, B = factors
        grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
    for rows in _row_blocks(*importance.shape):
        D = P[rows] @ Q
        weighted = importance[rows] * D
        value += torch.dot(weighted.flatten(), D.flatten())
        if grad_A is not None and grad_B is not None:
            grad_A.addmm_(B[rows].T, weighted)
            torch.mm(weighted, A.T, out=grad_B[rows])
    return value, grad_A, grad_B


def _rows(matrix: Pair | Tensor, rows: slice) -> Tensor:
    return matrix[rows] if isinstance(matrix, Tensor) else matrix[0][rows] @ matrix[1]


def _row_blocks(d_out: int, d_in: int) -> Iterator[slice]:
    height = max(1, _BLOCK // max(1, d_in))
    for start in range(0, d_out, height):
        yield slice(start, min(start + height, d_out))


def _wide(factor: Tensor) -> Tensor:
    """Detached, in float32 or wider."""
    return factor.detach().to(torch.promote_types(factor.dtype, torch.float32))
