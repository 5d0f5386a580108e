"""Float32 or wider: for tensors in half precision, and inside a user's torch.autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own dtype if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider; the same one if it is that already."""
    return tensor.to(wide_dtype(tensor))


def outside_autocast(compute: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: inside torch.autocast too, compute in the precision of the arguments and not in half precision.

    In float16 a factored penalty was 0.06 % off at Ω ~ 1, 72 % at Ω ~ 1e-4, and NaN at Ω ~ 1e4.
    """

    @wraps(compute)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda", "mps", "xpu"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return compute(*args, **kwargs)

    return run
