"""One HTML page that opens anywhere: the verdict first, then the evidence, then how to repeat it.

`results` is what results.json holds; any part may be missing:

arms         arm → {texts: {name: {perplexity, bits_per_byte, nll, nll_stderr, forgetting, tokens, bytes}},
             forgetting: {mean, worst, text} over the texts, text names the worst,
             domain: {rows, answer_nll, acc, acc_norm, exact_match, each with _stderr, generated},
             samples: [{prompt, expected, answer}]}; `base` is what all are compared with
seconds      phase → seconds
history      phase → Trainer's log entries
importance   Importance.describe() and layer_weights
provenance   versions, seed, hardware, data; nested plain values
config       the resolved configuration
command      what repeats the run
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from hlora import figures
from hlora.figures import arm_label, change, number, phase_label
from hlora.redaction import redacted
from hlora.report.page import write_page
from hlora.report.verdict import Verdict, figure, improved, main_arm, percent, verdict

__all__ = ["Row", "Verdict", "summary_rows", "summary_table", "verdict", "write_report"]

_DOMAIN_MEASURES = {
    "answer_nll": ("answer NLL, nats", True),
    "acc": ("accuracy, %", False),
    "acc_norm": ("accuracy by length, %", False),
    "exact_match": ("exact match, %", False),
}


class Row(NamedTuple):
    """One measure of the summary, ready to print."""

    measure: str
    base: str
    before: str | None
    """After the general phase, where the domain phase starts; None where it was not measured."""
    after: str
    change: str
    better: bool | None
    """Whether the change is an improvement beyond noise; None within it."""


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write report.html: one file without scripts and outside addresses, everything in it escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__name__).joinpath("template.html").read_text(encoding="utf-8"))
    write_page(template.render(_page(redacted(results))), path)


def summary_rows(results: Mapping[str, Any]) -> list[Row]:
    """The measures of the main arm (HLoRA where it ran) beside the base and the model after the general phase."""
    arms = results.get("arms") or {}
    base, general = arms.get("base") or {}, arms.get("after_general") or {}
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
            rows.append(Row(label, _value(one, key), _optional(middle, key), _value(other, key), relative, better))
        if "forgetting" in other:
            values = (_value(one, "forgetting"), _optional(middle, "forgetting"), _value(other, "forgetting"))
            rows.append(Row(f"forgetting, {text}", *values, f"{_rise_spread(one, other)} nats".lstrip(), better))
    rows += _overall_forgetting(base, general, tuned)
    one, middle, other = (each.get("domain") or {} for each in (base, general, tuned))
    for key, (label, lower_is_better) in _DOMAIN_MEASURES.items():
        if key in one or key in other:
            better = improved(one, other, key, lower_is_better)
            rows.append(
                Row(
                    label,
                    _value(one, key),
                    _optional(middle, key),
                    _value(other, key),
                    _difference(one, other, key),
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
        Row(label, _value(one, key), _optional(middle, key), _value(other, key), "nats", None)
        for key, label in (("mean", "forgetting, mean of texts"), ("worst", f"forgetting, worst text: {other['text']}"))
    ]


def summary_table(results: Mapping[str, Any]) -> Table:
    """The summary for the terminal: base, before, after, change; green and red only beyond noise."""
    rows = summary_rows(results)
    main = main_arm(results.get("arms") or {})
    general = any(row.before is not None for row in rows)
    table = Table(title=Text(verdict(results).headline), title_justify="left")
    table.add_column("measure")
    for heading in ("base", *(["after general phase"] if general else []), f"after {arm_label(main or '')}", "change"):
        table.add_column(Text(heading.strip()), justify="right")
    for row in rows:
        style = {True: "green", False: "red", None: "dim"}[row.better]
        middle = [row.before or "–"] if general else []
        table.add_row(*(Text(cell) for cell in (row.measure, row.base, *middle, row.after)), Text(row.change, style))
    return table


def _page(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows, as plain values."""
    arms = results.get("arms") or {}
    importance = results.get("importance") or {}
    history = {phase: entries for phase, entries in (results.get("history") or {}).items() if entries}
    norms = importance.get("layer_norms") or {}
    steered: Any = next(
        (entries for entries in history.values() if any("probe_rise" in entry for entry in entries)), []
    )
    heading, numbers = _numbers(arms)
    config = json.loads(json.dumps(results.get("config") or {}, default=str))
    return {
        "verdict": verdict(results),
        "forgetting": Markup(figures.svg(figures.forgetting_picture(arms))) if len(arms) > 1 else None,
        "heading": heading,
        "numbers": numbers,
        "costs": _costs(results),
        "curves": Markup(figures.svg(figures.loss_curves(history))) if history else None,
        "budget": Markup(figures.svg(figures.budget_curves(steered))) if steered else None,
        "heatmap": Markup(figures.svg(figures.importance_heatmap(norms))) if norms else None,
        "weights": _weights(importance),
        "sample_arms": [arm_label(arm) for arm in arms if arms[arm].get("samples")],
        "samples": _samples(arms),
        "left_out": _left_out((results.get("provenance") or {}).get("data") or {}),
        "provenance": results.get("provenance") or {},
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        "command": results.get("command") or "",
    }


