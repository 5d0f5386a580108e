"""The two hot operations and the consolidation.

`accumulate_all_`, `consolidate_all` and `penalties_with_gradients` take all matrices of a model. Factored importance
needs no tensor larger than the low-rank factors. Dense importance is streamed over blocks of rows, with one block of
temporary memory. On an accelerator PyTorch compiles recording and penalty over the whole matrix (numerics/compiled.py).

A pair (left, right) is the low-rank product left @ right. The difference of two adapters is computed as
s(BA − B₀A₀) = s·[B − B₀, B₀]·[A; A − A₀]: rank 2r, and nothing cancels in float32. Low-rank functions also take stacks
of matrices of one shape, (n, d_out, k) and (n, k, d_in): for dozens of 576×576 matrices, calls cost more than
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hlora.numerics import compiled
from hlora.numerics.encodings import Encoded, Factored, norm, row_blocks, shape
from hlora.numerics.precision import outside_autocast, widened
from hlora.numerics.types import Consolidated, Factors, Pair, Step


def difference(A: Tensor, B: Tensor, start: Factors | None, *, scale: float) -> Pair:
    """s(BA − B₀A₀) as a pair of rank 2r, in float32 or wider.

    Args:
        A: (r, d_in), or a stack (n, r, d_in).
        B: (d_out, r), or a stack (n, d_out, r).
        start: A₀ and B₀. None stands for W₀: the difference is then sBA, of rank r.
        scale: The LoRA scale s.
    """
    A, B = _detached(A), _detached(B)
    if start is None:
        return scale * B, A
    A_start, B_start = (_detached(factor) for factor in start)
    return torch.cat([B - B_start, B_start], -1).mul_(scale), torch.cat([A, A - A_start], -2)


def effective_gradient(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, *, lr: float | Tensor, scale: float
) -> Pair:
    """g̃ as a pair of rank 2r, s·[g^B, B]·[A − ηg^A; g^A]. A stack may have lr of shape (n, 1, 1). Source: Eq. 11."""
    A, B, grad_A, grad_B = (_detached(factor) for factor in (A, B, grad_A, grad_B))
    return torch.cat([grad_B, B], -1).mul_(scale), torch.cat([A - lr * grad_A, grad_A], -2)


def accumulate_(omega: Encoded, gradient: Pair, delta: Pair) -> None:
    """ω −= g̃ ⊙ Δθ in place. Dense: one pass over ω; factored: O((d_out + d_in) r²). Source: Eq. 12."""
    if isinstance(omega, Factored):
        row, column = product_sums(gradient, delta)
        omega.row.sub_(row)
        omega.column.sub_(column)
        return
    if compiled.over_whole_matrix(compiled.accumulate_, omega, *gradient, *delta) is not None:
        return
    scratch = _Scratch()
    for rows in row_blocks(*shape(omega), omega.device):
        omega[rows].sub_(scratch.product(0, delta, rows).mul_(scratch.product(1, gradient, rows)))


@outside_autocast
def accumulate_all_(
    omegas: Sequence[Encoded],
    steps: Sequence[Step],
    scales: Sequence[float],
    *,
    counted: Tensor,  # bool, a scalar
) -> None:
    """`accumulate_` for every matrix of a model, from the factors themselves.

    Args:
        omegas: ω of each matrix, changed in place.
        steps: The optimizer step of each matrix.
        scales: The LoRA scale of each matrix.
        counted: False skips the step, also if it holds NaN. Stays on the device, so that nothing waits for it.
    """
    for alike in group_by_shape([step.A for step in steps], [step.B for step in steps], scales):
        gradient, delta = _pairs([steps[i] for i in alike], scales[alike[0]])
        leave = counted.logical_not().to(delta[1].device)
        if isinstance(omegas[alike[0]], Factored):
            rows, columns = (sums.masked_fill_(leave, 0.0) for sums in product_sums(gradient, delta))
            for i, row, column in zip(alike, rows, columns, strict=True):
                omegas[i][0].sub_(row)
                omegas[i][1].sub_(column)
            continue
        for factor in (*gradient, *delta):
            factor.masked_fill_(leave, 0.0)  # not times zero: it may hold NaN
        for i, P, Q, U, V in zip(alike, *gradient, *delta, strict=True):
            accumulate_(omegas[i], (P, Q), (U, V))


def _pairs(steps: Sequence[Step], scale: float) -> tuple[Pair, Pair]:
    """Gradient and movement in one step, as stacks, of matrices that have one shape."""
    fields = ("A", "B", "grad_A", "grad_B", "A_next", "B_next")
    A, B, grad_A, grad_B, A_next, B_next = (_stack([getattr(step, part) for step in steps]) for part in fields)
    lr: float | Tensor = steps[0].lr
    if any(step.lr != lr for step in steps):
        lr = torch.tensor([step.lr for step in steps], dtype=grad_A.dtype, device=A.device).view(-1, 1, 1)
    return effective_gradient(A, B, grad_A, grad_B, lr=lr, scale=scale), difference(A_next, B_next, (A, B), scale=scale)


def product_sums(first: Pair, second: Pair) -> tuple[Tensor, Tensor]:  # (d_out,), (d_in,)
    """Row and column sums of (PQ) ⊙ (UV) without forming it: Σ_j (PQ)_ij (UV)_ij = Σ_km P_ik (QVᵀ)_km U_im."""
    (P, Q), (U, V) = first, second
    return (P @ (Q @ V.mT)).mul_(U).sum(-1), ((U.mT @ P) @ Q).mul_(V).sum(-2)


def consolidate(omega: Encoded, delta: Pair, xi: float) -> tuple[Encoded, float]:
    """Ω, and the share of the elements of ω that were negative and count as 0.

    Dense: in place, streamed. Factored: ω and Δ² are each row ⊗ column / total. Ω is kept as the row and column sums of
    their ratio, also streamed. The share is then that of the row and column sums.

    Args:
        omega: ω of one matrix.
        delta: Δ, the movement of the whole phase, as a pair.
        xi: Damping ξ, unit weight².

    Source: Eq. 13.
    """
    P, Q = delta
    if isinstance(omega, Factored):
        negative = int((omega.row < 0).sum() + (omega.column < 0).sum())
        count = omega.row.numel() + omega.column.numel()
        clamped = Factored(omega.row.clamp(min=0), omega.column.clamp(min=0))
        u, v = clamped.scaled()
        p, q = Factored(*product_sums(delta, delta)).scaled()
        row, column = torch.empty_like(u), torch.zeros_like(v)
        for rows in row_blocks(len(u), len(v), u.device):
            block = torch.outer(u[rows], v) / (torch.outer(p[rows], q) + xi)
            row[rows] = block.sum(1)
            column += block.sum(0)
        return Factored(row, column), negative / count
    below = torch.zeros((), dtype=torch.int64, device=omega.device)
    for rows in row_blocks(*shape(omega), omega.device):
        block = omega[rows]
        below += (block < 0).sum()
        block.clamp_(min=0).div_((P[rows] @ Q).square_() + xi)
    return omega, int(below) / omega.numel()


@outside_autocast
def consolidate_all(
    omegas: Sequence[Encoded],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    *,
    starts: Sequence[Factors],
    scales: Sequence[float],
    xi: float,
) -> list[Consolidated]:
    """`consolidate` for every matrix of a model, with the cost of undoing the phase and the norm of each Ω."""
    found: list[Consolidated] = []
    for omega, A, B, start, scale in zip(omegas, As, Bs, starts, scales, strict=True):
        delta = difference(A, B, start, scale=scale)
        importance, share = consolidate(omega, delta, xi)
        undo_cost = float(penalty(importance, delta))
        found.append(Consolidated(importance, share, undo_cost, float(norm(importance))))
    return found


def penalty(importance: Encoded, delta: Pair) -> Tensor:
    """Σ_i Ω_i D_i² with D = left @ right, a scalar. Source: Eq. 14."""
    return _penalty(importance, delta, None)[0]


def penalty_with_gradients(
    importance: Encoded,  # (d_out, d_in)
    A: Tensor,  # (r, d_in)
    B: Tensor,  # (d_out, r)
    *,
    anchor: Factors | None,  # of θ^ν; None for W₀
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # scalar, (r, d_in), (d_out, r)
    """Σ Ω D², D = s(BA − B_νA_ν) or sBA, with its gradients 2s Bᵀ(Ω⊙D) for A and 2s (Ω⊙D) Aᵀ for B, in one pass over Ω.

    For a stack of factored matrices the results are (n,), (n, r, d_in), (n, d_out, r).

    Source: Eq. 14.
    """
    value, grad_A, grad_B = _penalty(importance, difference(A, B, anchor, scale=scale), (_detached(A), _detached(B)))
    assert grad_A is not None and grad_B is not None
    return value, grad_A.mul_(2 * scale), grad_B.mul_(2 * scale)


@outside_autocast
def penalties_with_gradients(
    importances: Sequence[Encoded],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    *,
    anchors: Sequence[Factors | None],
    scales: Sequence[float],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # (L,), (r, d_in) each, (d_out, r) each
    """`penalty_with_gradients` for every matrix of a model. Factored matrices of one shape are computed as a stack."""
    found: dict[int, tuple[Tensor, ...]] = {}
    for alike in group_by_shape(As, Bs, scales):
        if not isinstance(importances[alike[0]], Factored):
            for i in alike:
                found[i] = penalty_with_gradients(importances[i], As[i], Bs[i], anchor=anchors[i], scale=scales[i])
            continue
        importance = Factored(*_stacked(importances, alike))
        anchor = None if anchors[alike[0]] is None else _stacked(anchors, alike)
        A, B = _stacked(list(zip(As, Bs, strict=True)), alike)
        results = penalty_with_gradients(importance, A, B, anchor=anchor, scale=scales[alike[0]])  # type: ignore[arg-type]
        found |= dict(zip(alike, zip(*results, strict=True), strict=True))
    values, grad_As, grad_Bs = zip(*(found[i] for i in range(len(As))), strict=True)
    return torch.stack([value.to(values[0].device) for value in values]), list(grad_As), list(grad_Bs)


def group_by_shape(As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float]) -> list[list[int]]:
    """Indices of matrices that can be stacked: same shapes, precision, device and scale."""
    groups: dict[object, list[int]] = {}
    for i, (A, B, scale) in enumerate(zip(As, Bs, scales, strict=True)):
        groups.setdefault((A.shape, B.shape, A.dtype, B.dtype, A.device, scale), []).append(i)
    return list(groups.values())


def _penalty(
    importance: Encoded, delta: Pair, factors: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Σ Ω D² and, given factors (A, B), Bᵀ(Ω⊙D) and (Ω⊙D)Aᵀ."""
    P, Q = delta
    if isinstance(importance, Factored):
        u, v = (vector.to(P.dtype) for vector in importance.scaled())
        weighted = u[..., None] * P  # (d_out, 2r)
        spread = Q * v[..., None, :]  # (2r, d_in)
        value = ((P.mT @ weighted) * (spread @ Q.mT)).sum((-2, -1))
        if factors is None:
            return value, None, None
        A, B = factors
        return value, (B.mT @ weighted) @ spread, weighted @ (spread @ A.mT)
    # Σ Ω D² = Σ ((Ω⊙D) Qᵀ) ⊙ P, and (Ω⊙D) Qᵀ begins with (Ω⊙D) Aᵀ. So there is no second copy of D or pass over Ω.
    B = P[:, :0] if factors is None else factors[1]
    found = None if factors is None else compiled.over_whole_matrix(compiled.products, importance, P, Q, B)
    products, grad_A = _products_streamed(importance, P, Q, B) if found is None else found
    value = (products * P).sum().clamp(min=0)
    if factors is None:
        return value, None, None
    return value, grad_A, products[:, : len(grad_A)].clone()


