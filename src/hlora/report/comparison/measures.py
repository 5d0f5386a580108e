"""What figures and the report compare arms by, and the tests of our arm against the rival.

`comparison` is what comparison.json holds (see cells.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hlora.report.comparison.cells import values_of
from hlora.report.comparison.significance import Comparison, holm, welch


class Measure(NamedTuple):
    """A measure that figures and the report compare arms by."""

    label: str
    name: str
    text: str | None
    """The general text that it is of; None: of the domain."""
    scale: float
    lower_is_better: bool


class Panel(NamedTuple):
    """One panel of Fig. 3: a measure on a task, ours against the rival."""

    task: str
    measure: Measure
    ours: list[float]
    theirs: list[float]
    welch: Comparison
    p_holm: float
    """Corrected over the panels that have a p."""


def measures(comparison: Mapping[str, Any]) -> list[Measure]:
    """Perplexity of each general text, the answers' NLL in nats, and accuracy in %."""
    texts = [Measure(f"PPL {text}", "perplexity", text, 1, True) for text in comparison["texts"]]
    return [*texts, Measure("answer NLL", "answer_nll", None, 1, True), Measure("accuracy %", "acc", None, 100, False)]


def values(comparison: Mapping[str, Any], arm: str, task: str, what: Measure) -> list[float]:
    """An arm's test values over seeds at the chosen strength, in the measure's unit; a diverged one is not finite."""
    return [what.scale * value for value in values_of(comparison, arm, task, what.name, what.text).values()]


def t_tests(comparison: Mapping[str, Any]) -> list[Panel]:
    """Fig. 3's tests, task by task: perplexity of each text and accuracy, as in tables.t_test_table."""
    panels = []
    for task in comparison["tasks"]:
        for what in measures(comparison):
            if what.name != "answer_nll":
                ours, theirs = (values(comparison, comparison[side], task, what) for side in ("ours", "rival"))
                panels.append((task, what, ours, theirs, welch(ours, theirs)))
    corrected = holm(panel[-1].p for panel in panels)
    return [Panel(*panel, p) for panel, p in zip(panels, corrected, strict=True)]
