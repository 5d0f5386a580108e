"""Σ Ω D² (Eq. 14) and both of its gradients for all matrices in one launch and one pass over Ω."""
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from hlora.encodings import Eight
from hlora.kernels import groups
from hlora.kernels.groups import PRECISION, SHARING, difference, locate, pointer, read, size, write
from hlora.ops import Factors

# Not measured, see accumulate.py. Columns divide 128, so that a tile has one scale of `Eight` a row.
_CANDIDATES = groups.candidates((32, 32, 4, 1), (32, 64, 4, 1), (64, 32, 4, 1), (64, 64, 8, 1), (64, 64, 8, 2))


def penalties_with_gradients(
    importances: Sequence[Tensor | Eight],  # (d_out, d_in), float32, bfloat16 or Eight
    As: Sequence[Tensor],  # (r, d_in)
    Bs: Sequence[Tensor],  # (d_out, r)
    anchors: Sequence[Factors | None],  # of θ^ν; None for W₀
    scales: Sequence[float],
    blocks: tuple[int, int] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # (L,), (r, d_in) each, (d_out, r) each, float32
    """Σ Ω D², D = s(BA − B_νA_ν) or sBA, with ∂/∂A = 2s Bᵀ(Ω⊙D) and ∂/∂B = 2s (Ω⊙D)Aᵀ of each matrix.

    A program sums its strip's value and ∂/∂B in registers, in a fixed order. ∂/∂A is a sum over strips, by atomic
    additions, whose order may change the last bits: to keep each strip's part takes r/rows of the bytes of a float32 Ω.
    With torch.use_deterministic_algorithms(True) that is what is done.

    Raises ValueError when the importances are not contiguous, or differ in encoding or device.
    """
    whole = [omega.codes if isinstance(omega, Eight) else omega for omega in importances]
    steps = [omega.scale if isinstance(omega, Eight) else omega for omega in importances]
    groups.check(whole, torch.float32, torch.bfloat16, torch.uint8)
    groups.check(steps, torch.float32, torch.bfloat16)
    in_order = torch.are_deterministic_algorithms_enabled()
    if in_order and blocks is None:
        blocks = (32, 32)  # the autotuner's choice may differ from run to run
    device, rows = whole[0].device, blocks[0] if blocks else groups.LEAST_ROWS
    strips = [triton.cdiv(len(omega), rows) for omega in whole]
    factors = [groups.ready(A, B) for A, B in zip(As, Bs, strict=True)]
    starts = [[] if anchor is None else groups.ready(*anchor) for anchor in anchors]

    values = torch.zeros(len(whole), max(strips), device=device)  # of each strip
    shapes_A = [(count if in_order else 1, *A.shape) for count, (A, _) in zip(strips, factors, strict=True)]
    flat_A, sums_A = _in_one_piece(torch.zeros, shapes_A, device)
    flat_B, grads_B = _in_one_piece(torch.empty, [B.shape for _, B in factors], device)
    table = groups.upload(
        (
            [
                *(*omega.shape, len(mine[0]), len(start[0]) if start else 0),
                *(tensor.data_ptr() for tensor in (omega, step, *mine, *(start or mine))),
                *((part.data_ptr() - flat.data_ptr()) // 4 for part, flat in ((sum_A, flat_A), (grad_B, flat_B))),
            ]
            for omega, step, mine, start, sum_A, grad_B in zip(
                whole, steps, factors, starts, sums_A, grads_B, strict=True
            )
        ),
        torch.int64,
        device,
    )
    scale = groups.upload(([scale] for scale in scales), torch.float32, device)
    every = [flat_A, *steps, *(tensor for mine in (*factors, *starts) for tensor in mine)]
    arguments = (table, scale, values, flat_A, flat_B, len(whole), max(strips))
    rank = max(groups.CHUNK.value, triton.next_power_of_2(max(len(A) for A, _ in factors)))
    groups.launch(_penalties, whole, every, blocks, *arguments, IN_ORDER=in_order, RANK=rank)
    return values.sum(1), [sum_A.sum(0) if in_order else sum_A[0] for sum_A in sums_A], grads_B


def _in_one_piece(
    make: Callable[..., Tensor], shapes: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """A flat tensor, and tensors of these shapes that share it: one launch makes them all."""
    sizes = [prod(shape) for shape in shapes]
    flat = make(sum(sizes), device=device)
    return flat, [part.view(*shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


@triton.autotune(_CANDIDATES, key=["OMEGA", "RANK"], reset_to_zero=["grads_A"], do_bench=groups.measure)
@triton.jit(do_not_specialize=["matrices", "width"])
def _penalties(
    table,  # int64 (12, matrices): d_out, d_in, r, r of the anchor or 0; addresses of Ω or its codes, of its scales, of
    # A, B, A_ν, B_ν; where ∂/∂A and ∂/∂B start in grads_A and grads_B
    scales,  # float32 (1, matrices)
    values,  # float32 (matrices, width)
    grads_A,
    grads_B,
    matrices,
    width,
    OMEGA: tl.constexpr,
    IN_ORDER: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MATRICES: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    matrix, strip = locate(table, matrices, MATRICES, ROWS)
    d_out = size(table, 0, matrix, matrices)
    d_in = size(table, 1, matrix, matrices, ALIGNMENT)
    rank = size(table, 2, matrix, matrices)
    anchor_rank = size(table, 3, matrix, matrices)
    omega = pointer(table, 4, matrix, matrices, OMEGA, ALIGNMENT)
    steps = pointer(table, 5, matrix, matrices, tl.float32, ALIGNMENT)
    A = pointer(table, 6, matrix, matrices, tl.float32, ALIGNMENT)
    B = pointer(table, 7, matrix, matrices, tl.float32, ALIGNMENT)
    A_anchor = pointer(table, 8, matrix, matrices, tl.float32, ALIGNMENT)
    B_anchor = pointer(table, 9, matrix, matrices, tl.float32, ALIGNMENT)
    start_A = tl.load(table + 10 * matrices + matrix)
    start_B = tl.load(table + 11 * matrices + matrix)
    if IN_ORDER:
        start_A += strip.to(tl.int64) * rank * d_in
    grad_A = grads_A + tl.multiple_of(start_A, ALIGNMENT)
    scale = tl.load(scales + matrix)
    i = strip * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    B_strip = read(B, i, k, d_out, rank)
    grad_B = tl.zeros((ROWS, RANK), tl.float32)
    value = tl.zeros((ROWS,), tl.float32)
    for start in range(0, d_in, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        weight = read(omega, i, j, d_out, d_in)  # first: on its way while the product is formed
        if omega.dtype.element_ty == tl.uint8:
            step = tl.load(steps + i * tl.cdiv(d_in, SHARING) + start // SHARING, mask=i < d_out, other=0.0)
            weight *= step[:, None]
            weight *= weight
        delta = scale * difference(A, B, A_anchor, B_anchor, i, j, d_out, d_in, rank, anchor_rank)
        weighted = weight * delta
        value += tl.sum(weighted * delta, 1)
        columns = tl.trans(read(A, k, j, rank, d_in))
        grad_B += tl.dot(weighted, columns, input_precision=PRECISION)
        part_A = 2 * scale * tl.dot(tl.trans(B_strip), weighted, input_precision=PRECISION)
        if IN_ORDER:
            write(grad_A, k, j, rank, d_in, part_A)
        else:
            mask = (k < rank)[:, None] & (j < d_in)[None, :]
            tl.atomic_add(grad_A + k[:, None] * d_in + j[None, :], part_A, mask=mask, sem="relaxed")
    write(grads_B + start_B, i, k, d_out, rank, 2 * scale * grad_B)
    tl.store(values + matrix * width + strip, tl.sum(value, 0))
