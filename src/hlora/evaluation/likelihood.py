"""Perplexity and bits per byte of a text, by sliding window; and how far two models' predictions on it are apart."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hlora.config.sections import EvaluationConfig
from hlora.data.packing import first_tokens
from hlora.data.tokens import text_start
from hlora.system.errors import DataError, TrainingError

PAIRED_BLOCK = 64  # tokens of one paired difference between two models

Reference = Callable[[Sequence[Tensor], Sequence[int]], list[Tensor]]
"""What another model predicts, such as the measured one with its adapter switched off. Takes sequences and counts, and
returns logits, as `scored_logits` does."""


@torch.no_grad()
def text_likelihood(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    settings: EvaluationConfig,
    *,
    references: Mapping[str, Reference] | None = None,
    on_scored: Callable[[float], None] = lambda tokens: None,
) -> dict[str, Any]:
    """Perplexity (per token) and bits per byte of a text's first `max_tokens` tokens, by sliding window.

    Each token is scored once, given up to window − 1 tokens before it and at least window − stride of them where the
    text has as many. Each window begins with BOS where the tokenizer adds one. nll: nats per token, weighted by tokens,
    with its standard error; nll_each: its mean over each 64 tokens, to compare two models on the same text by paired
    differences. kl_<name>, with the same two beside it, is the mean of KL(reference ‖ model) over the same tokens, in
    nats a token over the whole vocabulary: how far the model's predictions have drifted from that reference.

    on_scored: called after each forward pass with the tokens that it finished; with references, each pass counts for
    its share of them.
    """
    tokens, scored_bytes = first_tokens(tokenizer, text, settings.max_tokens)
    if len(tokens) < 2:
        raise DataError(f"evaluation.texts: a text of {len(tokens)} tokens has nothing to score; it needs at least 2")
    losses, drift = losses_and_drift(
        model,
        tokens,
        settings.window,
        settings.scored_by_window,
        batch_size=settings.batch_size,
        before=text_start(tokenizer),
        references=references or {},
        on_scored=on_scored,
    )
    nll = checked_finite(float(losses.mean()), "a text's mean token loss")
    return {
        "perplexity": math.exp(min(nll, 700.0)),
        "bits_per_byte": float(losses.sum()) / math.log(2) / max(1, scored_bytes),
        **_mean_of_tokens("nll", losses),
        **{key: value for name, each in drift.items() for key, value in _mean_of_tokens(f"kl_{name}", each).items()},
        "tokens": len(losses),
        "bytes": scored_bytes,
    }


def _mean_of_tokens(name: str, each: Tensor) -> dict[str, Any]:
    """The mean, its standard error and the mean of each block of tokens."""
    return {
        name: float(each.mean()),
        f"{name}_stderr": float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else 0.0,
        f"{name}_each": [float(block.mean()) for block in each.split(PAIRED_BLOCK)],
    }


@torch.no_grad()
def losses_and_drift(
    model: Any,
    tokens: Tensor,
    window: int,
    stride: int,
    *,
    batch_size: int,
    before: Sequence[int] = (),
    references: Mapping[str, Reference] | None = None,
    on_scored: Callable[[float], None] = lambda tokens: None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """−log p of each token but the first, and KL(reference ‖ model) there by the reference's name: (n − 1,), float64.

    All windows have one length, that of the text if it is short. A batch goes through the model once, and once through
    each reference. No logits outlive their batch: those of a whole text would fill gigabytes.

    before: token ids at the start of every window, within its length; `tokens` begin with them.
    references, on_scored: as `text_likelihood`'s.
    """
    losses: list[Tensor] = []
    drift: dict[str, list[Tensor]] = {name: [] for name in references or {}}
    for rows, new in _batches(windows(tokens, window, stride, before=before), batch_size):
        each = sum(new) / (1 + len(drift))
        scored = scored_logits(model, rows, new)
        losses += _losses_of(scored, rows, new)
        on_scored(each)
        for name, reference in (references or {}).items():
            drift[name] += map(divergences, reference(rows, new), scored)
            on_scored(each)
    return torch.cat(losses), {name: torch.cat(parts) for name, parts in drift.items()}


def windows(tokens: Tensor, window: int, stride: int, *, before: Sequence[int] = ()) -> list[tuple[Tensor, int]]:
    """The windows of a text, and how many of the last tokens of each are new. Arguments as `losses_and_drift`'s."""
    start = tokens[: len(before)]
    window = min(window, len(tokens))
    stride = max(1, min(stride, window - 1 - len(start)))
    ends = [window, *range(window + stride, len(tokens) + 1, stride)]
    if ends[-1] < len(tokens):
        ends.append(len(tokens))
    new = [window - 1] + [end - earlier for earlier, end in pairwise(ends)]
    return [
        (torch.cat([start, tokens[end - window + len(start) : end]]), count)
        for end, count in zip(ends, new, strict=True)
    ]


