"""Gradient clipping, moved behind hlora's callbacks.

Trainer clips gradients before its first callback event, yet ω needs them unclipped and the penalty's gradient
has to be clipped with the rest. So a callback takes the clipping over: it sets `max_grad_norm` to 0 for the run
and clips by the same limit in the optimizer's own pre-step hook. Order of one step:

    backward … → a gradient scaler unscales → recorder captures → penalty adds its gradient → clip → optimizer steps
    → recorder integrates
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import TrainingArguments


def clip_after_callbacks(args: TrainingArguments, optimizer: Any) -> None:
    """Take the clipping over from Trainer, into a pre-step hook that runs after all hooks registered so far.

    Called by each callback in turn: the hook moves to the end. The limit stays with `args`, which an interrupted
    run leaves at 0 and a next trainer may be built from.
    """
    optimizer = unwrapped_optimizer(optimizer)
    limit = args.max_grad_norm or getattr(args, "_hlora_max_grad_norm", 0.0)
    _remove_clip(optimizer)

    def clip(optimizer: Optimizer, hook_args: Any, hook_kwargs: Any) -> None:
        if limit > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, limit)

    optimizer._hlora_clip = optimizer.register_step_pre_hook(clip)
    args._hlora_max_grad_norm = limit  # type: ignore[attr-defined]
    args.max_grad_norm = 0.0


def clip_as_before(args: TrainingArguments, optimizer: Any) -> None:
    _remove_clip(unwrapped_optimizer(optimizer))
    if hasattr(args, "_hlora_max_grad_norm"):
        args.max_grad_norm = args._hlora_max_grad_norm
        del args._hlora_max_grad_norm


def _remove_clip(optimizer: Any) -> None:
    if hasattr(optimizer, "_hlora_clip"):
        optimizer._hlora_clip.remove()
        del optimizer._hlora_clip


def unscale(optimizer: Any) -> None:
    """Divide a gradient scaler's factor out of the gradients, as Trainer's own clipping would have done before."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None:
        with suppress(RuntimeError):  # another callback, or Trainer, has done it in this step
            scaler.unscale_(unwrapped_optimizer(optimizer))


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The optimizer that Accelerate wraps, whose hooks run in the real step."""
    return getattr(optimizer, "optimizer", optimizer)
