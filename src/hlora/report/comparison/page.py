"""The report of a comparison: one HTML page with the verdict first, then tables, figures and every cell's settings.

`comparison` is what comparison.json holds (see cells.py), `cost` what cost.json holds (see comparison/cost.py).
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from hlora.report.comparison.cells import measure
from hlora.report.comparison.measures import measures
from hlora.report.comparison.table_formats import Table
from hlora.report.comparison.verdict import comparison_verdict, name_of, outcomes
from hlora.report.drawing import Drawing
from hlora.report.format import decimals
from hlora.report.page import about, render, write_page

_CAPTIONS = {
    "trade_off": (
        "Trade-off",
        "General perplexity against what was learned: a single point can be bought by pulling harder, a curve cannot. "
        "Each line goes through the strengths of an arm; lower is better, and left (answer NLL) or right (accuracy). "
        "A point is the mean over the seeds that have every strength.",
    ),
    "figure_3_violins": (
        "Fig. 3. Over seeds",
        "Welch's t-test over seeds and test questions: p, p after Holm's correction over all panels, and Hedges' g "
        "(ours less the rival, in standard deviations over seeds). The short line is the mean. What is drawn is "
        "the spread over seeds; the test also counts the questions. Fewer than three seeds have no violin.",
    ),
    "figure_4_training_curves": (
        "Fig. 4. Training",
        "Mean over seeds; the band is their range.",
    ),
    "figure_5_cost": (
        "Fig. 5. Cost of importance",
        "Measured at the sequences written beside the bars, on log axes.",
    ),
    "figure_6_strength": (
        "Fig. 6. Strength",
        "On test. The unit of a strength is each method's own.",
    ),
    "figure_7_importance": (
        "Fig. 7. Where the general knowledge is",
        "Mean over seeds. The brighter, the more the penalty holds on to that matrix.",
    ),
}


def write_comparison_report(
    comparison: Mapping[str, Any],
    tables: Sequence[Table],
    drawings: Mapping[str, Drawing],
    path: Path,
    cost: Mapping[str, Any] | None = None,
) -> None:
    """Write one HTML file without scripts and outside addresses, everything in it escaped.

    Args:
        tables: those of tables.all_tables.
        drawings: file name → drawing of each of figures.all_figures.
        cost: what cost.json holds.
    """
    write_page(render(__package__, _page(comparison, tables, drawings, cost or {})), path)


def _page(
    comparison: Mapping[str, Any], tables: Sequence[Table], drawings: Mapping[str, Drawing], cost: Mapping[str, Any]
) -> dict[str, Any]:
    """What the template shows, as plain values."""
    cells = comparison["cells"]
    provenance = comparison.get("provenance") or {}
    title, facts = about("hlora comparison", comparison.get("config") or {}, provenance, comparison["tasks"])
    command = str(comparison.get("command") or "hlora compare CONFIG")
    return {
        "title": title,
        "facts": facts,
        "verdict": comparison_verdict(comparison),
        "seeds": len(comparison["seeds"]),
        "ours": comparison["ours"],
        "measures": [name_of(what) for what in measures(comparison)],
        "against": _against_all(comparison),
        "tables": [
            # A reason may take several lines, a number may not.
            (table.title, table.labels, Markup(table.html().replace("<td>cannot run", '<td class="reason">cannot run')))
            for table in tables
        ],
        "figures": [(*_CAPTIONS[name], drawing.html) for name, drawing in drawings.items()],
        "cost": cost,
        "texts": comparison["texts"],
        "undone": [_cell(comparison, cell) for cell in cells if cell["status"] != "done"],
        "statuses": {cell["status"] for cell in cells},
        "cells": [_cell(comparison, cell) for cell in cells if cell["status"] == "done"],
        "provenance": provenance,
        "config": yaml.safe_dump(
            json.loads(json.dumps(comparison.get("config") or {}, default=str)), sort_keys=False, allow_unicode=True
        ),
        "command": command,
        "retry": command if "--retry" in command.split() else f"{command} --retry",
    }


def _against_all(comparison: Mapping[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """Other arm → for each measure how often ours is better and worse over the tasks."""
    found = outcomes(comparison)
    rows = []
    for arm in comparison["arms"]:
        if arm == comparison["ours"]:
            continue
        cells = []
        for what in measures(comparison):
            states = [o.state for o in found if o.other == arm and o.measure == what]
            better, worse = states.count("better"), states.count("worse")
            untested = states.count("untested")
            parts = [f"{count} {word}" for count, word in ((better, "better"), (worse, "worse")) if count]
            parts += [f"{untested} untested"] if untested else []
            text = f"{', '.join(parts)} of {len(states)}" if parts else "within noise" if states else "–"
            look = "better" if better and not worse else "worse" if worse and not better else "same"
            cells.append({"text": text, "look": look})
        rows.append((arm, cells))
    return rows


def _cell(comparison: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Any]:
    """One cell's row. Its settings are JSON, in which only what HTML requires is escaped, to keep the page small."""
    settings = json.dumps(cell.get("config") or {}, indent=1, ensure_ascii=False, default=str)
    chosen = comparison["chosen"].get(cell["arm"], {}).get(cell["task"])
    seconds = cell.get("seconds") or {}
    perplexities = [_number(measure(cell, "perplexity", text)) for text in comparison["texts"]]
    acc = measure(cell, "acc")
    return {
        "arm": cell["arm"],
        "task": cell["task"],
        "seed": "–" if cell.get("seed") is None else cell["seed"],
        "strength": "–" if cell.get("strength") is None else f"{cell['strength']:g}",
        "chosen": cell.get("strength") is not None and cell["strength"] == chosen,
        "status": {"cannot": "cannot run", "missing": "not run yet"}.get(cell["status"], cell["status"]),
        "values": [*perplexities, _number(measure(cell, "answer_nll")), _number(None if acc is None else 100 * acc, 1)],
        "seconds": [f"{seconds[key]:.0f}" if key in seconds else "–" for key in ("train", "evaluate")],
        "error": cell.get("error") or "",
        "traceback": cell.get("traceback") or "",
        "key": cell.get("key") or "",
        "config": Markup(html.escape(settings, quote=False)),
    }


def _number(value: float | None, digits: int = 2) -> str:
    return decimals(math.nan if value is None else value, digits)