@torch.no_grad()
def token_losses(model: Any, sequences: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """−log p of the last `counts[i]` tokens of each sequence i, float64 on the CPU, from one forward pass.

    Shorter sequences are padded on the right, where nothing is scored or attended to.
    """
    return _losses_of(scored_logits(model, sequences, counts), sequences, counts)


def _losses_of(scored: Sequence[Tensor], sequences: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    losses = []
    for logits, sequence, count in zip(scored, sequences, counts, strict=True):  # one row in float32 at a time
        target = sequence[len(sequence) - count :].to(logits.device)
        losses.append(cross_entropy(logits.float(), target, reduction="none").cpu().double())
    return losses


def scored_logits(model: Any, sequences: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """What predicts the last `counts[i]` tokens of each sequence i: (counts[i], vocabulary), from one forward pass."""
    ids = pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    options: dict[str, Any] = {}
    if int(lengths.min()) < ids.shape[1]:
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        options["attention_mask"] = mask.long().to(model.device)
    # Logits only where something is scored: the vocabulary makes them the largest tensor.
    first = min(len(sequence) - count for sequence, count in zip(sequences, counts, strict=True)) - 1
    if _takes(model, "logits_to_keep"):
        options["logits_to_keep"] = ids.shape[1] - first
    logits = model(input_ids=ids.to(model.device), use_cache=False, **options).logits
    offset = ids.shape[1] - logits.shape[1]
    ends = [len(sequence) - 1 - offset for sequence in sequences]
    return [row[end - count : end] for row, end, count in zip(logits, ends, counts, strict=True)]


def divergences(before: Tensor, after: Tensor) -> Tensor:  # (n, vocabulary) twice → (n,) float64 on the CPU
    """KL(softmax(before) ‖ softmax(after)) of each row of logits, in nats."""
    log_p, log_q = (log_softmax(logits.float(), dim=-1) for logits in (before, after))
    return (log_p.exp() * (log_p - log_q)).sum(-1).cpu().double()


def _batches(
    rows: Sequence[tuple[Tensor, int]], batch_size: int
) -> Iterator[tuple[tuple[Tensor, ...], tuple[int, ...]]]:
    for start in range(0, len(rows), batch_size):
        sequences, counts = zip(*rows[start : start + batch_size], strict=True)
        yield sequences, counts


def _takes(model: Any, argument: str) -> bool:
    """Whether the model's forward has the argument. PEFT's own takes anything and hands it on."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return argument in inspect.signature(base.forward).parameters


def checked_finite(measured: float, what: str) -> float:
    """The value. Raises TrainingError that says what to change where it is not finite."""
    if not math.isfinite(measured):
        raise TrainingError(
            f"evaluation: {what} is {measured}. The model's weights or activations are not finite: in float16 take "
            "model.dtype bfloat16 or float32, otherwise train with a lower learning rate."
        )
    return measured
