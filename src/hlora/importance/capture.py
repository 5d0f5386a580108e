"""Copies of factors and gradients before an optimizer step, for the path integral."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hlora.numerics.precision import wide_dtype

Snapshot = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[float]]  # A, B, gradients, learning rates


def copies_of(tensors: Sequence[Tensor], dtypes: list[torch.dtype] | None = None) -> list[Tensor]:
    """Copies of tensors, in the precisions `dtypes` if given."""
    dtypes = dtypes or [tensor.dtype for tensor in tensors]
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    if copies:  # one kernel launch, not one for each matrix
        torch._foreach_copy_(copies, [tensor.detach() for tensor in tensors])
    return copies


def gradient_copies(
    factors: Sequence[Tensor], gradients: Sequence[Tensor | None], pieces: Callable[[Sequence[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """Copies of the gradients in float32 or wider; zeros for a frozen or unused factor.

    Args:
        factors: The factors.
        gradients: Of each factor, or None.
        pieces: Maps sharded tensors to this process's pieces.
    """
    wide = [wide_dtype(factor) for factor in factors]
    there = [torch.zeros_like(f) if g is None else g for f, g in zip(factors, gradients, strict=True)]
    return copies_of(pieces(there), wide)


def on_device(device: torch.device, number: float | Tensor) -> float | Tensor:
    """A scalar tensor moved to the device; a plain number as it is."""
    return number.to(device) if isinstance(number, Tensor) else number
