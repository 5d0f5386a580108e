"""The report of a comparison: one HTML page with the verdict first, then tables, figures and every cell's settings.

`comparison` is what comparison.json holds (see comparison.py), `cost` what cost.json holds (see cost.py).
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from hlora import figures, statistics
from hlora.measures import Measure, measures, t_tests, values
from hlora.report.page import write_page
from hlora.report.verdict import Tone, figure
from hlora.statistics import measure
from hlora.table_formats import Table

State = Literal["better", "worse", "same", "untested"]

_CAPTIONS = {
    "trade_off": (
        "Trade-off",
        "General perplexity against what was learned: a single point can be bought by pulling harder, a curve cannot. "
        "Each line goes through the strengths of an arm; lower is better, and left (answer NLL) or right (accuracy). "
        "A point is the mean over the seeds that have most strengths.",
    ),
    "figure_3_violins": (
        "Fig. 3. Over seeds",
        "Welch's t-test: p, p after Holm's correction over all panels, and Hedges' g (ours less the rival, in standard "
        "deviations). The short line is the mean. Fewer than three seeds have no violin.",
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


class Outcome(NamedTuple):
    """Our arm against another on one task by one measure, over seeds on test at the chosen strengths."""

    other: str
    task: str
    measure: Measure
    ours: float
    theirs: float
    state: State
    """better or worse: zero is outside the difference's 95 % interval. untested: no interval, for want of seeds."""
    ahead: bool
    """Whether our mean is on the better side, whatever the state."""


class ComparisonVerdict(NamedTuple):
    """Short plain sentences, wins and losses alike."""

    headline: str
    paragraphs: list[tuple[str, list[str]]]
    """A lead and its sentences: against the rival, the unprotected arm and Base, then where ours loses."""
    tone: Tone


