"""What reference models predict is asked once, and for the right model."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor

from hlora.run.kept_predictions import KeptPredictions

ROWS = [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])]


class Model:
    """Counts how often it is asked."""

    def __init__(self, value: float) -> None:
        self.value, self.asked = value, 0

    def __call__(self, sequences: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        self.asked += 1
        return [
            torch.full((count, 5), self.value) + sequence.sum()
            for sequence, count in zip(sequences, counts, strict=True)
        ]


def test_a_model_is_asked_once_for_the_same_windows_and_again_for_others() -> None:
    kept, model = KeptPredictions(), Model(1.0)
    first = kept.of("from_base", "base", model)(ROWS, [2, 1])
    again = kept.of("from_base", "base", model)(ROWS, [2, 1])
    assert model.asked == 1 and all(map(torch.equal, first, again))
    for rows, counts in ((ROWS, [1, 1]), (ROWS[:1], [2]), ([ROWS[0], ROWS[0]], [2, 1])):
        got = kept.of("from_base", "base", model)(rows, counts)
        assert all(map(torch.equal, got, Model(1.0)(rows, counts)))
    assert model.asked == 4


def test_another_model_under_the_same_name_is_asked_and_replaces_the_one_before() -> None:
    kept, one, two, base = KeptPredictions(), Model(1.0), Model(2.0), Model(0.0)
    kept.of("from_base", "base", base)(ROWS, [1, 1])
    kept.of("from_general", "seed 0", one)(ROWS, [1, 1])
    got = kept.of("from_general", "seed 1", two)(ROWS, [1, 1])
    assert all(map(torch.equal, got, Model(2.0)(ROWS, [1, 1])))
    kept.of("from_general", "seed 0", one)(ROWS, [1, 1])
    kept.of("from_base", "base", base)(ROWS, [1, 1])
    assert (one.asked, two.asked, base.asked) == (2, 1, 1)


def test_nothing_is_kept_beyond_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * 5 * 4  # one row of 2 tokens, 5 logits of 4 bytes each
    kept, model = KeptPredictions(), Model(1.0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * size))
    kept.of("from_base", "base", model)(ROWS[:1], [2])
    kept.of("from_base", "base", model)(ROWS[:1], [2])
    assert model.asked == 2
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * size + 1))
    for _ in range(2):
        kept.of("from_base", "base", model)(ROWS[:1], [2])
    assert model.asked == 3
