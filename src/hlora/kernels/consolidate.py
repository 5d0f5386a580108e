"""Ω = max(ω, 0)/(Δ² + ξ) (Eq. 13) for all matrices in one launch, and in the same pass what is known of each Ω."""
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hlora import encodings
from hlora.kernels import Consolidated, groups
from hlora.kernels.groups import SHARING, difference, locate, pointer, read, size, write
from hlora.ops import Factors


def consolidate_(
    omegas: Sequence[Tensor],  # (d_out, d_in), float32 or bfloat16
    As: Sequence[Tensor],  # (r, d_in)
    Bs: Sequence[Tensor],  # (d_out, r)
    starts: Sequence[Factors],  # A₀, B₀
    scales: Sequence[float],
    xi: float,
    encoding: str,
    blocks: tuple[int, int] | None = None,
) -> list[Consolidated]:
    """Ω with Δ = s(BA − B₀A₀): in int8 new matrices (blocks of 128 columns), else in place of ω, whose encoding it is.

    What is known of Ω is of Ω as it is kept, after rounding. The only one of the kernels that waits for the device.
    Raises ValueError when the ω are not contiguous, or differ in dtype or device.
    """
    groups.check(omegas, torch.float32, torch.bfloat16)
    device, rows = omegas[0].device, blocks[0] if blocks else groups.LEAST_ROWS
    eight = encoding == "int8"
    importances = [encodings.zeros(encoding, len(o), o.shape[1], device) if eight else o for o in omegas]
    kept = [list(encodings.parts(importance).values()) for importance in importances]  # codes and scale, or Ω itself
    factors = [groups.ready(A, B, *start) for A, B, start in zip(As, Bs, starts, strict=True)]
    table = groups.upload(
        (
            [*omega.shape, len(mine[0]), *(tensor.data_ptr() for tensor in (omega, parts[0], parts[-1], *mine))]
            for omega, parts, mine in zip(omegas, kept, factors, strict=True)
        ),
        torch.int64,
        device,
    )
    scale = groups.upload(([scale] for scale in scales), torch.float32, device)
    sums = torch.zeros(3, len(omegas), triton.cdiv(max(map(len, omegas)), rows), device=device)  # of each strip
    every = [tensor for group in (*kept, *factors) for tensor in group]
    groups.launch(_consolidate, omegas, every, blocks, table, scale, sums, xi, len(omegas), sums.shape[2], EIGHT=eight)
    return [
        Consolidated(importance, negative / omega.numel(), cost, square**0.5)
        for omega, importance, negative, cost, square in zip(
            omegas, importances, *sums.sum(2, dtype=torch.float64).tolist(), strict=True
        )
    ]


# Once a recording, so there is nothing to choose. 128 columns: what shares a scale of `Eight`.
@triton.autotune(groups.candidates((groups.LEAST_ROWS, 128, 4, 1)), key=[])
@triton.jit(do_not_specialize=["matrices", "width"])
def _consolidate(
    table,  # int64 (10, matrices): d_out, d_in, r; addresses of ω, of Ω or its codes, of its scales, of A, B, A₀, B₀
    scales,  # float32 (1, matrices)
    sums,  # float32 (3, matrices, width): how many ω < 0, Σ Ω Δ², Σ Ω² of each strip
    xi,
    matrices,
    width,
    OMEGA: tl.constexpr,
    EIGHT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MATRICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    matrix, strip = locate(table, matrices, MATRICES, ROWS)
    d_out = size(table, 0, matrix, matrices)
    d_in = size(table, 1, matrix, matrices, ALIGNMENT)
    rank = size(table, 2, matrix, matrices)
    omega = pointer(table, 3, matrix, matrices, OMEGA, ALIGNMENT)
    A = pointer(table, 6, matrix, matrices, tl.float32, ALIGNMENT)
    B = pointer(table, 7, matrix, matrices, tl.float32, ALIGNMENT)
    A_start = pointer(table, 8, matrix, matrices, tl.float32, ALIGNMENT)
    B_start = pointer(table, 9, matrix, matrices, tl.float32, ALIGNMENT)
    scale = tl.load(scales + matrix)
    i = strip * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS,), tl.float32)
    costs = tl.zeros((ROWS,), tl.float32)
    negatives = tl.zeros((ROWS,), tl.float32)
    for start in range(0, d_in, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        value = read(omega, i, j, d_out, d_in)
        delta = scale * difference(A, B, A_start, B_start, i, j, d_out, d_in, rank, rank)
        negatives += tl.sum((value < 0).to(tl.float32), 1)
        value = tl.maximum(value, 0.0) / (delta * delta + xi)  # zero outside of the matrix, as ω is there
        if EIGHT:
            tl.static_assert(COLUMNS == SHARING)
            codes, step = eighth(value)
            target = pointer(table, 4, matrix, matrices, tl.uint8, ALIGNMENT)
            write(target, i, j, d_out, d_in, codes)
            target = pointer(table, 5, matrix, matrices, tl.float32, ALIGNMENT)
            tl.store(target + i * tl.cdiv(d_in, SHARING) + start // SHARING, step, mask=i < d_out)
            value = codes * step[:, None]
            value *= value
        else:
            write(omega, i, j, d_out, d_in, value)
            value = value.to(OMEGA).to(tl.float32)
        squares += tl.sum(value * value, 1)
        costs += tl.sum(value * delta * delta, 1)
    mine = sums + matrix * width + strip
    tl.store(mine, tl.sum(negatives, 0))
    tl.store(mine + matrices * width, tl.sum(costs, 0))
    tl.store(mine + 2 * matrices * width, tl.sum(squares, 0))


@triton.jit
def eighth(value):
    """Codes, in float32, and the scale of each row of a block, as `Eight.of` has them."""
    root = tl.sqrt_rn(value)
    step = tl.div_rn(tl.max(root, 1), 255.0)
    codes = tl.floor(tl.div_rn(root, tl.where(step == 0, 1.0, step)[:, None]) + 0.5)
    return tl.minimum(codes, 255.0), step
