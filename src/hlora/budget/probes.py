"""Probes of a forgetting budget: how much the general loss rose, on held-out text or on the base model's samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hlora.data.packing import first_tokens
from hlora.data.tokens import text_start
from hlora.evaluation.likelihood import PAIRED_BLOCK, divergences, token_losses
from hlora.system.errors import DataError
from hlora.system.progress import Line, line


@dataclass(frozen=True)
class Rise:
    """How much general ability a model has lost against its base, in nats a token."""

    nats: float
    stderr: float
    """Of the mean, from blocks of 64 paired differences on the same tokens."""
    text: str
    """Name of the text that it was measured on; of several texts, the one that lost most."""
    tokens: int


class TextProbe:
    """Measures the rise of the loss on texts, from the same tokens with the adapter on and off.

    Of several texts, the one with the largest rise counts. The first quarter of each window is context only; its tokens
    are scored in the window before. The base's losses are measured once, when first needed.

    Args:
        model: The base model with its adapter.
        tokenizer: The model's.
        texts: Name → text. Must not be the text that the result is evaluated on.
        tokens: Tokens of each text that one probe during training reads. Probes read different windows in turn, so that
            their noise differs.
        most_tokens: Tokens used from the start of each text, at most.
        window: Tokens in a window.

    Raises:
        DataError: There is no text, or a text has fewer than 2 tokens.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Mapping[str, str],
        *,
        tokens: int = 2048,
        most_tokens: int = 65536,
        window: int = 512,
    ) -> None:
        if not texts:
            raise DataError("budget: no probe text. Name one, or let the model's own samples be the probe.")
        self.model, self.tokens, self.most_tokens = model, tokens, max(tokens, most_tokens)
        self._rows: dict[str, Tensor] = {}  # (windows, window)
        self._base: dict[str, Tensor] = {}  # (windows, window − 1), NaN where not measured yet
        for name, text in texts.items():
            ids, _ = first_tokens(tokenizer, text, self.most_tokens)
            if len(ids) < 2:
                raise DataError(f"budget: probe text {name!r} has {len(ids)} tokens, too few to score; give at least 2")
            if len(ids) < window:
                self._rows[name], scored = ids[None], len(ids) - 1
            else:
                before = text_start(tokenizer)
                width = window - len(before)
                scored = max(1, min(width, window - window // _UNSCORED))
                rows = ids[len(before) :].unfold(0, width, scored)
                self._rows[name] = torch.cat([ids[: len(before)].expand(len(rows), -1), rows], 1)
            self._base[name] = torch.full((len(self._rows[name]), scored), math.nan, dtype=torch.float64)

    def measure(self, tokens: int, turn: int = 0) -> Rise:
        """The rise on `tokens` tokens of each text, with the adapter as it is now.

        Args:
            tokens: How many tokens of each text to read.
            turn: Which windows: each turn reads the next ones.
        """
        rises = []
        read = {name: _part(tokens, turn, *base.shape) for name, base in self._base.items()}
        unread = {name: rows[self._base[name][rows].isnan().any(1)] for name, rows in read.items()}
        total = sum(self._rows[name][rows].numel() for part in (read, unread) for name, rows in part.items())
        with _undisturbed(self.model), line(_PROBE, total, aside=True) as shown:
            for name, rows in self._rows.items():
                base, chosen, new = self._base[name], read[name], unread[name]
                if len(new):
                    with self.model.disable_adapter():
                        base[new] = _losses(self.model, rows[new], base.shape[1], shown)
                after = _losses(self.model, rows[chosen], base.shape[1], shown)
                rises.append(_rise((after - base[chosen]).flatten(), name))
        return max(rises, key=lambda rise: rise.nats)


class SampleProbe:
    """Measures KL(base ‖ model) on the model's own samples, in nats a token, over the whole vocabulary.

    On text that the base generated, KL is the expected rise of the loss, without the noise of the tokens drawn. It is
    never negative. On text from elsewhere the rise of the loss is another quantity.

    Args:
        model: The base model with its adapter.
        sequences: Token ids (n, length), such as `hlora.data.packing.pack` makes of samples.
        tokens: Tokens that one probe during training reads. Probes read different rows in turn.
        most_tokens: Tokens of `sequences` that are used, at most.

    Each probe takes two forward passes, since the base's logits are not kept.

    Raises:
        DataError: There is no sequence, or the sequences have fewer than 2 tokens.
    """

    def __init__(self, model: PeftModel, sequences: Tensor, *, tokens: int = 2048, most_tokens: int = 16384) -> None:
        if sequences.dim() != 2 or not len(sequences) or sequences.shape[1] < 2:
            raise DataError(f"budget: expected samples of shape (n ≥ 1, length ≥ 2), got {tuple(sequences.shape)}")
        self.model = model
        self.tokens, self.most_tokens = tokens, max(tokens, most_tokens)
        self.sequences = sequences[: math.ceil(self.most_tokens / sequences.shape[1])]

    def measure(self, tokens: int, turn: int = 0) -> Rise:
        """The mean divergence on `tokens` tokens, with the adapter as it is now.

        Args:
            tokens: How many tokens to read.
            turn: Which rows: each turn reads the next ones.
        """
        rows = self.sequences[_part(tokens, turn, *self.sequences.shape)]
        found = []
        with _undisturbed(self.model), line(_PROBE, rows.numel(), aside=True) as shown:
            for batch in _batches(rows):
                ids = batch.to(self.model.device)
                new = self.model(input_ids=ids, use_cache=False).logits
                with self.model.disable_adapter():
                    old = self.model(input_ids=ids, use_cache=False).logits
                for mine, base in zip(new, old, strict=True):  # one row in float32 at a time
                    found.append(divergences(base[:-1], mine[:-1]))
                shown.add(batch.numel())
        return _rise(torch.cat(found), "own samples")


def _rise(differences: Tensor, text: str) -> Rise:  # (tokens,) float64
    blocks = torch.stack([block.mean() for block in differences.split(PAIRED_BLOCK)])
    if len(blocks) > 1:
        stderr = float(blocks.std()) / math.sqrt(len(blocks))
    else:
        stderr = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return Rise(float(differences.mean()), stderr, text, len(differences))


def _losses(model: Any, rows: Tensor, count: int, shown: Line) -> Tensor:  # (n, window) → (n, count), float64, CPU
    """−log p of the last `count` tokens of each row."""
    losses = []
    for batch in _batches(rows):
        losses += token_losses(model, list(batch), [count] * len(batch))
        shown.add(batch.numel())
    return torch.stack(losses)


def _batches(rows: Tensor) -> Iterator[Tensor]:
    yield from rows.split(max(1, _TOKENS_AT_ONCE // rows.shape[1]))


def _part(tokens: int, turn: int, rows: int, length: int) -> Tensor:  # row numbers
    """As many rows as hold `tokens` tokens; the next turn takes the row after each.

    They are spread over the whole text, so that no probe reads one chapter only.
    """
    count = min(rows, math.ceil(tokens / length))
    return (torch.arange(count) * rows // count + turn) % rows


@contextmanager
def _undisturbed(model: PeftModel) -> Iterator[None]:
    """Evaluation mode without gradients. Restores modes, requires_grad and random states afterwards."""
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    devices = [] if model.device.type == "cpu" else [model.device]  # by default every GPU of the machine
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in trained.items():  # leaving disable_adapter makes a frozen adapter trained
            parameter.requires_grad_(requires_grad)


# After a cut mid-sentence, SmolLM2-135M's loss is up to 16 nats a token until it has seen some text, and any tuning
# lowers it there: over 8 windows of 512 tokens the rise was 0.011 ± 0.0041, 0.017 ± 0.0026 without first quarters.
_UNSCORED = 4  # one in this many tokens of a window is context only
_PROBE = "the budget's probe, token"  # in the progress line
_TOKENS_AT_ONCE = 1024  # in one forward pass; their logits take 200 MB in float32 at a vocabulary of 49,152
