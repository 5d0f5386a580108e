"""The outcome in plain words: what was kept and what was learned, how much of it, each beyond the noise of its test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hlora.methods import STARTS, label_of
from hlora.report.format import Tone, change, number, percent, three_digits

Kept = Literal["kept", "forgotten in part", "forgotten", "not measured"]
Learned = Literal["learned", "mixed", "nothing", "worse", "not measured"]
Budget = Literal["none", "held", "exceeded"]

FORGOT = ((0.05, "a little"), (0.2, "some"), (math.inf, "much"))
"""Rise of perplexity below which it is called so."""
LEARNED = ((0.02, "next to nothing"), (0.1, "a little"), (0.3, "a fair amount"), (math.inf, "a lot"))
"""Fall of the answers' NLL, or of the share of wrong answers, below which it is called so."""

_OWN_KIND = "general (held out)"
"""What is measured where evaluation.texts names no text (see data/general.py)."""


@dataclass(frozen=True)
class Verdict:
    """Short plain sentences, and the states they were made from."""

    headline: str
    kept: str
    learned: str
    cautions: tuple[str, ...]
    """What the measurements do not show."""
    beside: tuple[str, ...]
    """One line for each other arm, the same two sentences."""
    kept_state: Kept
    learned_state: Learned
    budget_state: Budget
    tone: Tone


def verdict(results: Mapping[str, Any]) -> Verdict:
    """What became of general ability and of the domain, for HLoRA (or the last arm) against the base model.

    Forgotten: the loss on a text rose beyond noise, two standard errors. Learned: answer NLL or accuracy improved
    beyond noise and by 2 % or more of the error, and neither got worse beyond noise. What is no longer a finite number
    counts as lost.
    """
    arms = results.get("arms") or {}
    main = main_arm(arms)
    if main is None:
        nothing = "Only the base model was evaluated, so there is nothing to compare yet."
        return Verdict(nothing, "", "", (), (), "not measured", "not measured", "none", "unknown")
    base = arms.get("base") or {}
    kept_state, forgot, kept = _kept(base, arms[main])
    learned_state, learned_amount, learned = _learned(base, arms[main])
    budget_state, budget, budget_sentence = _budget(results)
    others = [arm for arm in arms if arm not in ("base", *STARTS, main)]
    beside = [
        f"{label_of(arm)}, on the same data. {_kept(base, arms[arm])[2]} {_learned(base, arms[arm])[2]}"
        for arm in others
    ]
    headline = " ".join(
        part
        for part in (_kept_headline(kept_state, forgot), budget, _learned_headline(learned_state, learned_amount))
        if part
    )
    tone = _tone(kept_state, learned_state, budget_state)
    return Verdict(
        headline,
        f"{kept} {budget_sentence}".strip(),
        learned,
        _cautions(base),
        tuple(beside),
        kept_state,
        learned_state,
        budget_state,
        tone,
    )


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


def amount(share: float, words: tuple[tuple[float, str], ...]) -> str:
    """The word for a relative change; not finite is the last word."""
    return next((word for below, word in words if share < below), words[-1][1])


def _kept_headline(state: Kept, forgot: str) -> str:
    if state == "kept":
        return "Kept what it knew."
    return "Forgetting was not measured." if state == "not measured" else f"Forgot {forgot} of what it knew."


def _learned_headline(state: Learned, learned: str) -> str:
    return {
        "learned": f"Learned {learned}.",
        "mixed": "Learned by one measure, lost by another.",
        "nothing": "Learned next to nothing.",
        "worse": "Got worse at the domain.",
        "not measured": "Learning was not measured.",
    }[state]


def _kept(base: Mapping[str, Any], arm: Mapping[str, Any]) -> tuple[Kept, str, str]:
    """The state, how much was forgotten, and the sentence."""
    lost: list[str] = []
    held: list[str] = []
    rises = [0.0]
    for text, before in (base.get("texts") or {}).items():
        after = (arm.get("texts") or {}).get(text)
        if after is None or not math.isfinite(number(before.get("nll"))):
            continue
        forgotten = improved(before, after, "nll", lower_is_better=True) is False
        (lost if forgotten else held).append(f"{text} {_perplexities(before, after)}")
        if forgotten:
            rise = change(before, after, "nll").value
            rises.append(math.expm1(min(rise, 700)) if math.isfinite(rise) else math.inf)
    forgot = amount(max(rises), FORGOT)
    if not lost and not held:
        return "not measured", forgot, "Forgetting was not measured: no text was scored before and after."
    worst = _worst(arm)
    if not lost:
        return "kept", forgot, f"General text got no harder to predict: perplexity on {', '.join(held)}.{worst}"
    if not held:
        return "forgotten", forgot, f"General text got harder to predict: perplexity on {', '.join(lost)}.{worst}"
    part = f"Some general text got harder to predict: perplexity on {', '.join(lost)}. No harder: {', '.join(held)}."
    return "forgotten in part", forgot, f"{part}{worst}"


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


