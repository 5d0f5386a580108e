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

    shape: tuple[int, int] | None
    """Rows of the batch and tokens of a row; None where the model was given no token ids by name."""
    labelled: Tensor | None  # (rows, T) of 0 and 1
    """Where a token is predicted that has a label; None where the model was given no labels."""
    divisor: Tensor | int | None
    """What the model divides the sum of its tokens' losses by."""
    lengths: list[int] | None
    """Tokens of each sequence where rows are packed ones, in order of rows; None where each row is one sequence."""
    token_weight: Tensor | None = None
    """∂ loss / ∂ (loss of one token), a scalar; None until the backward pass gets there, and without labels."""
    seen: set[str] = field(default_factory=set)
    """Names of the matrices whose gradient has come."""
    taken: range | None = None
    """Numbers of the examples that are recorded, modulo how many there are; None until the first gradient comes."""

    def take(self, rows: int, share: float, draw: tuple[float, float]) -> None:
        """Choose the examples to record: a share of them, at least one, from a random place on.

        Args:
            rows: Rows of the batch.
            share: Of the examples, on average over draws.
            draw: Two numbers from 0 to 1.
        """
        count = rows if self.lengths is None else len(self.lengths)
        chosen = min(count, max(1, int(count * share + draw[0])))
        start = int(count * draw[1]) if chosen < count else 0
        self.taken = range(start, start + chosen)

    def of_examples(self, tensor: Tensor) -> Tensor:  # (rows, T, d) → (examples taken, longest, d)
        """The tensor with one example in each row, padded with zeros, which count nothing."""
        assert self.taken is not None
        if self.lengths is None:
            return _rows(tensor, self.taken)
        examples = tensor.flatten(0, 1).split(self.lengths)
        return nn.utils.rnn.pad_sequence([examples[number % len(examples)] for number in self.taken], batch_first=True)

    def predicted_taken(self) -> Tensor | None:  # a scalar
        """Number of tokens with a label in the examples that are recorded."""
        return None if self.labelled is None else self.of_examples(self.labelled[..., None]).sum()


def _rows(tensor: Tensor, taken: range) -> Tensor:
    """Rows of the tensor by number, beginning anew after the last; a view where they are next to each other."""
    if taken.stop <= len(tensor):
        return tensor[taken.start : taken.stop]
    return torch.cat([tensor[taken.start :], tensor[: taken.stop - len(tensor)]])


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
            begun.append(batch_of(given, module))
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


def batch_of(given: dict[str, Any], model: nn.Module | None = None) -> Batch:
    """The batch of a forward pass of `model` by its named arguments, as Transformers and TRL call their models."""
    labels = given.get("shift_labels")
    if labels is None:
        labels = _labels(given.get("labels"), model)
    labelled = None if labels is None else (labels != -100).long()
    divisor = given.get("num_items_in_batch")
    if divisor is None and labelled is not None:
        divisor = labelled.sum()
    tokens, positions = given.get("input_ids"), given.get("position_ids")
    lengths = None
    if positions is not None and tokens is not None and positions.shape == tokens.shape:
        lengths = _lengths(positions)
    shape = None if tokens is None else (tokens[..., 0].numel(), tokens.shape[-1])
    return Batch(shape, labelled, divisor, lengths)


def _labels(labels: Tensor | None, model: Any) -> Tensor | None:  # (rows, T)
    """Labels in the place that predicts them; None where they are not of tokens, such as a class of each row."""
    if labels is None or labels.dim() < 2 or labels.is_floating_point():
        return None
    kind = getattr(model, "loss_type", None)  # Transformers', of the model's class
    in_place = kind in ("ForMaskedLM", "ForTokenClassification")
    if in_place or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return labels
    return nn.functional.pad(labels[..., 1:], (0, 1), value=-100)


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
    if not begun or begun[0].labelled is None:
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
