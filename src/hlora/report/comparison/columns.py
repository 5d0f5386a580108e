"""A measure of every arm as a table's column, and the reasons where there is none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from hlora.report.comparison.cells import cells_of, untuned, values_of
from hlora.report.comparison.significance import mean_sd
from hlora.report.comparison.table_formats import Rank, TableCell, one_line
from hlora.report.comparison.table_numbers import NONE, mean_and_sd

_SHORT = 36  # characters of a reason in a cell; the whole one is in the notes


def column_of(
    comparison: Mapping[str, Any],
    arms: Sequence[str],
    task: str,
    name: str,
    *,
    text: str | None = None,
    lower: bool = True,
    scale: float = 1.0,
    digits: int = 2,
    why: bool = False,
) -> list[TableCell]:
    """A measure of each arm on a task, mean ± standard deviation, best and second marked; `why`: or why there is none.

    Arms that never see the domain take no part in the ranking.
    """
    values = {arm: [scale * v for v in values_of(comparison, arm, task, name, text).values()] for arm in arms}
    tuned = [arm for arm in arms if arm not in untuned(comparison)]
    rounded = {arm: round(mean_sd(values[arm])[0], digits) for arm in tuned}
    looks = best_and_second(rounded, lower)
    status = {arm: status_of(comparison, arm, task) if why else "" for arm in arms}
    return [TableCell(status[arm] or mean_and_sd(values[arm], digits), looks.get(arm, "")) for arm in arms]


def best_and_second(values: Mapping[str, float], lower: bool) -> dict[str, Rank]:
    """Which arms are the best and the second; equal values share their place."""
    ranked = sorted({value for value in values.values() if math.isfinite(value)}, reverse=not lower)
    places: dict[float, Rank] = dict(zip(ranked, ("best", "second"), strict=False))
    return {arm: places.get(value, "") for arm, value in values.items()}


def status_of(comparison: Mapping[str, Any], arm: str, task: str) -> str:
    """Why an arm has no number on a task, briefly; empty where it has one."""
    cells = _chosen_or_all(comparison, arm, task)
    states = {cell["status"]: cell.get("error") for cell in cells}
    if "done" in states:
        return ""
    if "cannot" in states:
        reason = one_line(states["cannot"])
        return f"cannot run: {shorten(reason, _SHORT, placeholder='…')}" if reason else "cannot run"
    return "failed" if "failed" in states else NONE


def _chosen_or_all(comparison: Mapping[str, Any], arm: str, task: str) -> list[dict[str, Any]]:
    """The cells that a table shows; where no strength could be chosen, those that say why."""
    chosen = cells_of(comparison, arm, task)
    return chosen or [cell for cell in cells_of(comparison, arm, task, "all") if cell["status"] != "done"]


def unfinished(comparison: Mapping[str, Any], arms: Iterable[str]) -> list[str]:
    """A note for each arm and reason: which tasks, or seeds of a task, have no result, and the reason in full."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for arm in arms:
        for task in comparison["tasks"]:
            cells = _chosen_or_all(comparison, arm, task)
            partly = any(cell["status"] == "done" for cell in cells)
            for cell in cells:
                if cell["status"] != "done":
                    where = f"{task} seed {cell['seed']}" if partly and cell["seed"] is not None else task
                    found = places.setdefault((arm, cell["status"], one_line(cell.get("error"))), [])
                    found += [where] if where not in found else []
    words = {"cannot": "cannot run", "failed": "failed", "missing": "not run yet"}
    return [
        f"{arm}, {', '.join(where)}: {words.get(status, status)}{f': {reason}' if reason else ''}"
        for (arm, status, reason), where in places.items()
    ]
