"""Text into blocks of token ids."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hlora.system.errors import DataError


def pack(
    tokenizer: Any, documents: list[str], examples: int, max_length: int, at_most: bool = False
) -> Tensor:  # (examples, max_length)
    """The first `examples` sequences of `max_length` token ids of the documents, joined by the end token.

    at_most: as many as the text has, if it has fewer. Raises DataError that says how many it has when they are too few.
    """
    if examples < 1 or max_length < 2:
        raise DataError(f"expected at least 1 sequence of at least 2 tokens, got {examples} of {max_length}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    wanted, ids = examples * max_length, []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted]).view(examples, max_length)
    whole = len(ids) // max_length
    if at_most and whole:
        return torch.tensor(ids[: whole * max_length]).view(whole, max_length)
    raise DataError(
        f"the general text has {whole} sequences of {max_length} tokens, expected {examples}. "
        "Give more text in general.paths, or ask for fewer or shorter sequences."
    )


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> Tensor:  # (count,) or fewer
    """Tokenises the start of the text only: eight characters a token (four are typical), more while that is too few."""
    characters = 8 * count
    while True:
        tokens = tokenizer(text[:characters], return_tensors="pt", truncation=False, verbose=False)["input_ids"][0]
        if len(tokens) > count or characters >= len(text):
            return tokens[:count]
        characters *= 2


def pieces_of(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[list[int]]:
    """Up to `count` pieces of `length` token ids cut from the documents, in an order that the seed gives."""
    order = random.Random(seed).sample(documents, len(documents))
    pieces: list[list[int]] = []
    for document in order:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        whole = range(0, max(len(ids) - length, 0) + 1, length)  # a document shorter than `length` is one piece
        pieces += [ids[start : start + length] for start in whole if ids]
        if len(pieces) >= count:
            break
    return pieces[:count]
