"""Dense recording and penalty over a whole matrix, compiled by PyTorch: on an accelerator, in place of blocks of rows.

Hundreds of blocks would be as many kernel launches; a compiled matrix takes a few. A CPU streams, as its cache holds a
block. Everything streams once compiling has failed on a device type.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hlora.system.errors import first_line

logger = logging.getLogger("hlora")

_STREAMED: tuple[str, ...] = ("cpu", "meta")  # device types that stream dense matrices; others compile
_LONGEST = 32  # maximum terms (2r) of a compiled sum; 64 took 74 s to compile on a busy CPU core


def over_whole_matrix(compute: Callable[..., Any], matrix: Tensor, left: Tensor, *factors: Tensor) -> Any:
    """compute(matrix, left, *factors), compiled; None if the matrix has to be streamed.

    Args:
        compute: `accumulate_` or `products`.
        matrix: (d_out, d_in), dense.
        left: (d_out, k).
        factors: The other low-rank factors.
    """
    global _STREAMED
    kind = matrix.device.type
    if kind in _STREAMED or left.shape[1] > _LONGEST:
        return None
    try:
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return _compiled(compute)(matrix, left, *factors)
    except Exception as error:  # no compiler, an old driver, no memory: many types, one meaning
        _STREAMED = (*_STREAMED, kind)
        logger.warning("dense importance is computed in blocks on %s, with more launches: %s", kind, first_line(error))
        return None


@cache
def _compiled(compute: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(compute, dynamic=True, fullgraph=True)  # one graph for all shapes with the same rank


def accumulate_(omega: Tensor, P: Tensor, Q: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """ω −= (PQ) ⊙ (UV), with one read and one write of ω."""
    return omega.sub_(_short_sums(P, Q) * _short_sums(U, V))


def products(importance: Tensor, P: Tensor, Q: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:  # (d_out, 2r), (r, d_in)
    """(Ω⊙D) Qᵀ and Bᵀ(Ω⊙D), D = PQ, as one pointwise pass and two products."""
    weighted = _short_sums(P, Q).mul_(importance)
    return weighted @ Q.T, B.T @ weighted


def _short_sums(left: Tensor, right: Tensor) -> Tensor:
    """left @ right as sums over k, which a compiler fuses into the pass around them."""
    total = left[:, :1] * right[:1]
    for k in range(1, left.shape[1]):
        total = total + left[:, k, None] * right[k]
    return total
