"""How importance is kept: dense in float32, bfloat16 or int8, or factored into row and column sums.

float32 and bfloat16 are plain tensors. int8 keeps √Ω in blocks of a row with a scale each. A factored importance is two
vectors, as Adafactor keeps second moments (Shazeer & Stern 2018): Ω ≈ row ⊗ column / total, which has exactly the row
and column sums of the dense one.
Bytes for LLaMA-3.2-3B q_proj and v_proj (28 layers, 3072×3072 and 1024×3072): float32 1.31 GiB, int8 0.34 GiB,
factored 1.1 MB.

Nothing here makes a float32 copy of a whole matrix: what needs wide numbers goes through it in blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ENCODINGS = ("float32", "bfloat16", "int8", "factored")
PARTS = ("dense", "codes", "scale", "row", "column")  # suffixes of their tensors in a safetensors file

_BLOCK = 1 << 18  # elements of one block. 3072², r 8, 2 cores: recording 13 ms (2¹⁶ 25, 2²⁰ 34), penalty 23 (35, 23)
_SHARING = 128  # neighbours in a row that share one scale of int8


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


class Eight(NamedTuple):
    """Ω in 8 bits: √Ω_ij = codes_ij · scale_i,⌊j/128⌋, rounded to nearest. The last block of a row may be shorter.

    √Ω in place of Ω halves the decades that 255 steps have to span, and a block's largest element takes the last step:
    the heavy tail keeps its relative precision wherever it sits. Below (1/510)² of its block's largest an element is 0.
    """

    codes: Tensor  # uint8 (d_out, d_in)
    scale: Tensor  # float32 (d_out, ⌈d_in / 128⌉)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:  # (d_out, d_in)
        root = self.codes.to(dtype)
        for part, blocks in _sharing(root):
            part.mul_(self.scale[:, blocks, None])
        return root.square_()

    @classmethod
    def zeros(cls, d_out: int, d_in: int, device: torch.device) -> Eight:
        scale = torch.zeros(d_out, -(-d_in // _SHARING), device=device)
        return cls(torch.zeros(d_out, d_in, dtype=torch.uint8, device=device), scale)

    @classmethod
    def of(cls, values: Tensor) -> Eight:
        """The nearest to a nonnegative (d_out, d_in) tensor of float32 or wider; meant for a block of rows."""
        root = values.sqrt()
        scale = torch.cat([part.amax(2) for part, _ in _sharing(root)], 1).div_(255).float()
        for part, blocks in _sharing(root):
            part.div_(torch.where(scale == 0, 1.0, scale)[:, blocks, None])
        return cls(root.round_().to(torch.uint8), scale)


def _sharing(matrix: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Views (d_out, n, ≤ 128) of what shares a scale, with their columns of `scale`: the full blocks, then the rest."""
    full = matrix.shape[1] // _SHARING
    yield matrix[:, : full * _SHARING].unflatten(1, (full, _SHARING)), slice(0, full)
    if matrix.shape[1] % _SHARING:
        yield matrix[:, full * _SHARING :].unsqueeze(1), slice(full, None)


Dense = Tensor | Eight  # has blocks of rows
Encoded = Dense | Factored