def _products_streamed(
    importance: Tensor, P: Tensor, Q: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:  # (d_out, 2r), (r, d_in)
    """(Ω⊙D) Qᵀ and Bᵀ(Ω⊙D), D = PQ."""
    products, grad_A, scratch = torch.empty_like(P), Q.new_zeros(B.shape[1], Q.shape[1]), _Scratch()
    for rows in row_blocks(*shape(importance), importance.device):
        weighted = scratch.product(0, (P, Q), rows).mul_(importance[rows])
        torch.mm(weighted, Q.T, out=products[rows])
        grad_A.addmm_(B[rows].T, weighted)
    return products, grad_A


class _Scratch:
    """Scratch memory for blocks of rows of low-rank products, reused from block to block.

    Allocating a 1 MB block each time may map new pages: 37 products of 85×16 with 16×3072 took 1.6 to 13 ms in six
    processes, against 1.2 to 2.2 ms into reused memory.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def product(self, which: int, pair: Pair, rows: slice) -> Tensor:  # (rows, d_in)
        left, right = pair[0][rows], pair[1]
        if which not in self._kept:  # sized for the first block, which is the largest
            self._kept[which] = left.new_empty(len(left), right.shape[1])
        return torch.mm(left, right, out=self._kept[which][: len(left)])


def _stacked(tuples: Sequence[Any], chosen: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(_stack(column) for column in zip(*(tuples[i] for i in chosen), strict=True))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def _detached(factor: Tensor) -> Tensor:
    """Outside the graph, in float32 or wider."""
    return widened(factor.detach())
