"""ω −= g̃ ⊙ Δθ (Eq. 12) for all matrices in one launch, one or several optimizer steps in one pass over ω."""
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hlora.kernels import Step, groups
from hlora.kernels.groups import CHUNK, PRECISION, difference, doubled, locate, pointer, read, size, write

# No GPU was at hand when this was written, so no candidate has a measurement: the autotuner measures them on the first
# call of a kind, and TRITON_PRINT_AUTOTUNING=1 prints its choice.
_CANDIDATES = groups.candidates((32, 64, 4, 1), (32, 64, 4, 2), (64, 64, 8, 1), (64, 64, 8, 2), (32, 128, 8, 1))
_tuned: set[torch.dtype] = set()


def accumulate_(
    omegas: Sequence[Tensor],  # (d_out, d_in), float32 or bfloat16
    steps: Sequence[Sequence[Step]],  # K of each matrix
    scales: Sequence[float],
    counted: Tensor | None = None,  # bool (K,)
    seed: int = 0,
    blocks: tuple[int, int] | None = None,
) -> None:
    """ω −= Σ_k g̃_k ⊙ Δθ_k, in place. One pass over ω whatever K is: 8 bytes an element in float32, 4 in bfloat16.

    In float32 the result is bit by bit that of one call a step; in bfloat16 it is rounded once, stochastically
    (`encodings.round_stochastically_`).

    counted: False for a step to leave out, whatever it holds, so that nobody has to ask the device which is not finite.
    seed: of the rounding, below 2³¹ and another one each call, such as the number of steps so far. The same seed gives
    the same ω, whatever the blocks.

    Raises ValueError when the ω are not contiguous, or differ in dtype or device.
    """
    if not omegas or not steps[0]:
        return
    groups.check(omegas, torch.float32, torch.bfloat16)
    device, count = omegas[0].device, len(steps[0])
    factors = [
        [f for s in mine for f in groups.ready(s.A, s.B, s.A_next, s.B_next, s.grad_A, s.grad_B)] for mine in steps
    ]
    table = groups.upload(
        (
            [*omega.shape, len(mine[0]), *(tensor.data_ptr() for tensor in (omega, *mine))]
            for omega, mine in zip(omegas, factors, strict=True)
        ),
        torch.int64,
        device,
    )
    numbers = groups.upload(
        ([scale, *(step.lr for step in mine)] for scale, mine in zip(scales, steps, strict=True)), torch.float32, device
    )
    counted = torch.ones(count, dtype=torch.int8, device=device) if counted is None else counted.to(torch.int8)

    def launch(counted: Tensor) -> None:
        every = [factor for mine in factors for factor in mine]
        groups.launch(_accumulate, omegas, every, blocks, table, numbers, counted, len(omegas), count, seed)

    if blocks is None and omegas[0].dtype not in _tuned:
        # The autotuner runs each candidate many times, and ω must not take the steps each time: there none is counted.
        launch(torch.zeros_like(counted))
        _tuned.add(omegas[0].dtype)
    launch(counted)


@triton.autotune(_CANDIDATES, key=["OMEGA"], do_bench=groups.measure)
@triton.jit(do_not_specialize=["matrices", "steps", "seed"])
def _accumulate(
    table,  # int64 (4 + 6K, matrices): d_out, d_in, r, address of ω; of each step A, B, A⁺, B⁺, g^A, g^B
    numbers,  # float32 (1 + K, matrices): the scale s; of each step η
    counted,  # int8 (K,)
    matrices,
    steps,
    seed,
    OMEGA: tl.constexpr,
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
    scale = tl.load(numbers + matrix)
    i = strip * ROWS + tl.arange(0, ROWS)
    for start in range(0, d_in, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        value = read(omega, i, j, d_out, d_in)  # first: on its way while the products are formed
        for step in range(steps):
            field = 4 + 6 * step
            A = pointer(table, field, matrix, matrices, tl.float32, ALIGNMENT)
            B = pointer(table, field + 1, matrix, matrices, tl.float32, ALIGNMENT)
            A_next = pointer(table, field + 2, matrix, matrices, tl.float32, ALIGNMENT)
            B_next = pointer(table, field + 3, matrix, matrices, tl.float32, ALIGNMENT)
            grad_A = pointer(table, field + 4, matrix, matrices, tl.float32, ALIGNMENT)
            grad_B = pointer(table, field + 5, matrix, matrices, tl.float32, ALIGNMENT)
            lr = tl.load(numbers + (1 + step) * matrices + matrix)
            gradient = scale * effective_gradient(A, B, grad_A, grad_B, lr, i, j, d_out, d_in, rank)
            delta = scale * difference(A_next, B_next, A, B, i, j, d_out, d_in, rank, rank)
            # Selected, not multiplied: a step that is left out may hold NaN.
            value -= tl.where(tl.load(counted + step) != 0, gradient * delta, 0.0)
        if omega.dtype.element_ty == tl.bfloat16:
            value = round_stochastically(value, seed, matrix, i, start, d_in)
        write(omega, i, j, d_out, d_in, value)


@triton.jit
def effective_gradient(A, B, grad_A, grad_B, lr, i, j, d_out, d_in, rank):
    """A tile of g̃/s = [g^B, B]·[A − ηg^A; g^A], as `ops.effective_gradient` has it."""
    tile = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, 2 * rank, CHUNK):
        first, k = doubled(start, rank)
        left = tl.where(first[None, :], read(grad_B, i, k, d_out, rank), read(B, i, k, d_out, rank))
        slope = read(grad_A, k, j, rank, d_in)
        right = tl.where(first[:, None], read(A, k, j, rank, d_in) - lr * slope, slope)
        tile += tl.dot(left, right, input_precision=PRECISION)
    return tile


@triton.jit
def round_stochastically(value, seed, matrix, i, start, d_in):
    """To one of two bfloat16 neighbours, up with the probability of the remainder, by 16 random bits added below."""
    ROWS: tl.constexpr = value.shape[0]
    EIGHTHS: tl.constexpr = value.shape[1] // 8
    # Philox gives 128 bits at a time, enough for 8 elements. Its key is the seed and the matrix, its counter the eight.
    counter = i[:, None] * tl.cdiv(d_in, 8) + (start // 8 + tl.arange(0, EIGHTHS))[None, :]
    a, b, c, d = tl.randint4x((tl.cast(seed, tl.int64) << 32) + matrix, counter)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    noise = tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (ROWS, 8 * EIGHTHS))
    bits = value.to(tl.int32, bitcast=True) + noise.to(tl.int32)
    return (bits & -65536).to(tl.float32, bitcast=True)
