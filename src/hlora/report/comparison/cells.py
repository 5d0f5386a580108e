"""Cells of a comparison, and the test values in them.

`comparison` is what comparison.json holds (see comparison/compare.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from hlora.methods import METHODS


def cells_of(
    comparison: Mapping[str, Any], arm: str, task: str, strength: float | Literal["chosen", "all"] | None = "chosen"
) -> list[dict[str, Any]]:
    """An arm's cells on a task, whatever their status, at the chosen strength, at all or at the one given."""
    if strength == "chosen":
        strength = comparison["chosen"].get(arm, {}).get(task)
    return [
        cell
        for cell in comparison["cells"]
        if cell["arm"] == arm and cell["task"] == task and strength in ("all", cell["strength"])
    ]


def untuned(comparison: Mapping[str, Any], *methods: str) -> list[str]:
    """Arms that never see the domain, for reference only: by default of every method that is such a reference."""
    wanted = methods or [name for name, method in METHODS.items() if method.reference]
    return list(dict.fromkeys(cell["arm"] for cell in comparison["cells"] if cell["method"] in wanted))


def measure(cell: Mapping[str, Any], name: str, text: str | None = None) -> float | None:
    """A test value of a finished cell: of a general text (perplexity, nll, forgetting, …), else of the domain.

    None where it was not measured, NaN where it was and is not a number.
    """
    test = cell.get("test") if cell["status"] == "done" else None
    found = (test or {}).get("domain" if text is None else "texts") or {}
    if text is not None:
        found = found.get(text) or {}
    if name not in found:
        return None
    value = found[name]
    return float(value) if isinstance(value, int | float) else math.nan


def values_of(
    comparison: Mapping[str, Any], arm: str, task: str, name: str, text: str | None = None
) -> dict[int | None, float]:
    """Seed → test value of an arm at its chosen strength. Base has one, under the seed None."""
    values = {cell["seed"]: measure(cell, name, text) for cell in cells_of(comparison, arm, task)}
    return {seed: value for seed, value in values.items() if value is not None}


def base_arm(comparison: Mapping[str, Any]) -> str:
    return next(iter(untuned(comparison, "base")), "Base")
