"""What goes into the two hot operations, and what comes out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hlora.numerics.encodings import Encoded

Pair = tuple[Tensor, Tensor]  # (d_out, k), (k, d_in)
Factors = tuple[Tensor, Tensor]  # A (r, d_in), B (d_out, r)


class Step(NamedTuple):
    """One optimizer step of one matrix: its factors before and after, the gradients before, and the learning rate."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    grad_A: Tensor  # (r, d_in)
    grad_B: Tensor  # (d_out, r)
    lr: float
    A_next: Tensor  # (r, d_in)
    B_next: Tensor  # (d_out, r)


class Consolidated(NamedTuple):
    """Ω of one matrix, and what the pass that made it saw on its way."""

    importance: Encoded
    negative: float
    """Share of the elements of ω that were below zero, and are taken as 0."""
    undo_cost: float
    """Σ Ω Δ²: what the penalty of Eq. 14 says it costs to undo the general phase."""
    norm: float
    """‖Ω‖₂"""
