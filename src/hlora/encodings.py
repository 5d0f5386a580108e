"""How importance is kept: dense in float32 or bfloat16, or factored into row and column sums.

A dense importance is a plain tensor. A factored one is two vectors, as Adafactor keeps second moments
(Shazeer & Stern 2018): Ω ≈ row ⊗ column / total, which has exactly the row and column sums of the dense one.
Bytes for LLaMA-3.2-3B q_proj and v_proj (28 layers, 3072×3072 and 1024×3072): float32 1.31 GiB, factored 1.1 MB.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ENCODINGS = ("float32", "bfloat16", "factored")


class Factored(NamedTuple):
    """Row sums and column sums of a (d_out, d_in) matrix; stands for row ⊗ column / total."""

    row: Tensor  # (d_out,)
    column: Tensor  # (d_in,)

    def dense(self) -> Tensor:  # (d_out, d_in)
        row, column = self.scaled()
        return torch.outer(row, column)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Vectors u, v with u ⊗ v = row ⊗ column / total; zeros when the total is zero."""
        # The mean of the two sums, which agree unless negatives were clamped: a product of them underflows at 1e-23.
        whole = total(self)
        return self.row, torch.where(whole == 0, torch.zeros_like(self.column), self.column / whole)


Encoded = Tensor | Factored


def zeros(encoding: str, d_out: int, d_in: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoded:
    """An all-zero (d_out, d_in) matrix in the encoding. Raises ValueError for an unknown encoding.

    dtype: of the sums of a factored one.
    """
    if encoding == "factored":
        return Factored(*(torch.zeros(size, dtype=dtype, device=device) for size in (d_out, d_in)))
    if encoding in ("float32", "bfloat16"):
        return torch.zeros(d_out, d_in, dtype=getattr(torch, encoding), device=device)
    raise ValueError(f"encoding: expected one of {', '.join(ENCODINGS)}, got {encoding!r}")


def add(a: Encoded, b: Encoded) -> Encoded:
    """Sum of two matrices in the same encoding; for factored ones the sums of their row and column sums."""
    if isinstance(a, Factored) and isinstance(b, Factored):
        return Factored(a.row + b.row, a.column + b.column)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return (a.float() + b.float()).to(a.dtype)


def norm(matrix: Encoded) -> Tensor:
    """Frobenius norm ‖Ω‖₂ over all elements, a float32 (or wider) scalar."""
    if isinstance(matrix, Factored):
        row, column = matrix.scaled()
        return torch.linalg.vector_norm(row) * torch.linalg.vector_norm(column)
    wide = torch.promote_types(matrix.dtype, torch.float32)
    return torch.linalg.vector_norm(matrix, dtype=wide)


def total(matrix: Encoded) -> Tensor:
    """Sum of all elements, a float32 (or wider) scalar."""
    if isinstance(matrix, Factored):
        return (matrix.row.sum() + matrix.column.sum()) / 2
    return matrix.sum(dtype=torch.promote_types(matrix.dtype, torch.float32))


def shape(matrix: Encoded) -> tuple[int, int]:
    """(d_out, d_in) of the matrix that it stands for."""
    if isinstance(matrix, Factored):
        return matrix.row.numel(), matrix.column.numel()
    return matrix.shape[0], matrix.shape[1]


def nbytes(matrix: Encoded) -> int:
    """Bytes that the matrix takes in memory and on disk."""
    return sum(part.numel() * part.element_size() for part in parts(matrix).values())


def to_device(matrix: Encoded, device: torch.device) -> Encoded:
    if isinstance(matrix, Factored):
        return Factored(matrix.row.to(device), matrix.column.to(device))
    return matrix.to(device)


def parts(matrix: Encoded) -> dict[str, Tensor]:
    """The tensors of a matrix by their suffix in a safetensors file; the inverse of `from_parts`."""
    if isinstance(matrix, Factored):
        return {"row": matrix.row, "column": matrix.column}
    return {"dense": matrix}


def from_parts(tensors: dict[str, Tensor]) -> Encoded:
    return tensors["dense"] if "dense" in tensors else Factored(tensors["row"], tensors["column"])


def round_stochastically_(target: Tensor, value: Tensor) -> None:
    """Write float32 `value` into bfloat16 `target`, rounding up with the probability of the remainder.

    Unbiased, so thousands of additions far below one bfloat16 unit (2⁻⁸ of ω) are not lost, as they
    would be by rounding to nearest.
    """
    bits = value.float().contiguous().view(torch.int32)
    # Four 16-bit draws from one of 64 bits: 13 M elements take 21 ms on 2 cores, with a draw for each 62 ms.
    draws = torch.empty(-(-bits.numel() // 4), dtype=torch.int64, device=bits.device).random_(-(1 << 63), None)
    noise = draws.view(torch.int16)[: bits.numel()].view(bits.shape).to(torch.int32).bitwise_and_(0xFFFF)
    target.view(torch.int16).copy_(noise.add_(bits).bitwise_right_shift_(16))
