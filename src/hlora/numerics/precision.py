"""Full precision inside a user's torch.autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_autocast(compute: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Computes in the precision of its arguments inside torch.autocast too, where products would be in half precision.

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