def zeros(encoding: str, d_out: int, d_in: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoded:
    """An all-zero (d_out, d_in) matrix in the encoding. Raises ValueError for an unknown encoding.

    dtype: of the sums of a factored one.
    """
    if encoding == "factored":
        return Factored(*(torch.zeros(size, dtype=dtype, device=device) for size in (d_out, d_in)))
    if encoding == "int8":
        return Eight.zeros(d_out, d_in, device)
    if encoding in ("float32", "bfloat16"):
        return torch.zeros(d_out, d_in, dtype=getattr(torch, encoding), device=device)
    raise ValueError(f"encoding: expected one of {', '.join(ENCODINGS)}, got {encoding!r}")


def while_recording(encoding: str) -> str:
    """What ω is kept in until it becomes Ω: int8 has no sign, ω has, and takes bfloat16 (`round_stochastically_`)."""
    return "bfloat16" if encoding == "int8" else encoding


def encode(matrix: Tensor, encoding: str) -> Encoded:
    """A dense matrix in the encoding; for int8 nonnegative. For float32 the matrix itself, in its own precision."""
    if encoding == "float32":
        return matrix
    if encoding == "factored":
        return Factored(matrix.sum(1), matrix.sum(0))
    encoded = zeros(encoding, *shape(matrix), matrix.device)
    assert not isinstance(encoded, Factored)
    for rows in row_blocks(*shape(matrix)):
        write_(rows_of(encoded, rows), wide(matrix[rows]))
    return encoded


def row_blocks(d_out: int, d_in: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices of rows, each of at most 2¹⁸ elements or one row; eight times that on an accelerator: fewer launches."""
    elements = _BLOCK if device is None or device.type == "cpu" else 8 * _BLOCK
    height = max(1, elements // max(1, d_in))
    for start in range(0, d_out, height):
        yield slice(start, min(start + height, d_out))


def rows_of(matrix: Dense, rows: slice) -> Dense:
    """A block of rows, sharing memory."""
    return Eight(matrix.codes[rows], matrix.scale[rows]) if isinstance(matrix, Eight) else matrix[rows]


def wide(block: Dense, dtype: torch.dtype = torch.float32) -> Tensor:
    """A block of rows in `dtype` or wider; the block itself where it is that already."""
    if isinstance(block, Eight):
        return block.dense(dtype)
    return block.to(torch.promote_types(block.dtype, dtype))


def write_(block: Dense, values: Tensor) -> None:
    """Write `values` into a block of rows, rounded to nearest."""
    if isinstance(block, Eight):
        codes, scale = Eight.of(values)
        block.codes.copy_(codes)
        block.scale.copy_(scale)
    else:
        block.copy_(values)


def add(a: Encoded, b: Encoded) -> Encoded:
    """Sum of two matrices in the same encoding; for factored ones the sums of their row and column sums."""
    if isinstance(a, Factored) and isinstance(b, Factored):
        return Factored(a.row + b.row, a.column + b.column)
    if isinstance(a, Eight) and isinstance(b, Eight):
        result = Eight(torch.empty_like(a.codes), torch.empty_like(a.scale))
        for rows in row_blocks(*shape(a)):
            write_(rows_of(result, rows), wide(rows_of(a, rows)) + wide(rows_of(b, rows)))
        return result
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return a + b  # of bfloat16 in float32, rounded once


def norm(matrix: Encoded) -> Tensor:
    """Frobenius norm ‖Ω‖₂ over all elements, a float32 (or wider) scalar."""
    if isinstance(matrix, Factored):
        row, column = matrix.scaled()
        return torch.linalg.vector_norm(row) * torch.linalg.vector_norm(column)
    blocks = (wide(rows_of(matrix, rows)) for rows in row_blocks(*shape(matrix)))
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(block) for block in blocks]))


def total(matrix: Encoded) -> Tensor:
    """Sum of all elements, a float32 (or wider) scalar."""
    if isinstance(matrix, Factored):
        return (matrix.row.sum(-1) + matrix.column.sum(-1)) / 2
    return torch.stack([wide(rows_of(matrix, rows)).sum() for rows in row_blocks(*shape(matrix))]).sum()


def shape(matrix: Encoded) -> tuple[int, int]:
    """(d_out, d_in) of the matrix that it stands for."""
    if isinstance(matrix, Factored):
        return matrix.row.numel(), matrix.column.numel()
    dense = matrix.codes if isinstance(matrix, Eight) else matrix
    return dense.shape[0], dense.shape[1]


def nbytes(matrix: Encoded) -> int:
    """Bytes that the matrix takes in memory and on disk."""
    return sum(part.numel() * part.element_size() for part in parts(matrix).values())


def to_device(matrix: Encoded, device: torch.device) -> Encoded:
    return from_parts({name: part.to(device) for name, part in parts(matrix).items()})


def parts(matrix: Encoded) -> dict[str, Tensor]:
    """The tensors of a matrix by their suffix in a safetensors file; the inverse of `from_parts`."""
    return {"dense": matrix} if isinstance(matrix, Tensor) else matrix._asdict()


def from_parts(tensors: dict[str, Tensor]) -> Encoded:
    if "dense" in tensors:
        return tensors["dense"]
    return Eight(tensors["codes"], tensors["scale"]) if "codes" in tensors else Factored(**tensors)


def check(tensors: dict[str, Tensor], encoding: str, d_out: int, d_in: int, name: str = "omega") -> None:
    """Whether `tensors` are the parts of a (d_out, d_in) matrix in the encoding.

    Raises ValueError that names the first part which is missing, of another dtype or shape, or holds a number that is
    negative or not finite; float64 is as good as float32.
    """
    for part, like in parts(zeros(encoding, d_out, d_in, torch.device("meta"))).items():
        got = tensors.get(part)
        dtypes = (like.dtype, torch.float64) if like.dtype == torch.float32 else (like.dtype,)
        if got is None or got.shape != like.shape or got.dtype not in dtypes:
            found = "nothing" if got is None else f"{got.dtype} of {tuple(got.shape)}"
            raise ValueError(f"{name}.{part}: {encoding} has {like.dtype} of {tuple(like.shape)} there, got {found}")
        if got.numel():
            least, largest = (float(bound) for bound in got.aminmax())
            if not 0 <= least <= largest < math.inf:  # NaN is neither
                raise ValueError(f"{name}.{part}: importance is 0 or more and finite, got {least:g} to {largest:g}")


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
