"""Triton kernels of the hot operations on dense importance: one launch for all matrices of a model, not one for each.

    if kernels.available(device):
        kernels.accumulate_(omegas, steps, scales, counted, seed)  # Eq. 12, one or several optimizer steps
        kernels.consolidate_(omegas, As, Bs, starts, scales, xi, encoding)  # Eq. 13, with norms
        kernels.penalties_with_gradients(importances, As, Bs, anchors, scales)  # Eq. 14 and both gradients

Each list has one entry a matrix, in the same order. Shapes and ranks may differ; the device and the encoding may not.
ω and Ω are contiguous and float32 or bfloat16; for the penalty also `encodings.Eight`, which consolidation can write.

Factors are taken as they are and not as pairs: what a pair stands for (`ops.difference`, `ops.effective_gradient`) is
formed in registers, where making the pair would take a dozen small launches a matrix. They are read in float32, and
copied to it where they are in anything else; sums are in float32. Nothing waits for the device: shapes and addresses go
there anew with each call, in one small pinned copy, so gradients may lie elsewhere each step.

`blocks`: (rows, columns) of a tile, powers of two of at least 16; by default what the autotuner finds fastest in the
first call.

Triton comes with PyTorch for CUDA on Linux. It is imported with the first kernel that is asked for, so this package can
be imported where there is none.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hlora.encodings import Encoded
    from hlora.kernels.accumulate import accumulate_
    from hlora.kernels.consolidate import consolidate_
    from hlora.kernels.penalties import penalties_with_gradients

__all__ = ["Consolidated", "Step", "accumulate_", "available", "consolidate_", "penalties_with_gradients"]


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


@cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on the device: an NVIDIA GPU from Ampere on, with Triton installed.

    The environment's HLORA_KERNELS=0 says no: everything is streamed then.
    """
    if os.environ.get("HLORA_KERNELS") == "0":
        return False
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def __getattr__(name: str) -> Any:
    homes = {"accumulate_": "accumulate", "consolidate_": "consolidate", "penalties_with_gradients": "penalties"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
