"""The examples of a batch and what one token weighs in its loss, seen while the model runs forward and backward.

Squared gradients are of one example at a time, and of its summed loss. The loss of a batch is a mean, over a number of
tokens that differs with padding, gradient accumulation and the number of processes, and that a gradient scaler
multiplies. So the weight of one token is read from the gradient that reaches the model's own loss, and divided out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Batch:
    """One forward pass of a model in training."""

    predicted: Tensor | None
    """Number of tokens with a label, a scalar; None where the model was given no labels."""
    divisor: Tensor | int | None
    """What the model divides the sum of its tokens' losses by."""
    lengths: list[int] | None
    """Tokens of each sequence where rows are packed ones, in order of rows; None where each row is one sequence."""
    token_weight: Tensor | None = None
    """∂ loss / ∂ (loss of one token), a scalar; None until the backward pass gets there, and without labels."""
    seen: set[str] = field(default_factory=set)
    """Names of the matrices whose gradient has come."""

    def of_examples(self, tensor: Tensor) -> Tensor:  # (rows, T, d) → (examples, longest, d)
        """The tensor with one example in each row, padded with zeros, which count nothing."""
        if self.lengths is None:
            return tensor
        return nn.utils.rnn.pad_sequence(tensor.flatten(0, 1).split(self.lengths), batch_first=True)


@contextmanager
def batches(model: nn.Module, use: Callable[[Batch], None]) -> Iterator[None]:
    """Calls use(batch) at each forward pass of `model` that builds a graph.

    An example is a row of the batch. Where `position_ids` begin anew inside a row, as packing without padding has
    them, it is a stretch of the row between two beginnings. The model has to be called itself, not a part of it.
    """
    begun: list[Batch] = []

    def before(module: nn.Module, inputs: Any, given: dict[str, Any]) -> None:
        begun.clear()
        if module is model and torch.is_grad_enabled():  # not a copy of the model, which has copies of the hooks
            begun.append(batch_of(given))
            use(begun[0])

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        _watch_loss(begun, output)

    handles = [  # neither is for a compiled graph
        model.register_forward_pre_hook(torch.compiler.disable(before), with_kwargs=True),
        model.register_forward_hook(torch.compiler.disable(after)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batch_of(given: dict[str, Any]) -> Batch:
    """The batch of a forward pass by its named arguments, as Transformers and TRL call their models."""
    labels = given.get("shift_labels")
    if labels is None and given.get("labels") is not None:
        labels = given["labels"][..., 1:]
    predicted = None if labels is None else (labels != -100).sum()
    divisor = given.get("num_items_in_batch")
    tokens, positions = given.get("input_ids"), given.get("position_ids")
    lengths = None
    if positions is not None and tokens is not None and positions.shape == tokens.shape:
        lengths = _lengths(positions)
    return Batch(predicted, predicted if divisor is None else divisor, lengths)


def _lengths(position_ids: Tensor) -> list[int] | None:  # (rows, T)
    """Tokens of each sequence of packed rows; None where each row is one sequence."""
    following = nn.functional.pad(position_ids[:, 1:], (0, 1))
    starts = (position_ids == 0) & (following == 1)  # padding has the position 0 many times over
    starts[:, 0] = True
    if int(starts.sum()) == len(starts):  # the one number that is waited for, and only where position_ids are given
        return None
    at = [*starts.flatten().nonzero().flatten().tolist(), starts.numel()]
    return [end - start for start, end in pairwise(at)]


def _watch_loss(begun: list[Batch], output: Any) -> None:
    """Learn the weight of a token when the backward pass starts: from log-probabilities by token, or the mean loss."""
    if not begun or begun[0].predicted is None:
        return
    batch = begun[0]
    likelihoods, loss = getattr(output, "log_probs", None), getattr(output, "loss", None)

    def by_token(gradient: Tensor) -> None:
        batch.token_weight = gradient.abs().amax()

    def by_mean(gradient: Tensor) -> None:
        batch.token_weight = gradient.abs() / torch.as_tensor(batch.divisor, device=gradient.device)

    if isinstance(likelihoods, Tensor) and likelihoods.requires_grad:
        likelihoods.register_hook(by_token)
    elif isinstance(loss, Tensor) and loss.requires_grad:
        loss.register_hook(by_mean)
