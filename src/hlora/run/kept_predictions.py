"""What the models of before predict on the evaluation texts, kept from one measurement to the next."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
from torch import Tensor

from hlora.evaluation.likelihood import Reference

_SHARE = 4  # a quarter of the memory that would be free without it


class KeptPredictions:
    """Logits of reference models, on the CPU, while there is room.

    On a GPU nothing is kept: there a pass through the model is faster than copying the logits of a whole vocabulary.
    """

    def __init__(self) -> None:
        self._models: dict[str, str] = {}
        self._logits: dict[tuple[object, ...], list[Tensor]] = {}

    def of(self, name: str, model: str, reference: Reference) -> Reference:
        """The reference, which asks its model only for what is not kept.

        Args:
            name: The reference's name. Only its last model's predictions are kept.
            model: What tells its model from others, such as a digest of its weights.
            reference: Asks the model.
        """
        if self._models.get(name) != model:
            self._models[name] = model
            self._logits = {key: logits for key, logits in self._logits.items() if key[0] != name}

        def kept(sequences: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
            key = (name, tuple(counts), *(tuple(sequence.tolist()) for sequence in sequences))
            if key in self._logits:
                return self._logits[key]
            logits = reference(sequences, counts)
            size = sum(row.numel() * row.element_size() for row in logits)
            if logits[0].device.type == "cpu" and self._fits(size):
                self._logits[key] = [row.clone() for row in logits]  # a row is a view of a larger tensor
            return logits

        return kept

    def _fits(self, size: int) -> bool:
        mine = sum(row.numel() * row.element_size() for logits in self._logits.values() for row in logits)
        return mine + size < (mine + psutil.virtual_memory().available) / _SHARE