def write_comparison_report(
    comparison: Mapping[str, Any],
    tables: Sequence[Table],
    drawn: Mapping[str, Figure],
    path: Path,
    cost: Mapping[str, Any] | None = None,
) -> None:
    """Write one HTML file without scripts and outside addresses, everything in it escaped.

    tables, drawn: those of tables.all_tables and comparison_figures.all_figures.
    """
    here = files(__package__)
    # The look and the macro `plain` are those of the report of one run: all of its page down to the end of its head.
    head = here.joinpath("template.html").read_text(encoding="utf-8").split("</head>")[0]
    body = here.joinpath("comparison.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    write_page(environment.from_string(head + body).render(_page(comparison, tables, drawn, cost or {})), path)


def outcomes(comparison: Mapping[str, Any]) -> list[Outcome]:
    """Ours against every other arm, on every task, by every measure that both have."""
    found = []
    for other in comparison["arms"]:
        for task in comparison["tasks"]:
            for what in measures(comparison):
                ours, theirs = (values(comparison, arm, task, what) for arm in (comparison["ours"], other))
                if other != comparison["ours"] and ours and theirs:
                    found.append(_outcome(comparison, other, task, what, ours, theirs))
    return found


def _outcome(
    comparison: Mapping[str, Any], other: str, task: str, what: Measure, ours: list[float], theirs: list[float]
) -> Outcome:
    means = statistics.mean_sd(ours)[0], statistics.mean_sd(theirs)[0]
    ahead = (means[0] < means[1]) == what.lower_is_better
    state: State = "better" if ahead else "worse"
    diverged = [not all(map(math.isfinite, side)) for side in (ours, theirs)]
    if any(diverged):  # no interval; whoever stayed finite wins
        state = "same" if all(diverged) else "worse" if diverged[0] else "better"
        return Outcome(other, task, what, *means, state, ahead=not diverged[0])
    if other in statistics.untuned(comparison, "base"):  # no seeds: a constant
        _, low, high = statistics.interval_of_paired(ours, theirs[:1] * len(ours))
    else:
        test = statistics.welch(ours, theirs)
        low, high = test.low, test.high
    if math.isnan(low):
        state = "untested"
    elif low <= 0 <= high:
        state = "same"
    return Outcome(other, task, what, *means, state, ahead)


def comparison_verdict(comparison: Mapping[str, Any]) -> ComparisonVerdict:
    """Whether ours keeps more than the rival, the unprotected arm, Base and all others, and at what accuracy."""
    found = outcomes(comparison)
    ours, rival, unprotected = comparison["ours"], comparison["rival"], comparison["unprotected"]
    if not found:
        nothing = f"{ours} and the arms beside it have no finished cells in common, so there is nothing to compare yet."
        return ComparisonVerdict(nothing, [], "unknown")
    bases = statistics.untuned(comparison, "base")
    against = [arm for arm in dict.fromkeys([rival, unprotected, *bases]) if any(o.other == arm for o in found)]
    p_values = {(test.task, test.measure): (test.welch.p, test.p_holm) for test in t_tests(comparison)}
    paragraphs = [
        (f"Against {arm}", _against([o for o in found if o.other == arm], p_values if arm == rival else {}))
        for arm in against
    ]
    paragraphs += _losses(comparison, found)
    first = next((arm for arm in (rival, unprotected) if arm in against), found[0].other)
    headline = _headline(comparison, first, [outcome for outcome in found if outcome.other == first])
    mattering = [o for o in found if o.other in (first, unprotected)]
    return ComparisonVerdict(headline, paragraphs, _tone(mattering))


def _headline(comparison: Mapping[str, Any], other: str, found: list[Outcome]) -> str:
    ours, tasks = comparison["ours"], len(comparison["tasks"])
    texts = dict.fromkeys(outcome.measure for outcome in found if outcome.measure.text is not None)
    kept = " and ".join(f"{_kept([o for o in found if o.measure == text], tasks)} on {text.text}" for text in texts)
    learned = [o for o in found if o.measure.name == "acc"] or [o for o in found if o.measure.name == "answer_nll"]
    lower = sum(outcome.state == "worse" for outcome in learned)
    name = "accuracy" if learned and learned[0].measure.name == "acc" else "domain likelihood"
    if not learned:
        at = "the domain was not measured"
    elif lower:
        at = f"at lower {name}" + (f" on {lower} of {len(learned)} tasks" if lower < len(learned) else "")
    elif any(outcome.state == "untested" for outcome in learned):
        at = f"{name} untested"
    else:
        at = f"with no loss of {name} beyond noise"
    return f"Against {other}, {ours} keeps {kept}, {at}." if kept else f"Against {other}, {ours}: {at}."


def _kept(found: list[Outcome], tasks: int) -> str:
    """more, less, as much, … over the tasks of one text, with their numbers unless it is so on every task."""
    words = {"better": "more", "worse": "less", "same": "as much within noise"}
    told = [words.get(o.state, "more, untested" if o.ahead else "less, untested") for o in found]
    counts = {word: told.count(word) for word in (*words.values(), *told) if word in told}
    return ", ".join(f"{word} ({n} of {tasks} tasks)" if n < tasks else word for word, n in counts.items())


def _against(found: list[Outcome], p_values: Mapping[Any, tuple[float, float]]) -> list[str]:
    """A sentence for each measure against one arm, task by task."""
    sentences = []
    for what in dict.fromkeys(outcome.measure for outcome in found):
        groups: dict[str, list[str]] = {}
        for outcome in found:
            if outcome.measure == what:
                p, p_holm = p_values.get((outcome.task, what), (math.nan, math.nan))
                tested = "" if math.isnan(p) else f"; p\u00a0{_p(p)}, Holm\u00a0{_p(p_holm)}"
                shown = f"{outcome.task} ({_value(what, outcome.ours)} against {_value(what, outcome.theirs)}{tested})"
                groups.setdefault(_state_words(outcome), []).append(shown)
        told = "; ".join(f"{words} on {', '.join(tasks)}" for words, tasks in groups.items())
        sentences.append(f"{_title(what)}: {told}.")
    return sentences


def _losses(comparison: Mapping[str, Any], found: list[Outcome]) -> list[tuple[str, list[str]]]:
    """To whom ours loses beyond noise, and where it is behind untested."""
    ours = comparison["ours"]
    lost = _by_measure(comparison, [o for o in found if o.state == "worse"])
    untested = _by_measure(comparison, [o for o in found if o.state == "untested" and not o.ahead])
    tested = any(outcome.state != "untested" for outcome in found)
    none = "To no arm, by no measure." if tested else "Not known: too few seeds to test."
    paragraphs = [(f"Where {ours} loses beyond noise", lost or [none])]
    return [*paragraphs, ("Where it is behind, with too few seeds to test", untested)] if untested else paragraphs


def _by_measure(comparison: Mapping[str, Any], losing: list[Outcome]) -> list[str]:
    """For each measure the arms that ours loses to, those on every task first."""
    sentences = []
    for what in measures(comparison):
        everywhere, partly = [], []
        for arm in dict.fromkeys(o.other for o in losing if o.measure == what):
            tasks = [o.task for o in losing if o.other == arm and o.measure == what]
            if len(tasks) == len(comparison["tasks"]):
                everywhere.append(arm)
            else:
                partly.append(f"{arm} ({', '.join(tasks)})")
        parts = [f"{', '.join(everywhere)} on every task"] if everywhere else []
        parts += [", ".join(partly)] if partly else []
        sentences += [f"{_title(what)}: to {'; '.join(parts)}."] if parts else []
    return sentences


def _tone(found: list[Outcome]) -> Tone:
    states = {o.state for o in found if o.measure.text is not None}
    lost = "worse" in states or any(o.state == "worse" for o in found if o.measure.name == "acc")
    if states <= {"untested"}:
        return "unknown"
    if lost:
        return "mixed" if "better" in states else "bad"
    return "good" if states == {"better"} else "mixed"


def _state_words(outcome: Outcome) -> str:
    lower = outcome.ahead == outcome.measure.lower_is_better
    direction = "lower" if lower else "higher"
    return {"same": "no difference beyond noise", "untested": f"{direction}, untested,"}.get(outcome.state, direction)


def _name(what: Measure) -> str:
    if what.text is not None:
        return f"perplexity on {what.text}"
    return "accuracy" if what.name == "acc" else "answer NLL"


def _title(what: Measure) -> str:
    name = _name(what)
    return name[0].upper() + name[1:]


def _value(what: Measure, value: float) -> str:
    return f"{value:.1f} %" if what.name == "acc" and math.isfinite(value) else figure(value)


def _p(p: float) -> str:
    return "<\u00a00.001" if p < 0.001 else f"{p:.3f}"


def _page(
    comparison: Mapping[str, Any], tables: Sequence[Table], drawn: Mapping[str, Figure], cost: Mapping[str, Any]
) -> dict[str, Any]:
    """What the template shows, as plain values."""
    cells = comparison["cells"]
    command = str(comparison.get("command") or "hlora compare CONFIG")
    return {
        "verdict": comparison_verdict(comparison),
        "seeds": len(comparison["seeds"]),
        "ours": comparison["ours"],
        "measures": [_name(what) for what in measures(comparison)],
        "against": _against_all(comparison),
        "tables": [
            # A reason may take several lines, a number may not.
            (table.labels, Markup(table.html().replace("<td>cannot run", '<td class="reason">cannot run')))
            for table in tables
        ],
        "figures": [(*_CAPTIONS[name], Markup(figures.svg(each))) for name, each in drawn.items()],
        "cost": cost,
        "texts": comparison["texts"],
        "undone": [_cell(comparison, cell) for cell in cells if cell["status"] != "done"],
        "statuses": {cell["status"] for cell in cells},
        "cells": [_cell(comparison, cell) for cell in cells if cell["status"] == "done"],
        "provenance": comparison.get("provenance") or {},
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
        "values": [*perplexities, _number(measure(cell, "answer_nll")), "–" if acc is None else f"{100 * acc:.1f}"],
        "seconds": [f"{seconds[key]:.0f}" if key in seconds else "–" for key in ("train", "evaluate")],
        "error": cell.get("error") or "",
        "traceback": cell.get("traceback") or "",
        "key": cell.get("key") or "",
        "config": Markup(html.escape(settings, quote=False)),
    }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if abs(value) < 1e4 else figure(value)
