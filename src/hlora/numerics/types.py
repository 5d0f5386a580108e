"""Inputs and results of recording and penalty."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hlora.numerics.encodings import Encoded

Pair = tuple[Tensor, Tensor]  # (d_out, k), (k, d_in)
Factors = tuple[Tensor, Tensor]  # A (r, d_in), B (d_out, r)


class Step(NamedTuple):
    """One optimizer step of one matrix: factors before and after, gradients before, and the learning rate."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    grad_A: Tensor  # (r, d_in)
    grad_B: Tensor  # (d_out, r)
    lr: float
    A_next: Tensor  # (r, d_in)
    B_next: Tensor  # (d_out, r)


class Consolidated(NamedTuple):
    """Ω of one matrix, with what the pass that computed it measured."""

    importance: Encoded
    negative: float
    """Share of the elements of ω that were negative and count as 0."""
    undo_cost: float
    """Σ Ω Δ², what undoing the general phase costs in the penalty of Eq. 14."""
    norm: float
    """‖Ω‖₂"""
