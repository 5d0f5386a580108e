"""The measures of a run's arms in words: a value, its spread, its change against the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hlora.report.format import change, decimals, number, three_digits

DOMAIN_MEASURES = {
    "answer_nll": ("answer NLL, nats", True),
    "acc": ("accuracy, %", False),
    "acc_norm": ("accuracy by length, %", False),
    "exact_match": ("exact match, %", False),
}
"""Measure of the domain → its name with the unit, and whether lower is better."""


DRIFT = "drift from base"
"""Mean KL(base ‖ arm) over the tokens of a text and the whole vocabulary, nats a token. Lower is better."""


def shown_value(evaluation: Mapping[str, Any], key: str) -> str:
    """A measure in the digits that people read, – where it was not taken."""
    if key not in evaluation:
        return "–"
    value = number(evaluation[key])
    if not math.isfinite(value):
        return three_digits(value)
    if key in ("forgetting", "mean", "worst"):  # a rise: with its sign, to the digits of PEFT's own tables
        return "0" if value == 0 else f"{value:+.3f}".replace("-", "−")
    return f"{100 * value:.1f}" if key in ("acc", "acc_norm", "exact_match") else three_digits(value)


def optional_value(evaluation: Mapping[str, Any], key: str) -> str | None:
    """The same, None where it was not taken."""
    return shown_value(evaluation, key) if key in evaluation else None


def shown_spread(evaluation: Mapping[str, Any], key: str) -> str:
    """Its standard error."""
    stderr = number(evaluation.get(f"{key}_stderr"))
    if not math.isfinite(stderr):
        return ""
    return f"± {stderr:.2f}" if key == "answer_nll" else f"± {100 * stderr:.1f}"


def shown_drift(text: Mapping[str, Any], reference: str = "base") -> str:
    """The drift on a text from the base model, or from "general", the model after the general phase."""
    return decimals(number(text.get(f"kl_from_{reference}")), 4)


def rise_spread(base: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """Standard error of the forgetting on a text, nats/token: that of the paired differences where there are any."""
    stderr = change(base, text, "nll").stderr
    return f"± {stderr:.3f}" if math.isfinite(stderr) else ""


def shown_difference(base: Mapping[str, Any], arm: Mapping[str, Any], key: str) -> str:
    """Change in the measure's unit: nats, or points of a percentage."""
    if key not in base or key not in arm:
        return ""
    value = change(base, arm, key).value
    if not math.isfinite(value):
        return "not finite"
    return (f"{value:+.2f}" if key == "answer_nll" else f"{100 * value:+.1f} points").replace("-", "−")