def _learned(base: Mapping[str, Any], arm: Mapping[str, Any]) -> tuple[Learned, str, str]:
    """The state, how much was learned, and the sentence."""
    before, after = base.get("domain") or {}, arm.get("domain") or {}
    known = [("acc", False), ("exact_match", False), ("answer_nll", True)]
    both = [m for m in known if m[0] in before and m[0] in after and math.isfinite(number(before[m[0]]))]
    # Exact match is taken from the few generated answers, so it counts only where nothing better is known.
    both = [m for m in both if m[0] != "exact_match"] or both
    if not both:
        return "not measured", "", "Learning was not measured: no domain rows were scored before and after."
    outcomes = {key: improved(before, after, key, lower) for key, lower in both}
    fall = max((_fall(before, after, key) for key, better in outcomes.items() if better), default=0.0)
    learned = amount(fall, LEARNED)
    state: Learned = "nothing"
    if False in outcomes.values():
        state = "mixed" if True in outcomes.values() else "worse"
    elif learned != LEARNED[0][1]:
        state = "learned"
    shown = [_values(before, after, key) + (" (within noise)" if outcomes[key] is None else "") for key, _ in both]
    sentence = "; ".join(shown)
    return state, learned, f"{sentence[0].upper()}{sentence[1:]}."


def _fall(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> float:
    """By what share the answers' NLL fell, or that of the wrong answers."""
    one, other = (number(each[key]) if key == "answer_nll" else 1 - number(each[key]) for each in (before, after))
    return 1 - other / one if one > 0 else 0.0


def _values(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    one, other = number(before[key]), number(after[key])
    if key == "answer_nll":
        return f"answer NLL {three_digits(one)} → {three_digits(other)}"
    what, count = ("questions right", "rows") if key == "acc" else ("written answers exact", "generated")
    total = number(after.get(count))
    if math.isfinite(total) and math.isfinite(other):
        return f"{round(other * total)} of {round(total)} {what}, before {round(one * total)}"
    after_all = f"{100 * other:.1f} %" if math.isfinite(other) else three_digits(other)
    return f"{after_all} of {what}, before {100 * one:.1f} %"


def _budget(results: Mapping[str, Any]) -> tuple[Budget, str, str]:
    """Whether the last probe of a forgetting budget kept it: the state, words for the headline, and a sentence."""
    logged = [entry for entries in (results.get("history") or {}).values() for entry in entries]
    measured = [(number(entry.get("probe_rise")), number(entry.get("budget"))) for entry in logged]
    probes = [pair for pair in measured if all(map(math.isfinite, pair))]  # an evaluation probes without a budget, too
    if not probes:
        return "none", "", ""
    rise, allowed = probes[-1]
    held = rise <= allowed
    shown, limit = percent(math.expm1(rise)), percent(math.expm1(allowed))
    if shown == limit and not held:
        shown = f"{limit} and a little more"
    sentence = f"The budget allowed {limit} on its probe; the probe measured {shown}."
    headline = f"The budget of {limit.lstrip('+')} {'held' if held else 'was exceeded'}."
    return "held" if held else "exceeded", headline, sentence


def _cautions(base: Mapping[str, Any]) -> tuple[str, ...]:
    """What the reader should not conclude."""
    if set(base.get("texts") or {}) == {_OWN_KIND}:
        return (
            "Only held-out text of the general phase's own kind was measured, which its training improves. Text of "
            "another kind may have been forgotten: name some in evaluation.texts.",
        )
    return ()


def _tone(kept: Kept, learned: Learned, budget: Budget) -> Tone:
    if kept == "forgotten" or learned == "worse" or (kept == "forgotten in part" and learned == "nothing"):
        return "bad"
    if kept == "kept" and learned == "learned" and budget != "exceeded":
        return "good"
    return "unknown" if kept == learned == "not measured" else "mixed"
