"""The adapter at the start of a recording, and how far it has moved since."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hlora.model.adapters import AdaptedMatrix
from hlora.numerics import ops
from hlora.numerics.types import Factors
from hlora.parallel.dtensor import full_tensor


class Movement:
    """Copies of every matrix's factors at the start of a recording.

    Args:
        matrices: The recorded matrices.
    """

    def __init__(self, matrices: Sequence[AdaptedMatrix]) -> None:
        self.matrices = list(matrices)
        self._base_squares: dict[str, float] = {}  # ‖W₀‖² by name, computed on first use
        self.begin()

    def begin(self) -> None:
        """Restart from the adapter as it is now."""
        self.start: dict[str, Factors] = {
            m.name: (full_tensor(m.A.detach()).clone(), full_tensor(m.B.detach()).clone()) for m in self.matrices
        }

    def follow(self) -> None:
        """Move the copies to the devices of the matrices."""
        for matrix in self.matrices:
            A, B = self.start[matrix.name]
            self.start[matrix.name] = A.to(matrix.A.device), B.to(matrix.A.device)

    def share(self) -> float:
        """Norm of the movement of all matrices, as a share of the norm of their base weights."""
        moved: Tensor = torch.zeros((), device=self.matrices[0].A.device)
        for matrix in self.matrices:
            left, right = ops.difference(
                full_tensor(matrix.A), full_tensor(matrix.B), self.start[matrix.name], scale=matrix.scale
            )
            moved += ((left.T @ left) * (right @ right.T)).sum().to(moved.device)
            if matrix.name not in self._base_squares:
                self._base_squares[matrix.name] = matrix.base_square()
        return (max(float(moved), 0.0) / sum(self._base_squares.values())) ** 0.5
