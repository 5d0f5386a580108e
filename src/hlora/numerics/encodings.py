"""How importance is kept: dense, a plain float32 tensor, or factored into row and column sums.

Factored importance is two vectors, as in Adafactor (Shazeer & Stern 2018): Ω ≈ row ⊗ column / total. Its row and
column sums are exactly those of the dense importance.
Bytes for LLaMA-3.2-3B q_proj and v_proj (28 layers, 3072×3072 and 1024×3072): float32 1.31 GiB, factored 1.1 MB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hlora.system.choices import EncodingName

ENCODINGS: tuple[EncodingName, ...] = ("float32", "factored")
PARTS = ("dense", "row", "column")  # suffixes of their tensors in a safetensors file

_BLOCK = 1 << 18  # elements in a block. 3072², r 8, 2 cores: recording 13 ms (2¹⁶ 25, 2²⁰ 34), penalty 23 (35, 23)


class Factored(NamedTuple):
    """Row and column sums of a (d_out, d_in) matrix, which represent row ⊗ column / total."""

    row: Tensor  # (d_out,), or (n, d_out) for a stack of matrices
    column: Tensor  # (d_in,), or (n, d_in)

    def dense(self) -> Tensor:  # (d_out, d_in)
        """The matrix that it represents."""
        row, column = self.scaled()
        return row[..., None] * column[..., None, :]

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Vectors u, v with u ⊗ v = row ⊗ column / total; zeros if the total is zero."""
        # total is the mean of both sums, which agree unless negatives were clamped. Their product underflows at 1e-23.
        whole = total(self)[..., None]
        return self.row, torch.where(whole == 0, torch.zeros_like(self.column), self.column / whole)


Encoded = Tensor | Factored


def zeros(encoding: str, d_out: int, d_in: int, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoded:
    """An all-zero (d_out, d_in) matrix in the encoding.

    Raises:
        ValueError: The encoding is unknown.
    """
    if encoding == "factored":
        return Factored(*(torch.zeros(size, dtype=dtype, device=device) for size in (d_out, d_in)))
    if encoding == "float32":
        return torch.zeros(d_out, d_in, dtype=dtype, device=device)
    raise ValueError(f"encoding: expected one of {', '.join(ENCODINGS)}, got {encoding!r}")


def row_blocks(d_out: int, d_in: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices of rows of at most 2¹⁸ elements, or one row; eight times that on an accelerator, for fewer launches."""
    elements = _BLOCK if device is None or device.type == "cpu" else 8 * _BLOCK
    height = max(1, elements // max(1, d_in))
    for start in range(0, d_out, height):
        yield slice(start, min(start + height, d_out))


def add(a: Encoded, b: Encoded) -> Encoded:
    """Sum of two matrices in the same encoding. Factored: row and column sums are added."""
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
    return torch.linalg.vector_norm(torch.stack(blocks))  # more precise in float32 than one sum of all squares


def total(matrix: Encoded) -> Tensor:
    """Sum of all elements, a scalar."""
    if isinstance(matrix, Factored):
        return (matrix.row.sum(-1) + matrix.column.sum(-1)) / 2
    return matrix.sum()


def shape(matrix: Encoded) -> tuple[int, int]:
    """(d_out, d_in) of the matrix."""
    if isinstance(matrix, Factored):
        return matrix.row.numel(), matrix.column.numel()
    return matrix.shape[0], matrix.shape[1]


def nbytes(matrix: Encoded) -> int:
    """Bytes that the matrix takes in memory and on disk."""
    return sum(part.numel() * part.element_size() for part in parts(matrix).values())


def to_device(matrix: Encoded, device: torch.device) -> Encoded:
    """The matrix on a device."""
    return from_parts({name: part.to(device) for name, part in parts(matrix).items()})


def parts(matrix: Encoded) -> dict[str, Tensor]:
    """The tensors of a matrix by their suffix in a safetensors file; the inverse of `from_parts`."""
    return {"dense": matrix} if isinstance(matrix, Tensor) else matrix._asdict()


def from_parts(tensors: dict[str, Tensor]) -> Encoded:
    """The matrix of `parts`."""
    return tensors["dense"] if "dense" in tensors else Factored(**tensors)


def check(tensors: dict[str, Tensor], encoding: str, shape: tuple[int, int], *, name: str = "omega") -> None:
    """Check that `tensors` are the parts of a matrix in the encoding, in float32 or float64.

    Args:
        tensors: The parts by name, as `parts` returns them.
        encoding: float32 or factored.
        shape: (d_out, d_in) of the matrix.
        name: Of the matrix, for messages.

    Raises:
        ValueError: A part is missing, has another dtype or shape, or holds a number that is negative or not finite.
    """
    for part, like in parts(zeros(encoding, *shape, device=torch.device("meta"))).items():
        got = tensors.get(part)
        if got is None or got.shape != like.shape or got.dtype not in (torch.float32, torch.float64):
            found = "nothing" if got is None else f"{got.dtype} of {tuple(got.shape)}"
            raise ValueError(f"{name}.{part}: {encoding} has {like.dtype} of {tuple(like.shape)} there, got {found}")
        if got.numel():
            least, largest = (float(bound) for bound in got.aminmax())
            if not 0 <= least <= largest < math.inf:  # also false for NaN
                raise ValueError(f"{name}.{part}: importance is 0 or more and finite, got {least:g} to {largest:g}")
