"""How importance is kept: dense in float32, a plain tensor, or factored into row and column sums.

A factored importance is two vectors, as Adafactor keeps second moments (Shazeer & Stern 2018):
Ω ≈ row ⊗ column / total, which has exactly the row and column sums of the dense one.
Bytes for LLaMA-3.2-3B q_proj and v_proj (28 layers, 3072×3072 and 1024×3072): float32 1.31 GiB, factored 1.1 MB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ENCODINGS = ("float32", "factored")
PARTS = ("dense", "row", "column")  # suffixes of their tensors in a safetensors file

_BLOCK = 1 << 18  # elements of one block. 3072², r 8, 2 cores: recording 13 ms (2¹⁶ 25, 2²⁰ 34), penalty 23 (35, 23)


class Factored(NamedTuple):
    """Row sums and column sums of a (d_out, d_in) matrix; stands for row ⊗ column / total."""

    row: Tensor  # (d_out,), or of a stack of matrices (n, d_out)
    column: Tensor  # (d_in,), (n, d_in)

    def dense(self) -> Tensor:  # (d_out, d_in)
        row, column = self.scaled()
        return row[..., None] * column[..., None, :]

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Vectors u, v with u ⊗ v = row ⊗ column / total; zeros when the total is zero."""
        # The mean of the two sums, which agree unless negatives were clamped: a product of them underflows at 1e-23.
        whole = total(self)[..., None]
        return self.row, torch.where(whole == 0, torch.zeros_like(self.column), self.column / whole)


Encoded = Tensor | Factored


def zeros(encoding: str, d_out: int, d_in: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoded:
    """An all-zero (d_out, d_in) matrix in the encoding. Raises ValueError for an unknown encoding."""
    if encoding == "factored":
        return Factored(*(torch.zeros(size, dtype=dtype, device=device) for size in (d_out, d_in)))
    if encoding == "float32":
        return torch.zeros(d_out, d_in, dtype=dtype, device=device)
    raise ValueError(f"encoding: expected one of {', '.join(ENCODINGS)}, got {encoding!r}")


def row_blocks(d_out: int, d_in: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices of rows, each of at most 2¹⁸ elements or one row; eight times that on an accelerator: fewer launches."""
    elements = _BLOCK if device is None or device.type == "cpu" else 8 * _BLOCK
    height = max(1, elements // max(1, d_in))
    for start in range(0, d_out, height):
        yield slice(start, min(start + height, d_out))


def add(a: Encoded, b: Encoded) -> Encoded:
    """Sum of two matrices in the same encoding; for factored ones the sums of their row and column sums."""
    if isinstance(a, Factored) and isinstance(b, Factored):
        return Factored(a.row + b.row, a.column + b.column)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return a + b


def norm(matrix: Encoded) -> Tensor:
    """Frobenius norm ‖Ω‖₂ over all elements, a scalar."""
    if isinstance(matrix, Factored):
        row, column = matrix.scaled()
        return torch.linalg.vector_norm(row) * torch.linalg.vector_norm(column)
    blocks = [torch.linalg.vector_norm(matrix[rows]) for rows in row_blocks(*shape(matrix))]
    return torch.linalg.vector_norm(torch.stack(blocks))  # in float32 a sum of all squares at once is less precise


def total(matrix: Encoded) -> Tensor:
    """Sum of all elements, a scalar."""
    if isinstance(matrix, Factored):
        return (matrix.row.sum(-1) + matrix.column.sum(-1)) / 2
    return matrix.sum()


def shape(matrix: Encoded) -> tuple[int, int]:
    """(d_out, d_in) of the matrix that it stands for."""
    if isinstance(matrix, Factored):
        return matrix.row.numel(), matrix.column.numel()
    return matrix.shape[0], matrix.shape[1]


def nbytes(matrix: Encoded) -> int:
    """Bytes that the matrix takes in memory and on disk."""
    return sum(part.numel() * part.element_size() for part in parts(matrix).values())


def to_device(matrix: Encoded, device: torch.device) -> Encoded:
    return from_parts({name: part.to(device) for name, part in parts(matrix).items()})


def parts(matrix: Encoded) -> dict[str, Tensor]:
    """The tensors of a matrix by their suffix in a safetensors file; the inverse of `from_parts`."""
    return {"dense": matrix} if isinstance(matrix, Tensor) else matrix._asdict()


def from_parts(tensors: dict[str, Tensor]) -> Encoded:
    return tensors["dense"] if "dense" in tensors else Factored(**tensors)


def check(tensors: dict[str, Tensor], encoding: str, d_out: int, d_in: int, name: str = "omega") -> None:
    """Whether `tensors` are the parts of a (d_out, d_in) matrix in the encoding.

    Raises ValueError that names the first part which is missing, of another dtype or shape, or holds a number that is
    negative or not finite; float64 is as good as float32.
    """
    for part, like in parts(zeros(encoding, d_out, d_in, torch.device("meta"))).items():
        got = tensors.get(part)
        if got is None or got.shape != like.shape or got.dtype not in (torch.float32, torch.float64):
            found = "nothing" if got is None else f"{got.dtype} of {tuple(got.shape)}"
            raise ValueError(f"{name}.{part}: {encoding} has {like.dtype} of {tuple(like.shape)} there, got {found}")
        if got.numel():
            least, largest = (float(bound) for bound in got.aminmax())
            if not 0 <= least <= largest < math.inf:  # NaN is neither
                raise ValueError(f"{name}.{part}: importance is 0 or more and finite, got {least:g} to {largest:g}")
