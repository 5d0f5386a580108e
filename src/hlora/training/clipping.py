"""Gradient clipping, moved behind hlora's callbacks.

Trainer clips gradients before its first callback event. But ω needs unclipped gradients, and the penalty's gradient
must be clipped together with the others. So a callback takes over: it sets `max_grad_norm` to 0 in each step, and
clips to the same limit in the optimizer's own pre-step hook. Order of one step:

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
    """Take clipping over from Trainer, in a pre-step hook that runs after all hooks registered so far.

    Each callback calls it in turn, which moves the hook to the end.
    """
    give_back_clipping(args)
    optimizer = unwrapped_optimizer(optimizer)
    limit = args.max_grad_norm or 0.0
    _remove_clip(optimizer)

    def clip(optimizer: Optimizer, hook_args: Any, hook_kwargs: Any) -> None:
        if limit > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, limit)

    optimizer._hlora_clip = optimizer.register_step_pre_hook(clip)


def take_clipping(args: TrainingArguments) -> None:
    """Keep Trainer from clipping in the step that begins.

    The limit is kept on `args`, from which the next trainer may be built: a step that is interrupted leaves it there.
    """
    if args.max_grad_norm:
        args._hlora_max_grad_norm = args.max_grad_norm  # type: ignore[attr-defined]
        args.max_grad_norm = 0.0


def give_back_clipping(args: TrainingArguments) -> None:
    """Restore `max_grad_norm`, so that checkpoints, trackers and the next trainer see what the user wrote."""
    if hasattr(args, "_hlora_max_grad_norm"):
        args.max_grad_norm = args._hlora_max_grad_norm
        del args._hlora_max_grad_norm


def clip_as_before(args: TrainingArguments, optimizer: Any) -> None:
    """Give the clipping back to Trainer."""
    _remove_clip(unwrapped_optimizer(optimizer))
    give_back_clipping(args)


def _remove_clip(optimizer: Any) -> None:
    if hasattr(optimizer, "_hlora_clip"):
        optimizer._hlora_clip.remove()
        del optimizer._hlora_clip


def unscale(optimizer: Any) -> None:
    """Divide the gradients by a gradient scaler's factor, as Trainer's own clipping would have done."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None:
        with suppress(RuntimeError):  # already done in this step, by another callback or Trainer
            scaler.unscale_(unwrapped_optimizer(optimizer))


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The optimizer that Accelerate wraps, whose hooks run in the real step."""
    return getattr(optimizer, "optimizer", optimizer)
