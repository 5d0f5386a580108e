"""The outcome in plain words: forgotten or kept, learned or not, each beyond the noise of the measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hlora.methods import label_of
from hlora.report.format import Tone, change, number, percent, three_digits

Kept = Literal["kept", "forgotten in part", "forgotten", "not measured"]
Learned = Literal["learned", "mixed", "nothing", "worse", "not measured"]

_KEPT_HEADLINE: dict[Kept, str] = {
    "kept": "Kept what it knew.",
    "forgotten in part": "Forgot part of what it knew.",
    "forgotten": "Forgot what it knew.",
    "not measured": "Forgetting was not measured.",
}
_LEARNED_HEADLINE: dict[Learned, str] = {
    "learned": "Learned the domain.",
    "mixed": "Learned the domain by one measure, lost by another.",
    "nothing": "Learned nothing.",
    "worse": "Got worse at the domain.",
    "not measured": "Learning was not measured.",
}
_LEARNED_START: dict[Learned, str] = {
    "learned": "Learned",
    "mixed": "Mixed",
    "nothing": "Learned nothing beyond noise",
    "worse": "Got worse",
    "not measured": "Learning was not measured",
}


@dataclass(frozen=True)
class Verdict:
    """Short plain sentences, and the states they were made from."""

    headline: str
    kept: str
    learned: str
    beside: tuple[str, ...]
    """One line for each other arm, the same two sentences."""
    kept_state: Kept
    learned_state: Learned
    tone: Tone


def verdict(results: Mapping[str, Any]) -> Verdict:
    """What became of general ability and of the domain, for HLoRA (or the last arm) against the base model.

    Forgotten: the loss on a text rose by more than two standard errors. Learned: answer NLL or accuracy improved by
    more than two, and neither got worse by as much. What is no longer a finite number counts as lost.
    """
    arms = results.get("arms") or {}
    main = main_arm(arms)
    if main is None:
        nothing = "Only the base model was evaluated, so there is nothing to compare yet."
        return Verdict(nothing, "", "", (), "not measured", "not measured", "unknown")
    base = arms.get("base") or {}
    kept_state, kept = _kept(base, arms[main])
    learned_state, learned = _learned(base, arms[main])
    others = [arm for arm in arms if arm not in ("base", "after_general", main)]
    beside = [
        f"{label_of(arm)} on the same data. {_kept(base, arms[arm])[1]} {_learned(base, arms[arm])[1]}"
        for arm in others
    ]
    headline = f"{_KEPT_HEADLINE[kept_state]} {_LEARNED_HEADLINE[learned_state]}"
    return Verdict(headline, kept, learned, tuple(beside), kept_state, learned_state, _tone(kept_state, learned_state))


def main_arm(arms: Mapping[str, Any]) -> str | None:
    """The arm that the verdict is about: HLoRA where it ran, else the last one that is not the base."""
    tuned = [arm for arm in arms if arm != "base"]
    return "hlora" if "hlora" in tuned else tuned[-1] if tuned else None


def improved(base: Mapping[str, Any], arm: Mapping[str, Any], measure: str, lower_is_better: bool) -> bool | None:
    """True or False when the measure improved or got worse beyond noise, None when neither or not comparable."""
    if not math.isfinite(number(base.get(measure))) or measure not in arm:
        return None
    difference = change(base, arm, measure)
    if not math.isfinite(difference.value):
        return False
    if abs(difference.value) <= difference.noise:
        return None
    return (difference.value < 0) == lower_is_better


def _kept(base: Mapping[str, Any], arm: Mapping[str, Any]) -> tuple[Kept, str]:
    lost: list[str] = []
    held: list[str] = []
    for text, before in (base.get("texts") or {}).items():
        after = (arm.get("texts") or {}).get(text)
        if after is None or not math.isfinite(number(before.get("nll"))):
            continue
        forgotten = improved(before, after, "nll", lower_is_better=True) is False
        (lost if forgotten else held).append(f"{text} {_perplexities(before, after)}")
    if not lost and not held:
        return "not measured", "Forgetting was not measured: no text was scored before and after."
    worst = _worst(arm)
    if not lost:
        return "kept", f"Kept: perplexity on {', '.join(held)}.{worst}"
    if not held:
        return "forgotten", f"Forgotten: perplexity on {', '.join(lost)}.{worst}"
    return "forgotten in part", f"Forgotten: perplexity on {', '.join(lost)}. Kept: {', '.join(held)}.{worst}"


def _worst(arm: Mapping[str, Any]) -> str:
    """Of several texts the one that fared worst, and the mean of all."""
    overall = arm.get("forgetting") or {}
    rise, mean = number(overall.get("worst")), number(overall.get("mean"))
    if len(arm.get("texts") or {}) < 2 or not math.isfinite(rise + mean):
        return ""
    signed = [percent(math.expm1(min(value, 700))) for value in (rise, mean)]
    return f" Worst text: {overall['text']}, {signed[0]}; mean of all: {signed[1]}."


def _perplexities(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    rise = change(before, after, "nll")
    values = f"{three_digits(number(before.get('perplexity')))} → {three_digits(number(after.get('perplexity')))}"
    if not math.isfinite(rise.value):
        return f"{values} (no longer finite)"
    share = percent(math.expm1(min(rise.value, 700)))
    if math.isnan(rise.stderr):
        return f"{values} ({share}, noise unknown)"
    if 0 < rise.value <= rise.noise:
        return f"{values} ({share}, within the noise of ±{100 * math.expm1(min(rise.noise, 700)):.2g} %)"
    return f"{values} ({share})"


def _learned(base: Mapping[str, Any], arm: Mapping[str, Any]) -> tuple[Learned, str]:
    before, after = base.get("domain") or {}, arm.get("domain") or {}
    measures = [("answer_nll", "answer NLL", True), ("acc", "accuracy", False), ("exact_match", "exact match", False)]
    both = [m for m in measures if m[0] in before and m[0] in after and math.isfinite(number(before[m[0]]))]
    # Exact match is taken from the few generated answers, so it counts only where nothing better is known.
    both = [m for m in both if m[0] != "exact_match"] or both
    if not both:
        return "not measured", "Learning was not measured: no domain rows were scored before and after."
    outcomes = [improved(before, after, key, lower) for key, _, lower in both]
    state: Learned = "nothing"
    if True in outcomes:
        state = "mixed" if False in outcomes else "learned"
    elif False in outcomes:
        state = "worse"
    shown = [_values(before, after, key, label) for key, label, _ in both]
    return state, f"{_LEARNED_START[state]}: {', '.join(shown)}."


def _values(before: Mapping[str, Any], after: Mapping[str, Any], key: str, label: str) -> str:
    one, other = number(before[key]), number(after[key])
    if key == "answer_nll":
        return f"{label} {three_digits(one)} → {three_digits(other)}"
    shown = f"{100 * other:.1f} %" if math.isfinite(other) else three_digits(other)
    return f"{label} {100 * one:.1f} → {shown}"


def _tone(kept: Kept, learned: Learned) -> Tone:
    if kept == "forgotten" or learned == "worse" or (kept == "forgotten in part" and learned == "nothing"):
        return "bad"
    if kept == "kept" and learned == "learned":
        return "good"
    return "unknown" if kept == learned == "not measured" else "mixed"
