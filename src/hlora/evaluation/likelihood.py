"""General ability: perplexity and bits per byte of a text, by sliding window."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from hlora.config.sections import EvaluationConfig
from hlora.data.packing import first_tokens
from hlora.system.errors import DataError, TrainingError

PAIRED_BLOCK = 64  # tokens of one paired difference between two models


@torch.no_grad()
def text_likelihood(
    model: Any, tokenizer: PreTrainedTokenizerBase, text: str, settings: EvaluationConfig
) -> dict[str, Any]:
    """Perplexity (per token) and bits per byte of a text's first `max_tokens` tokens, by sliding window.

    Each token is scored once, given up to window − 1 tokens before it and at least window − stride of them where the
    text has as many. nll: nats per token, weighted by tokens, with its standard error; nll_each: its mean over each
    64 tokens, to compare two models on the same text by paired differences.
    """
    tokens = first_tokens(tokenizer, text, settings.max_tokens)
    if len(tokens) < 2:
        raise DataError(f"evaluation.texts: a text of {len(tokens)} tokens has nothing to score; it needs at least 2")
    losses = _sliding_window(model, tokens, settings.window, settings.stride, settings.batch_size)
    nll = checked_finite(float(losses.mean()), "a text's mean token loss")
    scored = len(str(tokenizer.decode(tokens[1:])).encode("utf-8"))
    return {
        "perplexity": math.exp(min(nll, 700.0)),
        "bits_per_byte": float(losses.sum()) / math.log(2) / max(1, scored),
        "nll": nll,
        "nll_stderr": float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0,
        "nll_each": [float(block.mean()) for block in losses.split(PAIRED_BLOCK)],
        "tokens": len(losses),
        "bytes": scored,
    }


def _sliding_window(model: Any, tokens: Tensor, window: int, stride: int, batch_size: int) -> Tensor:  # (n − 1,)
    """−log p of each token but the first, float64. All windows have one length, that of the text if it is short."""
    window = min(window, len(tokens))
    stride = max(1, min(stride, window - 1))
    ends = [window, *range(window + stride, len(tokens) + 1, stride)]
    if ends[-1] < len(tokens):
        ends.append(len(tokens))
    new = [window - 1] + [end - before for before, end in pairwise(ends)]  # scored by each window
    can_keep = _takes(model, "logits_to_keep")
    losses = []
    for start in track(range(0, len(ends), batch_size), description="perplexity", transient=True):
        chosen = slice(start, start + batch_size)
        batch = torch.stack([tokens[end - window : end] for end in ends[chosen]]).to(model.device)
        # Logits only where something is scored: the vocabulary makes them the largest tensor.
        keep = max(new[chosen]) + 1
        options = {"logits_to_keep": keep} if can_keep else {}
        logits = model(input_ids=batch, use_cache=False, **options).logits[:, -keep:-1]
        targets = batch[:, 1:][:, -(keep - 1) :]
        for row, target, count in zip(logits, targets, new[chosen], strict=True):  # one row in float32 at a time
            losses.append(cross_entropy(row[-count:].float(), target[-count:], reduction="none").cpu().double())
    return torch.cat(losses)


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
