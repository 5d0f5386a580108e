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


def text_to_continue(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that goes on: after BOS, where the tokenizer adds one and the text has none, without EOS."""
    ids, before = tokenise(tokenizer, text), text_start(tokenizer)
    return ids if begins_with(ids, before) else [*before, *ids]


def writes_all_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has tokens for any character, as one has that falls back to bytes."""
    rare = "𓀀"  # a hieroglyph, which no vocabulary has as such
    return rare in str(tokenizer.decode(tokenise(tokenizer, rare)))


def is_written(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the tokenizer has a token for anything of the text but its white space."""
    if writes_all_texts(tokenizer):
        return True
    known = [token for token in tokenise(tokenizer, text) if token != tokenizer.unk_token_id]
    return bool(str(tokenizer.decode(known)).strip())


def begins_with(ids: list[int], before: list[int]) -> bool:
    """Whether a text's own tokens begin with BOS already, written out in the text."""
    return bool(before) and ids[: len(before)] == before