def _numbers(arms: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Column names and, for each arm, cells of a value, a note to it, its change against base and whether better."""
    texts = list(dict.fromkeys(text for arm in arms.values() for text in arm.get("texts") or {}))
    measures = [key for key in _DOMAIN_MEASURES if any(key in (arm.get("domain") or {}) for arm in arms.values())]
    scored = [text for arm in arms.values() for text in (arm.get("texts") or {}).values()]
    columns = ["perplexity", *(["forgetting"] if any("forgetting" in text for text in scored) else [])]
    heading = [f"{column}, {text}" for text in texts for column in columns]
    heading += [_DOMAIN_MEASURES[key][0] for key in measures]
    base = arms.get("base") or {}
    rows = []
    for name, arm in arms.items():
        cells = []
        for text in texts:
            one, other = ((each.get("texts") or {}).get(text) or {} for each in (base, arm))
            better = improved(one, other, "nll", lower_is_better=True)
            rise = change(one, other, "nll")
            shown = (
                ""
                if name == "base" or "nll" not in one or "nll" not in other
                else percent(math.expm1(min(rise.value, 700)))
            )
            bits = f"{_value(other, 'bits_per_byte')} bits/byte" if "bits_per_byte" in other else ""
            cells.append({"value": _value(other, "perplexity"), "note": bits, "change": shown, "better": better})
            if "forgetting" in columns:
                spread = "" if name == "base" else _rise_spread(one, other)
                cells.append({"value": _value(other, "forgetting"), "note": spread, "change": "", "better": better})
        one, other = base.get("domain") or {}, arm.get("domain") or {}
        for key in measures:
            better = improved(one, other, key, _DOMAIN_MEASURES[key][1])
            shown = "" if name == "base" else _difference(one, other, key)
            cells.append({"value": _value(other, key), "note": _spread(other, key), "change": shown, "better": better})
        rows.append({"label": arm_label(name), "main": name == main_arm(arms), "cells": cells})
    return heading, rows


def _value(evaluation: Mapping[str, Any], key: str) -> str:
    if key not in evaluation:
        return "–"
    value = number(evaluation[key])
    if key in ("forgetting", "mean", "worst") and math.isfinite(
        value
    ):  # a rise: with its sign, to the digits of PEFT's own tables
        return "0" if value == 0 else f"{value:+.3f}".replace("-", "−")
    return f"{100 * value:.1f}" if key in ("acc", "acc_norm", "exact_match") and math.isfinite(value) else figure(value)


def _optional(evaluation: Mapping[str, Any], key: str) -> str | None:
    return _value(evaluation, key) if key in evaluation else None


def _spread(evaluation: Mapping[str, Any], key: str) -> str:
    stderr = number(evaluation.get(f"{key}_stderr"))
    if not math.isfinite(stderr):
        return ""
    return f"± {stderr:.2f}" if key == "answer_nll" else f"± {100 * stderr:.1f}"


def _rise_spread(base: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """Standard error of the forgetting on a text, nats/token: that of the paired differences where there are any."""
    stderr = change(base, text, "nll").stderr
    return f"± {stderr:.3f}" if math.isfinite(stderr) else ""


def _difference(base: Mapping[str, Any], arm: Mapping[str, Any], key: str) -> str:
    """Change in the measure's unit: nats, or points of a percentage."""
    if key not in base or key not in arm:
        return ""
    value = change(base, arm, key).value
    if not math.isfinite(value):
        return "not finite"
    return (f"{value:+.2f}" if key == "answer_nll" else f"{100 * value:+.1f} points").replace("-", "−")


def _costs(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it took: seconds of each phase, and size and making of the importance."""
    importance = results.get("importance") or {}
    rows = [(phase_label(phase), _duration(number(value))) for phase, value in (results.get("seconds") or {}).items()]
    if "bytes" in importance:
        rows.append(
            (f"Importance, {importance.get('encoding', 'encoding unknown')}", _size(number(importance["bytes"])))
        )
    for key, label in (
        ("steps", "Steps recorded"),
        ("skipped_steps", "Steps skipped (gradient not finite)"),
        ("xi", "ξ (Eq. 13)"),
        ("undo_cost", "Cost of undoing the general phase, Σ Ω Δ²"),
    ):
        if key in importance:
            rows.append((label, str(importance[key]) if "steps" in key else f"{number(importance[key]):.3g}"))
    if "clamped_share" in importance:
        rows.append(
            ("Importance clamped at zero", f"{100 * number(importance['clamped_share']):.2g} % of the elements")
        )
    return rows


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "not measured"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{figure(count / size)} {unit}"
    return f"{count:.0f} bytes"


def _weights(importance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Layer weights c_l from the largest, each with the width of its bar in % and the norm beside it."""
    norms = importance.get("layer_norms") or {}
    weights = {name: number(weight) for name, weight in (importance.get("layer_weights") or {}).items()}
    top = max((weight for weight in weights.values() if math.isfinite(weight)), default=0.0)
    order = sorted(weights, key=lambda name: -weights[name] if math.isfinite(weights[name]) else math.inf)
    return [
        {
            "name": name,
            "weight": f"{weights[name]:.3g}",
            "width": round(100 * weights[name] / top, 1) if top > 0 and math.isfinite(weights[name]) else 0,
            "norm": figure(number(norms[name])) if name in norms else "–",
        }
        for name in order
    ]


def _left_out(facts: Mapping[str, Any]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Rows that could not be used, by file: its name, how many by kind of reason, and the first ones with theirs."""
    shown = []
    for part in ("general", "domain"):
        for source, found in ((facts.get(part) or {}).get("unusable") or {}).items():
            kinds = ", ".join(f"{count} {kind}" for kind, count in found["reasons"].items())
            listed = [(row.removeprefix("row "), reason) for row, reason in found["first"].items()]
            shown.append((source, f"{found['rows']} of {found['of']} rows: {kinds}", listed))
    return shown


def _samples(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Questions with the answer of each arm that has samples, matched by prompt and expected answer."""
    answers: dict[tuple[str, str], dict[str, str]] = {}
    for name, arm in arms.items():
        for sample in arm.get("samples") or []:
            key = (str(sample.get("prompt", "")), str(sample.get("expected", "")))
            answers.setdefault(key, {})[name] = str(sample.get("answer", ""))
    shown = [arm for arm in arms if arms[arm].get("samples")]
    return [
        {"prompt": prompt, "expected": expected, "answers": [by_arm.get(arm, "–") for arm in shown]}
        for (prompt, expected), by_arm in answers.items()
    ]
