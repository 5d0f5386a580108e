"""Text into token ids, and what the tokenizer puts before a text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the text alone, without BOS and EOS."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def text_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: BOS, or nothing."""
    alone, whole = tokenise(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    for count in range(len(whole) - len(alone) + 1):
        if whole[count : count + len(alone)] == alone:
            return whole[:count]
    return []


def begins_with(ids: list[int], before: list[int]) -> bool:
    """Whether a text's own tokens begin with BOS already, written out in the text."""
    return bool(before) and ids[: len(before)] == before
