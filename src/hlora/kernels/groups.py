"""What the kernels share: many matrices in one launch, and tiles of low-rank products formed in registers.

As in Triton's grouped matrix product, a small table on the device holds the shapes and addresses of all matrices. Each
program finds the matrix and the strip of rows that are its own, and walks along the strip tile by tile.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Near float32's precision on tensor cores, by three products of TF32 parts. "ieee" is exact float32, off tensor cores.
PRECISION = tl.constexpr("tf32x3")
CHUNK = tl.constexpr(16)  # of a product's inner dimension at a time: the least that every version of Triton takes
SHARING = tl.constexpr(128)  # neighbours in a row that share one scale of encodings.Eight
LEAST_ROWS = 32  # of a strip, among the autotuner's candidates
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.uint8: tl.uint8}


def candidates(*choices: tuple[int, int, int, int]) -> list[triton.Config]:
    """For the autotuner, from (rows, columns, warps, stages)."""
    return [
        triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in choices
    ]


def measure(run: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
    """The autotuner's clock, in milliseconds. Triton's own takes another 256 MB, to clear a cache that ω exceeds."""
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        run()
    end.record()
    end.synchronize()
    return [start.elapsed_time(end) / 5] * len(quantiles)


def launch(
    kernel: Any,
    matrices: Sequence[Tensor],
    factors: Sequence[Tensor],
    blocks: tuple[int, int] | None,
    *arguments: Any,
    **constants: Any,
) -> None:
    """One program a strip of rows, over all matrices. blocks: rows and columns of a tile, or the autotuner's choice."""
    aligned = all(t.data_ptr() % 16 == 0 for t in (*matrices, *factors)) and all(m.shape[1] % 16 == 0 for m in matrices)
    if blocks is not None:
        kernel, constants = kernel.fn, {**constants, "ROWS": blocks[0], "COLUMNS": blocks[1]}
    with torch.cuda.device_of(matrices[0]):
        kernel[lambda meta: (sum(triton.cdiv(len(matrix), meta["ROWS"]) for matrix in matrices),)](
            *arguments,
            OMEGA=DTYPES[matrices[0].dtype],
            ALIGNMENT=16 if aligned else 1,  # of addresses and rows: 16 lets a thread load 16 bytes at once
            MATRICES=triton.next_power_of_2(len(matrices)),
            **constants,
        )


def upload(
    columns: Iterable[Sequence[float]], dtype: torch.dtype, device: torch.device
) -> Tensor:  # (fields, matrices)
    """A table of one column a matrix, sent to the device without waiting: pinned memory stays until it has arrived."""
    rows = list(zip(*columns, strict=True))
    return torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def ready(*factors: Tensor) -> list[Tensor]:
    """What the kernels read: detached, float32, contiguous. No copy where it is so already."""
    return [factor.detach().float().contiguous() for factor in factors]


def check(matrices: Sequence[Tensor], *dtypes: torch.dtype) -> None:
    """Raises ValueError unless all are contiguous, on one device and of the same one of the dtypes."""
    first = matrices[0]
    for matrix in matrices:
        if matrix.dtype not in dtypes or matrix.dtype != first.dtype or matrix.device != first.device:
            raise ValueError(
                f"expected matrices of one dtype ({', '.join(map(str, dtypes))}) on one device, got {first.dtype} on "
                f"{first.device} and {matrix.dtype} on {matrix.device}. Call once for each device and encoding."
            )
        if not matrix.is_contiguous():
            raise ValueError(f"expected contiguous matrices, got strides {matrix.stride()}. Pass matrix.contiguous().")


@triton.jit
def locate(d_outs, matrices, MATRICES: tl.constexpr, ROWS: tl.constexpr):
    """This program's matrix, and its strip of ROWS rows there. d_outs: (matrices,); MATRICES: a power of two above."""
    every = tl.arange(0, MATRICES)
    strips = tl.cdiv(tl.load(d_outs + every, mask=every < matrices, other=0).to(tl.int32), ROWS)
    before = tl.cumsum(strips, 0) <= tl.program_id(0)
    return tl.sum(before.to(tl.int32), 0), tl.program_id(0) - tl.sum(tl.where(before, strips, 0), 0)


@triton.jit
def size(table, field, matrix, matrices, MULTIPLE: tl.constexpr = 1):
    return tl.multiple_of(tl.load(table + field * matrices + matrix).to(tl.int32), MULTIPLE)


@triton.jit
def pointer(table, field, matrix, matrices, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    return tl.multiple_of(tl.load(table + field * matrices + matrix).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def read(matrix, i, j, d_out, d_in):
    """Rows i and columns j of a contiguous (d_out, d_in) matrix in float32, zero outside of it."""
    place = i.to(tl.int64)[:, None] * d_in + j[None, :]  # 64 bits: a matrix may have more than 2³¹ elements
    return tl.load(matrix + place, mask=(i < d_out)[:, None] & (j < d_in)[None, :], other=0).to(tl.float32)


@triton.jit
def write(matrix, i, j, d_out, d_in, value):
    """The inverse of `read`, rounding to nearest."""
    place = i.to(tl.int64)[:, None] * d_in + j[None, :]
    value = value.to(matrix.dtype.element_ty)
    tl.store(matrix + place, value, mask=(i < d_out)[:, None] & (j < d_in)[None, :])


@triton.jit
def doubled(start, rank):
    """A chunk of the inner dimension of [P, Q]·[U; V], each of rank r: whether it is in P and U, and which of the r."""
    k = start + tl.arange(0, CHUNK)
    return k < rank, tl.where(k < rank, k, k - rank)


@triton.jit
def difference(A, B, A_start, B_start, i, j, d_out, d_in, rank, start_rank):
    """A tile of BA − B₀A₀ = [B − B₀, B₀]·[A; A − A₀], as `ops.difference` has it. start_rank: r, or 0 for W₀."""
    tile = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, 2 * rank, CHUNK):
        first, k = doubled(start, rank)
        old = read(B_start, i, k, d_out, start_rank)
        left = tl.where(first[None, :], read(B, i, k, d_out, rank) - old, old)
        right = read(A, k, j, rank, d_in) - read(A_start, tl.where(first, start_rank, k), j, start_rank, d_in)
        tile += tl.dot(left, right, input_precision=PRECISION)
    return tile
