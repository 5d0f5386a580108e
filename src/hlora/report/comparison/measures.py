"""What figures, tables and the verdict compare arms by, and the tests of our arm against the rival.

`comparison` is what comparison.json holds (see cells.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hlora.report.comparison.cells import cells_of, untuned, values_of
from hlora.report.comparison.significance import Sample, WelchTest, holm, welch
from hlora.report.format import number


class Measure(NamedTuple):
    """A measure that arms are compared by."""

    label: str
    name: str
    text: str | None
    """The general text that it is of; None: of the domain."""
    scale: float
    lower_is_better: bool


class TestPanel(NamedTuple):
    """One panel of Fig. 3: a measure on a task, ours against the rival."""

    task: str
    measure: Measure
    ours: list[float]
    theirs: list[float]
    welch: WelchTest
    p_holm: float
    """Corrected over the panels that have a p."""


def measures(comparison: Mapping[str, Any]) -> list[Measure]:
    """Perplexity of each general text, the answers' NLL in nats, and accuracy in %."""
    texts = [Measure(f"PPL {text}", "perplexity", text, 1, True) for text in comparison["texts"]]
    return [*texts, Measure("answer NLL", "answer_nll", None, 1, True), Measure("accuracy %", "acc", None, 100, False)]


def values(comparison: Mapping[str, Any], arm: str, task: str, what: Measure) -> list[float]:
    """An arm's test values over seeds at the chosen strength, in the measure's unit; a diverged one is not finite."""
    return [what.scale * value for value in values_of(comparison, arm, task, what.name, what.text).values()]


def digits_of(what: Measure) -> int:
    """Digits behind the point, in tables, sentences and figures alike."""
    return 1 if what.name == "acc" else 2


def sample_of(comparison: Mapping[str, Any], arm: str, task: str, what: Measure) -> Sample:
    """The same with the values of the test questions, or of the text's blocks."""
    rows = []
    for cell in cells_of(comparison, arm, task):
        test = cell["test"] if cell["status"] == "done" else None
        place = (test or {}).get("domain") if what.text is None else ((test or {}).get("texts") or {}).get(what.text)
        if place and what.name in place:
            rows.append(_parts(place, what))
    same = len({len(row) for row in rows}) == 1 and len(rows[0]) > 0
    share = what.scale if what.name == "acc" else None
    seedless = arm in untuned(comparison, "base")
    return Sample(values(comparison, arm, task, what), np.mean(rows, axis=0) if same else None, share, seedless)


def _parts(found: Mapping[str, Any], what: Measure) -> list[float]:
    """A perplexity moves by itself times the change of the loss, to first order (the delta method)."""
    if what.name == "perplexity":
        return [number(found["perplexity"]) * number(loss) for loss in found.get("nll_each") or []]
    return [what.scale * number(value) for value in found.get(f"{what.name}_each") or []]


def t_tests(comparison: Mapping[str, Any]) -> list[TestPanel]:
    """Fig. 3's tests, task by task: perplexity of each text and accuracy, ours against the rival."""
    panels = []
    for task in comparison["tasks"]:
        for what in measures(comparison):
            if what.name != "answer_nll":
                ours, theirs = (sample_of(comparison, comparison[side], task, what) for side in ("ours", "rival"))
                panels.append((task, what, list(ours.seeds), list(theirs.seeds), welch(ours, theirs)))
    corrected = holm(panel[-1].p for panel in panels)
    return [TestPanel(*panel, p) for panel, p in zip(panels, corrected, strict=True)]
