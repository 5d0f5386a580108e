"""Training rows as they are tokenised, with the trained part of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from hlora.data.domain import packing_of
from hlora.data.example import Example
from hlora.data.rendering import render


@dataclass(frozen=True)
class TrainedRow:
    """The tokens that training keeps of a row, and 1 for each that is trained."""

    ids: list[int]
    mask: list[int]

    @property
    def trained(self) -> list[int]:
        return [token for token, is_trained in zip(self.ids, self.mask, strict=True) if is_trained]

    def parts(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
        """The row as text, special tokens too, cut where training begins or ends; and whether a part is trained."""
        found = []
        for is_trained, pairs in groupby(zip(self.ids, self.mask, strict=True), key=lambda pair: pair[1]):
            found.append((str(tokenizer.decode([token for token, _ in pairs])), bool(is_trained)))
        return found


def trained_row(tokenizer: PreTrainedTokenizerBase, example: Example, arguments: Mapping[str, Any]) -> TrainedRow:
    """The row as the domain phase trains it.

    Args:
        tokenizer: The model's.
        example: A row of the domain.
        arguments: Those of trl.SFTConfig, for the domain phase.

    Raises:
        DataError: The chat template refuses the row.
    """
    from trl import SFTConfig

    row = render(tokenizer, example).training_row()
    ids, mask = row["input_ids"], row["completion_mask"]
    if arguments.get("completion_only_loss") is False:
        mask = [1] * len(ids)
    length, mode = (arguments.get(name, getattr(SFTConfig, name)) for name in ("max_length", "truncation_mode"))
    packing = packing_of(arguments)
    if length is not None and packing in (None, "bfd"):  # the others cut no row, but go on with it in the next one
        kept = slice(-length, None) if mode == "keep_end" and packing is None else slice(length)
        ids, mask = ids[kept], mask[kept]
    return TrainedRow(ids, mask)
