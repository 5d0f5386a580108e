"""Whether ours forgets less than its rival, and what that is worth: outcomes by task, and one sentence over all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from hlora.report.comparison.cells import untuned
from hlora.report.comparison.measures import Measure, digits_of, measures, sample_of, t_tests
from hlora.report.comparison.significance import mean_sd, welch
from hlora.report.format import Tone, decimals, p_value

State = Literal["better", "worse", "same", "untested"]


class Outcome(NamedTuple):
    """Our arm against another on one task by one measure, on test at the chosen strengths."""

    other: str
    task: str
    measure: Measure
    ours: float
    theirs: float
    state: State
    """better or worse: zero is outside the 95 % interval of the difference, which counts the noise of seeds and of test
    questions. untested: no interval, for want of seeds or of questions."""
    ahead: bool
    """Whether our mean is on the better side, whatever the state."""


class ComparisonVerdict(NamedTuple):
    """Short plain sentences, wins and losses alike."""

    headline: str
    paragraphs: list[tuple[str, list[str]]]
    """A lead and its sentences: against the rival, the unprotected arm and Base, then where ours loses."""
    tone: Tone


def outcomes(comparison: Mapping[str, Any]) -> list[Outcome]:
    """Ours against every other arm, on every task, by every measure that both have."""
    others = [arm for arm in comparison["arms"] if arm != comparison["ours"]]
    found = [
        _outcome(comparison, other, task, what)
        for other in others
        for task in comparison["tasks"]
        for what in measures(comparison)
    ]
    return [outcome for outcome in found if outcome is not None]


def _outcome(comparison: Mapping[str, Any], other: str, task: str, what: Measure) -> Outcome | None:
    """None where one of the two has no value."""
    ours, theirs = (sample_of(comparison, arm, task, what) for arm in (comparison["ours"], other))
    if not ours.seeds or not theirs.seeds:
        return None
    means = mean_sd(ours.seeds)[0], mean_sd(theirs.seeds)[0]
    ahead = (means[0] < means[1]) == what.lower_is_better
    state: State = "better" if ahead else "worse"
    diverged = [not all(map(math.isfinite, side.seeds)) for side in (ours, theirs)]
    if any(diverged):  # no interval; whoever stayed finite wins
        state = "same" if all(diverged) else "worse" if diverged[0] else "better"
        return Outcome(other, task, what, *means, state, ahead=not diverged[0])
    test = welch(ours, theirs)
    if math.isnan(test.low):
        state = "untested"
    elif test.low <= 0 <= test.high:
        state = "same"
    return Outcome(other, task, what, *means, state, ahead)


def comparison_verdict(comparison: Mapping[str, Any]) -> ComparisonVerdict:
    """Whether ours keeps more than the rival, the unprotected arm, Base and all others, and at what accuracy."""
    found = outcomes(comparison)
    ours, rival, unprotected = comparison["ours"], comparison["rival"], comparison["unprotected"]
    if not found:
        nothing = f"{ours} and the arms beside it have no finished cells in common, so there is nothing to compare yet."
        return ComparisonVerdict(nothing, [], "unknown")
    bases = untuned(comparison, "base")
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
    """Under 15 words; the paragraphs below say on which task and text."""
    kept = [outcome.state for outcome in found if outcome.measure.text is not None]
    learned = [o.state for o in found if o.measure.name == "acc"] or [
        o.state for o in found if o.measure.name == "answer_nll"
    ]
    tests = len(comparison["tasks"]) * len(comparison["texts"])
    one, two = _kept(kept, other, tests), _learned(learned)
    return f"{comparison['ours']} {one}{' and' if two.startswith('learns') and ',' not in one else ';'} {two}."


def _kept(states: list[State], other: str, tests: int) -> str:
    better, worse = states.count("better"), states.count("worse")
    if not states:
        return f"and {other}: general text was not measured"
    if set(states) == {"untested"}:
        return f"is not tested against {other} on general text"
    if not better and not worse:
        return f"keeps as much as {other} within noise"
    if better and worse:
        return f"keeps more than {other} in {better} test{'s' if better > 1 else ''}, less in {worse}"
    word, count = ("more", better) if better else ("less", worse)
    return f"keeps {word} than {other}" + (f" in {count} of {tests} tests" if count < tests else "")


def _learned(states: list[State]) -> str:
    better, worse = states.count("better"), states.count("worse")
    if not states:
        return "learning was not measured"
    if set(states) == {"untested"}:
        return "learning is not tested"
    if better and worse:
        return "learns unevenly"
    return "learns " + ("more" if better else "less" if worse else "as much")


def _against(found: list[Outcome], p_values: Mapping[Any, tuple[float, float]]) -> list[str]:
    """A sentence for each measure against one arm, task by task."""
    sentences = []
    for what in dict.fromkeys(outcome.measure for outcome in found):
        groups: dict[str, list[str]] = {}
        for outcome in found:
            if outcome.measure == what:
                p, p_holm = p_values.get((outcome.task, what), (math.nan, math.nan))
                tested = "" if math.isnan(p) else f"; p\u00a0{p_value(p)}, Holm\u00a0{p_value(p_holm)}"
                ours, theirs = shown_value(what, outcome.ours), shown_value(what, outcome.theirs)
                shown = f"{outcome.task} ({ours} against {theirs}{tested})"
                groups.setdefault(state_words(outcome), []).append(shown)
        told = "; ".join(f"{words} on {', '.join(tasks)}" for words, tasks in groups.items())
        sentences.append(f"{title_of(what)}: {told}.")
    return sentences


def _losses(comparison: Mapping[str, Any], found: list[Outcome]) -> list[tuple[str, list[str]]]:
    """To whom ours loses beyond noise, and where it is behind untested."""
    ours = comparison["ours"]
    lost = _by_measure(comparison, [o for o in found if o.state == "worse"])
    untested = _by_measure(comparison, [o for o in found if o.state == "untested" and not o.ahead])
    tested = any(outcome.state != "untested" for outcome in found)
    none = "To no arm, by no measure." if tested else "Not known: too few seeds or questions to test."
    paragraphs = [(f"Where {ours} loses beyond noise", lost or [none])]
    return (
        [*paragraphs, ("Where it is behind, with too few seeds or questions to test", untested)]
        if untested
        else paragraphs
    )


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
        sentences += [f"{title_of(what)}: to {'; '.join(parts)}."] if parts else []
    return sentences


def _tone(found: list[Outcome]) -> Tone:
    states = {o.state for o in found if o.measure.text is not None}
    lost = "worse" in states or any(o.state == "worse" for o in found if o.measure.name == "acc")
    if states <= {"untested"}:
        return "unknown"
    if lost:
        return "mixed" if "better" in states else "bad"
    return "good" if states == {"better"} else "mixed"


def state_words(outcome: Outcome) -> str:
    """Lower or higher, and whether that is beyond noise."""
    lower = outcome.ahead == outcome.measure.lower_is_better
    direction = "lower" if lower else "higher"
    return {"same": "no difference beyond noise", "untested": f"{direction}, untested,"}.get(outcome.state, direction)


def name_of(what: Measure) -> str:
    """As in a sentence; `title_of`: at its head."""
    if what.text is not None:
        return f"perplexity on {what.text}"
    return "accuracy" if what.name == "acc" else "answer NLL"


def title_of(what: Measure) -> str:
    name = name_of(what)
    return name[0].upper() + name[1:]


def shown_value(what: Measure, value: float) -> str:
    """As the tables round it."""
    return decimals(value, digits_of(what)) + (" %" if what.name == "acc" and math.isfinite(value) else "")
