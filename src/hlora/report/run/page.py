"""One HTML page that opens anywhere: the verdict first, then the evidence, then how to repeat it.

`results` is what results.json holds; any part may be missing:

arms         arm → {texts: {name: {perplexity, bits_per_byte, nll, nll_stderr, forgetting, kl_from_base,
             kl_from_general, each with _stderr, tokens, bytes}}, drift_left_out: why one of the two is missing,
             forgetting: {mean, worst, text} over the texts, text names the worst,
             domain: {rows, answer_nll, acc, acc_norm, exact_match, each with _stderr, generated},
             samples: [{prompt, expected, answer}]}; `base` is what all are compared with
seconds      phase → seconds
history      phase → Trainer's log entries; eval_loss and probe_rise after an evaluation
chain        of a run after another: domains, and measures by domain: base, before (its own phase), after (by step),
             forgetting (by step)
importance   Importance.describe() and layer_weights
provenance   versions, seed, hardware, data; nested plain values
config       the resolved configuration
command      what repeats the run
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hlora.methods import label_of
from hlora.report.drawing import draw
from hlora.report.format import change, duration, number, percent, size, three_digits
from hlora.report.heatmap import importance_heatmap
from hlora.report.page import about, render, write_page
from hlora.report.run.chain import chain_picture, chain_tables, general_forgetting
from hlora.report.run.figures import budget_curves, forgetting_picture, loss_curves
from hlora.report.run.measures import (
    DOMAIN_MEASURES,
    DRIFT,
    rise_spread,
    shown_difference,
    shown_drift,
    shown_spread,
    shown_value,
)
from hlora.report.run.verdict import improved, main_arm, verdict
from hlora.report.run.while_training import evaluations, learning_and_forgetting
from hlora.report.style import phase_label
from hlora.system.redaction import redacted


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write report.html: one file without scripts and outside addresses, everything in it escaped."""
    write_page(render(__package__, _page(redacted(results))), path)


def _page(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows, as plain values."""
    arms = results.get("arms") or {}
    importance = results.get("importance") or {}
    history = {phase: entries for phase, entries in (results.get("history") or {}).items() if entries}
    norms = importance.get("layer_norms") or {}
    steered: Any = next((entries for entries in history.values() if any("budget" in entry for entry in entries)), [])
    losses = {phase: [e for e in entries if "loss" in e or "eval_loss" not in e] for phase, entries in history.items()}
    watched = evaluations(history.get("tune") or [])
    heading, numbers = _numbers(arms)
    domain = (results.get("config") or {}).get("domain") or {}
    named = [str(domain[key]) for key in ("task", "train") if domain.get(key)]
    title, facts = about("hlora report", results.get("config") or {}, results.get("provenance") or {}, named)
    config = json.loads(json.dumps(results.get("config") or {}, default=str))
    return {
        "title": title,
        "facts": facts,
        "verdict": verdict(results),
        "forgetting": draw(forgetting_picture(arms)).html if len(arms) > 1 else None,
        "chain": chain_tables(results["chain"]) if "chain" in results else [],
        "chain_picture": draw(chain_picture(results["chain"])).html if "chain" in results else None,
        "chain_forgetting": general_forgetting(results["chain"]) if "chain" in results else "",
        "heading": heading,
        "numbers": numbers,
        "costs": _costs(results),
        "while_training": draw(learning_and_forgetting(watched)).html if watched else None,
        "curves": draw(loss_curves(losses)).html if history else None,
        "budget": draw(budget_curves(steered)).html if steered else None,
        "heatmap": draw(importance_heatmap(norms)).html if norms else None,
        "weights": _weights(importance),
        "sample_arms": [label_of(arm) for arm in arms if arms[arm].get("samples")],
        "samples": _samples(arms),
        "left_out": _left_out((results.get("provenance") or {}).get("data") or {}),
        "provenance": results.get("provenance") or {},
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        "command": results.get("command") or "",
    }


def _numbers(arms: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Column names and, for each arm, cells of a value, a note to it, its change against base and whether better."""
    texts = list(dict.fromkeys(text for arm in arms.values() for text in arm.get("texts") or {}))
    measures = [key for key in DOMAIN_MEASURES if any(key in (arm.get("domain") or {}) for arm in arms.values())]
    scored = [text for arm in arms.values() for text in (arm.get("texts") or {}).values()]
    columns = ["perplexity", *(["forgetting"] if any("forgetting" in text for text in scored) else [])]
    columns += [DRIFT] if any("kl_from_base" in text for text in scored) else []
    heading = [f"{column}, {text}" for text in texts for column in columns]
    heading += [DOMAIN_MEASURES[key][0] for key in measures]
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
            bits = f"{shown_value(other, 'bits_per_byte')} bits/byte" if "bits_per_byte" in other else ""
            cells.append({"value": shown_value(other, "perplexity"), "note": bits, "change": shown, "better": better})
            if "forgetting" in columns:
                spread = "" if name == "base" else rise_spread(one, other)
                cells.append(
                    {"value": shown_value(other, "forgetting"), "note": spread, "change": "", "better": better}
                )
            if DRIFT in columns:
                general = (
                    f"{shown_drift(other, 'general')} from the general phase" if "kl_from_general" in other else ""
                )
                shown = "0" if name == "base" else shown_drift(other)
                cells.append({"value": shown, "note": general, "change": "nats a token", "better": None})
        one, other = base.get("domain") or {}, arm.get("domain") or {}
        for key in measures:
            better = improved(one, other, key, DOMAIN_MEASURES[key][1])
            shown = "" if name == "base" else shown_difference(one, other, key)
            cells.append(
                {"value": shown_value(other, key), "note": shown_spread(other, key), "change": shown, "better": better}
            )
        rows.append({"label": label_of(name), "main": name == main_arm(arms), "cells": cells})
    return heading, rows


def _costs(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it took: seconds of each phase, and size and making of the importance."""
    importance = results.get("importance") or {}
    rows = [(phase_label(phase), duration(number(value))) for phase, value in (results.get("seconds") or {}).items()]
    if "bytes" in importance:
        rows.append(
            (f"Importance, {importance.get('encoding', 'encoding unknown')}", size(number(importance["bytes"])))
        )
    for key, label in (("method", "Importance is"), ("recorded", "Recorded")):
        if key in importance:
            rows.append((label, str(importance[key]).replace("_", " ")))
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
            "norm": three_digits(number(norms[name])) if name in norms else "–",
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
            answers.setdefault(key, {})[name] = str(sample.get("answer", "")).strip() or "(nothing)"
    shown = [arm for arm in arms if arms[arm].get("samples")]
    return [
        {"prompt": prompt, "expected": expected, "answers": [by_arm.get(arm, "–") for arm in shown]}
        for (prompt, expected), by_arm in answers.items()
    ]
