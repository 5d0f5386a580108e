"""The trade-off curve of an arm: its cells at every strength, on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hlora.report.comparison.cells import cells_of, measure


class Curve(NamedTuple):
    """Cells of an arm on a task by strength, on the seeds that have every strength.

    Were the seeds others from point to point, a change of seed would look like one of strength.
    """

    strengths: list[float | None]
    """Rising; None for a method without a strength."""
    seeds: list[int | None]
    """In one order for all arms, so that arms can be paired."""
    cells: list[list[Mapping[str, Any]]]
    """One list a strength, one cell a seed."""

    def points(self) -> dict[float | None, list[Mapping[str, Any]]]:
        """Strength → its cells."""
        return dict(zip(self.strengths, self.cells, strict=True))


def curve_of(comparison: Mapping[str, Any], arm: str, task: str, text: str | None = None) -> Curve:
    """The curve through the finished cells; empty where there are none.

    text: only cells whose loss is finite on this text and on the domain, as both are needed to place them.
    """
    found: dict[int | None, dict[float | None, Mapping[str, Any]]] = {}
    for cell in cells_of(comparison, arm, task, "all"):
        if cell["status"] == "done" and (text is None or _placed(cell, text)):
            found.setdefault(cell["seed"], {})[cell["strength"]] = cell
    strengths = max((set(by_strength) for by_strength in found.values()), key=len, default=set())
    rising = sorted(strengths, key=lambda strength: -math.inf if strength is None else strength)
    seeds = sorted((seed for seed in found if strengths <= found[seed].keys()), key=str)
    return Curve(rising, seeds, [[found[seed][strength] for seed in seeds] for strength in rising])


def fewer_seeds(comparison: Mapping[str, Any], arms: Sequence[str]) -> list[str]:
    """A note of which arms have every strength for fewer seeds than the comparison has: their intervals count fewer."""
    all_seeds, short = len(comparison["seeds"]), []
    for arm in arms:
        for task in comparison["tasks"]:
            count = len(curve_of(comparison, arm, task).seeds)
            if 0 < count < all_seeds:
                short.append(f"{arm} on {task} ({count})")
    return [f"Curves of fewer than {all_seeds} seeds: {', '.join(short)}."] if short else []


def _placed(cell: Mapping[str, Any], text: str) -> bool:
    ends = measure(cell, "answer_nll"), measure(cell, "nll", text)
    return all(end is not None and math.isfinite(end) for end in ends)
