"""Matrices of several ragged shapes and ranks at once, and all else that the tests of the kernels share.

Where there is no GPU the kernels run in Triton's interpreter, on tiles of 16 × 16; on one compiled, on the autotuner's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA on Linux, and is not installed here")

from hlora.kernels import Step  # noqa: E402

ON_GPU = torch.cuda.is_available()
if not ON_GPU and type(triton.language.sum).__name__ != "InterpretedFunction":
    raise RuntimeError(
        "the kernels' tests need TRITON_INTERPRET=1 before anything imports Triton, as Transformers does: "
        "tests/conftest.py sets it where there is no GPU"
    )
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BLOCKS = None if ON_GPU else (16, 16)
TILE = 128 if ON_GPU else 16
SHAPES = [  # d_out, d_in, r: none a multiple of the tile in both, but the one that is in all three
    (2 * TILE + 5, 3 * TILE + 5, 3),
    (1, 1, 1),
    (TILE, TILE, 16),
    (5, TILE + 4, 64),
    (TILE + 12, 20, 12),
]
EVEN_ROWS = [(TILE + 3, 2 * TILE, 8), (5, 16, 8)]  # of 16 numbers: what the compiler may load 16 bytes of at once
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}  # of float32, as in test_ops.py


class Memory:
    """Tensors in one piece of memory with NaN between them: what reads or writes beyond its tensor shows."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.gap = TILE * (3 * TILE + 5)  # elements: what one tile can reach
        self.whole = torch.full((90 * self.gap,), torch.nan, device=DEVICE)
        self.used = self.gap
        self.free = torch.ones_like(self.whole, dtype=torch.bool)

    def keep(self, values: Tensor) -> Tensor:
        """A copy in float32, in here."""
        place = slice(self.used, self.used + values.numel())
        self.used = -(-(place.stop + self.gap) // 16) * 16
        self.free[place] = False
        return self.whole[place].view(values.shape).copy_(values)

    def normal(self, *shape: int) -> Tensor:
        return self.keep(torch.randn(*shape, generator=self.generator))

    def step(self, d_out: int, d_in: int, rank: int) -> Step:
        A, grad_A, A_next = (self.normal(rank, d_in) for _ in range(3))
        B, grad_B, B_next = (self.normal(d_out, rank) for _ in range(3))
        lr = float(torch.rand(1, generator=self.generator))
        return Step(A, B, grad_A, grad_B, lr, A_next, B_next)

    def assert_clean(self) -> None:
        assert self.whole[self.free].isnan().all(), "written outside of the tensors"


def wide(step: Step) -> Step:
    return Step(*(part.double() if isinstance(part, Tensor) else part for part in step))


def scales(count: int) -> list[float]:
    return [1.7 - 0.2 * number for number in range(count)]
