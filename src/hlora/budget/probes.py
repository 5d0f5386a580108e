"""Probes of a forgetting budget: the rise of the general loss, on held-out text or on the base model's own samples."""

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


@dataclass(frozen=True)
class Rise:
    """How much general ability a model has lost against its base, in nats a token."""

    nats: float
    stderr: float
    """Of the mean, from blocks of 64 paired differences on the same tokens."""
    text: str
    """The text that it was measured on: of several the one that lost most."""
    tokens: int


class TextProbe:
    """Rise of the loss on texts, by the same tokens with the adapter on and off; of several, the worst text's.

    texts: name → text; other text than what the result is evaluated on. most_tokens: how much of each text's start is
    used, or all there is, in windows of `window` tokens. The first quarter of a window is context alone and scored in
    the window before, as text_likelihood does with a stride of three quarters. tokens: how much a probe on the way
    reads, each other windows, in turn: their noise is then not the same in all of them.
    The base's losses are measured once, when first needed.

    Raises DataError for no text, or one of fewer than 2 tokens.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Mapping[str, str],
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
        """The rise on `tokens` tokens of each text, those of the given turn. Reads the adapter as it is now."""
        rises = []
        with _undisturbed(self.model):
            for name, rows in self._rows.items():
                base = self._base[name]
                chosen = _part(tokens, turn, *base.shape)
                new = chosen[base[chosen].isnan().any(1)]
                if len(new):
                    with self.model.disable_adapter():
                        base[new] = _losses(self.model, rows[new], base.shape[1])
                rises.append(_rise((_losses(self.model, rows[chosen], base.shape[1]) - base[chosen]).flatten(), name))
        return max(rises, key=lambda rise: rise.nats)


class SampleProbe:
    """KL(base ‖ model) a token on the model's own samples, over the whole vocabulary at each position.

    On text that the base wrote this is the expectation of the rise of the loss, without the noise of which token came.
    It is never negative, and another quantity than the rise on a text that the base did not write.

    sequences: (n, length) token ids, such as `fisher.pack` of samples gives, of which `most_tokens` are used. A probe
    reads `tokens` of them in turn. The base's logits are computed anew: two forward passes each.

    Raises DataError for sequences of fewer than 2 tokens.
    """

    def __init__(self, model: PeftModel, sequences: Tensor, tokens: int = 2048, most_tokens: int = 16384) -> None:
        if sequences.dim() != 2 or not len(sequences) or sequences.shape[1] < 2:
            raise DataError(f"budget: expected samples of shape (n ≥ 1, length ≥ 2), got {tuple(sequences.shape)}")
        self.model = model
        self.tokens, self.most_tokens = tokens, max(tokens, most_tokens)
        self.sequences = sequences[: math.ceil(self.most_tokens / sequences.shape[1])]

    def measure(self, tokens: int, turn: int = 0) -> Rise:
        """The mean divergence on `tokens` tokens, those of the given turn. Reads the adapter as it is now."""
        rows = self.sequences[_part(tokens, turn, *self.sequences.shape)]
        found = []
        with _undisturbed(self.model):
            for batch in _batches(rows):
                ids = batch.to(self.model.device)
                new = self.model(input_ids=ids, use_cache=False).logits
                with self.model.disable_adapter():
                    old = self.model(input_ids=ids, use_cache=False).logits
                for mine, base in zip(new, old, strict=True):  # one row in float32 at a time
                    found.append(divergences(base[:-1], mine[:-1]))
        return _rise(torch.cat(found), "own samples")


def _rise(differences: Tensor, text: str) -> Rise:  # (tokens,) float64
    blocks = torch.stack([block.mean() for block in differences.split(PAIRED_BLOCK)])
    if len(blocks) > 1:
        stderr = float(blocks.std()) / math.sqrt(len(blocks))
    else:
        stderr = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return Rise(float(differences.mean()), stderr, text, len(differences))


def _losses(model: Any, rows: Tensor, count: int) -> Tensor:  # (n, window) → (n, count), float64 on the CPU
    """−log p of the last `count` tokens of each row."""
    return torch.stack(
        [loss for batch in _batches(rows) for loss in token_losses(model, list(batch), [count] * len(batch))]
    )


def _batches(rows: Tensor) -> Iterator[Tensor]:
    yield from rows.split(max(1, _TOKENS_AT_ONCE // rows.shape[1]))


def _part(tokens: int, turn: int, rows: int, length: int) -> Tensor:  # row numbers
    """As many rows as hold `tokens` tokens, spread over all of the text; those of the next turn are beside them.

    Spread, so that no probe is of one chapter alone.
    """
    count = min(rows, math.ceil(tokens / length))
    return (torch.arange(count) * rows // count + turn) % rows


@contextmanager
def _undisturbed(model: PeftModel) -> Iterator[None]:
    """Evaluation mode and no gradients; modes, what is trained, and random numbers as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in trained.items():  # leaving disable_adapter makes a frozen adapter trained
            parameter.requires_grad_(requires_grad)


# Cut off mid-sentence, SmolLM2-135M is lost (up to 16 nats a token) until it has seen some text, and any tuning helps
# there: of 8 windows of 512 tokens the rise was 0.011 ± 0.0041, and 0.017 ± 0.0026 without their first quarters.
_UNSCORED = 4  # a window's part that is not scored is one in this many
_TOKENS_AT_ONCE = 1024  # of one forward pass: their logits take 200 MB in float32 at a vocabulary of 49,152
