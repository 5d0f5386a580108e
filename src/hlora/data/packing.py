"""Text into rows of token ids. Each row begins as the tokenizer begins a text: with BOS, where it adds one."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hlora.data.tokens import begins_with, text_start, tokenise
from hlora.system.errors import DataError


def pack(
    tokenizer: Any, documents: list[str], examples: int, max_length: int, *, at_most: bool = False
) -> Tensor:  # (examples, max_length)
    """The first `examples` sequences of `max_length` token ids of the documents, joined by the end token.

    Args:
        tokenizer: The model's.
        documents: The text.
        examples: Number of sequences.
        max_length: Tokens in a sequence.
        at_most: Accept fewer sequences if the text has no more.

    Raises:
        DataError: The text is too short. Says how many sequences it has.
    """
    before = text_start(tokenizer)
    text = max_length - len(before)
    if examples < 1 or max_length < 2 or text < 1:
        raise DataError(f"expected at least 1 sequence of at least 2 tokens, got {examples} of {max_length}")
    parts: list[np.ndarray] = []
    for part in _documents_in_tokens(tokenizer, documents):
        parts.append(part)
        if sum(map(len, parts)) >= examples * text:
            break
    ids = np.concatenate([*parts, np.empty(0, dtype=np.int32)]).astype(np.int64)
    whole = min(examples, len(ids) // text)
    if whole < examples and not (at_most and whole):
        raise DataError(
            f"the general text has {whole} sequences of {max_length} tokens, expected {examples}. "
            "Give more text in general.paths, or ask for fewer or shorter sequences."
        )
    rows = torch.from_numpy(ids[: whole * text]).view(whole, text)
    return torch.cat([torch.tensor(before, dtype=torch.int64).expand(whole, -1), rows], 1)


def packed_rows(tokenizer: Any, documents: list[str], max_length: int) -> list[np.ndarray]:
    """All of the documents, joined by the end token, in rows of `max_length` token ids; the last may be shorter."""
    before = np.array(text_start(tokenizer), dtype=np.int32)
    text = max_length - len(before)
    if text < 1:
        raise DataError(f"training.record.max_length: expected more than {len(before)}, got {max_length}")
    ids = np.concatenate([*_documents_in_tokens(tokenizer, documents)])
    return [np.concatenate([before, ids[start : start + text]]) for start in range(0, len(ids), text)]


def document_rows(tokenizer: Any, documents: list[str]) -> list[np.ndarray]:
    """A row of token ids for each document, with the end token."""
    before = np.array(text_start(tokenizer), dtype=np.int32)
    return [np.concatenate([before, ids]) for ids in _documents_in_tokens(tokenizer, documents)]


def _documents_in_tokens(tokenizer: Any, documents: Iterable[str]) -> Iterator[np.ndarray]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        yield np.array(tokenise(tokenizer, document) + end, dtype=np.int32)


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int
) -> tuple[Tensor, int]:  # (count,) or fewer token ids
    """The text's first tokens, with BOS where the tokenizer adds one, and the bytes of those that have one before them.

    Tokenises the start of the text only: eight characters a token (four are typical), more while that is too few.
    """
    before, characters = text_start(tokenizer), 8 * count
    fast = bool(getattr(tokenizer, "is_fast", False))
    while True:
        options = {"add_special_tokens": False, "truncation": False, "verbose": False}
        found = tokenizer(text[:characters], return_offsets_mapping=fast, **options)
        ids = found["input_ids"]
        if len(before) + len(ids) > count or characters >= len(text):
            break
        characters *= 2
    if begins_with(ids, before):
        before = []
    ids = ids[: max(0, count - len(before))]
    unscored = 0 if before else 1  # the first token has nothing before it
    if fast and len(ids) > unscored:
        offsets = found["offset_mapping"]
        start = offsets[0][1] if unscored else 0
        scored = text[start : offsets[len(ids) - 1][1]]
    else:
        scored = str(tokenizer.decode(ids[unscored:]))
    return torch.tensor([*before, *ids], dtype=torch.int64), len(scored.encode("utf-8"))


def pieces_of(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[list[int]]:
    """Up to `count` pieces of `length` token ids cut from the documents, in an order that the seed gives."""
    order = random.Random(seed).sample(documents, len(documents))
    before = text_start(tokenizer)
    text = max(1, length - len(before))
    pieces: list[list[int]] = []
    for document in order:
        ids = tokenise(tokenizer, document)
        whole = range(0, max(len(ids) - text, 0) + 1, text)  # a document shorter than `length` is one piece
        pieces += [[*before, *ids[start : start + text]] for start in whole if ids]
        if len(pieces) >= count:
            break
    return pieces[:count]
