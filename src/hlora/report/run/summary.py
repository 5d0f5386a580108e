"""The summary of a run: the main arm beside the base, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hlora.methods import STARTS, label_of
from hlora.report.format import number, percent
from hlora.report.run.measures import (
    DOMAIN_MEASURES,
    DRIFT,
    optional_value,
    rise_spread,
    shown_difference,
    shown_drift,
    shown_value,
)
from hlora.report.run.verdict import improved, main_arm


class Row(NamedTuple):
    """One measure of the summary, ready to print."""

    measure: str
    base: str
    before: str | None
    """Where the domain phase starts; None where that was not measured."""
    after: str
    change: str
    better: bool | None
    """Whether the change is an improvement beyond noise; None within it."""


def summary_rows(results: Mapping[str, Any]) -> list[Row]:
    """The measures of the main arm (HLoRA where it ran) beside the base and the model where the domain phase starts."""
    arms = results.get("arms") or {}
    base, general = arms.get("base") or {}, arms.get(_start(arms)) or {}
    main = main_arm(arms)
    tuned = arms.get(main) or {} if main else {}
    rows = []
    for text in base.get("texts") or tuned.get("texts") or {}:
        one, middle, other = ((each.get("texts") or {}).get(text) or {} for each in (base, general, tuned))
        better = improved(one, other, "nll", lower_is_better=True)
        for key, label in (("perplexity", f"perplexity, {text}"), ("bits_per_byte", f"bits per byte, {text}")):
            relative = (
                percent(number(other.get(key)) / (number(one.get(key)) or math.nan) - 1)
                if key in one and key in other
                else ""
            )
            rows.append(
                Row(
                    label, shown_value(one, key), optional_value(middle, key), shown_value(other, key), relative, better
                )
            )
        if "forgetting" in other:
            values = (
                shown_value(one, "forgetting"),
                optional_value(middle, "forgetting"),
                shown_value(other, "forgetting"),
            )
            rows.append(Row(f"forgetting, {text}", *values, f"{rise_spread(one, other)} nats".lstrip(), better))
        if "kl_from_base" in other:
            before = shown_drift(middle) if "kl_from_base" in middle else None
            rows.append(Row(f"{DRIFT}, {text}", "0", before, shown_drift(other), "nats", None))
    rows += _overall_forgetting(base, general, tuned)
    one, middle, other = (each.get("domain") or {} for each in (base, general, tuned))
    for key, (label, lower_is_better) in DOMAIN_MEASURES.items():
        if key in one or key in other:
            better = improved(one, other, key, lower_is_better)
            rows.append(
                Row(
                    label,
                    shown_value(one, key),
                    optional_value(middle, key),
                    shown_value(other, key),
                    shown_difference(one, other, key),
                    better,
                )
            )
    return rows


def _overall_forgetting(base: Mapping[str, Any], general: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[Row]:
    """Mean and worst forgetting over several texts; they have no noise of their own here, so no judgement either."""
    one, middle, other = (each.get("forgetting") or {} for each in (base, general, tuned))
    if not other or len(tuned["texts"]) < 2:
        return []
    return [
        Row(label, shown_value(one, key), optional_value(middle, key), shown_value(other, key), "nats", None)
        for key, label in (("mean", "forgetting, mean of texts"), ("worst", f"forgetting, worst text: {other['text']}"))
    ]


def _start(arms: Mapping[str, Any]) -> str:
    return next((name for name in STARTS if name in arms), STARTS[0])


def summary_table(results: Mapping[str, Any]) -> Table:
    """The measures for the terminal: base, before, after, change; green and red only beyond noise."""
    rows = summary_rows(results)
    arms = results.get("arms") or {}
    main, start = main_arm(arms), label_of(_start(arms)).lower()
    general = any(row.before is not None for row in rows)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)  # without borders a measure is one line of 80 columns
    table.add_column("measure", vertical="bottom")
    for heading in ("base", *([start] if general else []), f"after {label_of(main or '')}", "change"):
        table.add_column(Text(heading.strip().replace(" ", "\n")), justify="right", vertical="bottom")
    for row in rows:
        style = {True: "green", False: "red", None: "dim"}[row.better]
        middle = [row.before or "–"] if general else []
        table.add_row(*(Text(cell) for cell in (row.measure, row.base, *middle, row.after)), Text(row.change, style))
    return table
