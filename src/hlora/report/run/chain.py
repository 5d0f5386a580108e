"""Domain after domain: the matrix of each domain after each step, transfer, and their picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hlora.report.format import Change, change, number
from hlora.report.run.measures import DOMAIN_MEASURES, shown_value
from hlora.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILION, nothing, printable

_MEASURES = ("answer_nll", "acc")
_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY)


class Transfer(NamedTuple):
    """Means over the domains of a chain, in the measure's unit, each with its standard error.

    R[i, j] is the measure of domain j after step i of T. Of a measure where lower is better, a positive backward
    transfer is forgetting. The errors count the noise of the test questions, paired by question.

    Source: Lopez-Paz & Ranzato 2017 (arXiv:1706.08840), section 2; the base model takes the place of random weights.
    """

    average: Change
    """R[T, j] over all j."""
    backward: Change
    """R[T, j] − R[j, j] over all j before T."""
    forward: Change
    """R[j − 1, j] − the base model's, over all j after the first."""


def transfer(chain: Mapping[str, Any], measure: str) -> Transfer | None:
    """The means of a measure; None where it was not taken of every domain."""
    domains, after, before, base = (chain[key] for key in ("domains", "after", "before", "base"))
    last = after[domains[-1]]
    if len(domains) < 2 or not all(measure in last.get(name, {}) for name in domains):
        return None
    final = [Change(number(last[name][measure]), number(last[name].get(f"{measure}_stderr"))) for name in domains]
    return Transfer(
        _mean(final),
        _mean([change(after[name][name], last[name], measure) for name in domains[:-1]]),
        _mean([change(base[name], before[name], measure) for name in domains[1:]]),
    )


def _mean(found: list[Change]) -> Change:
    """The mean of changes of different domains, whose errors are independent."""
    stderr = math.hypot(*(each.stderr for each in found)) / len(found)
    return Change(statistics.fmean(each.value for each in found), stderr)


def chain_table(chain: Mapping[str, Any], measure: str) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the matrix of a measure: a row for the base model and one after each step.

    Of the domains that come later, the next one alone is measured, before it is tuned.
    """
    domains = chain["domains"]
    rows = [["base model", *(shown_value(chain["base"][name], measure) for name in domains)]]
    for step, following in zip(domains, [*domains[1:], None], strict=True):
        measured = {**chain["after"][step], **({following: chain["before"][following]} if following else {})}
        rows.append([f"after {step}", *(shown_value(measured.get(name, {}), measure) for name in domains)])
    return ["", *domains], rows


def chain_tables(chain: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each measure that was taken: its name, the matrix, and transfer in a sentence."""
    found = []
    for measure in _MEASURES:
        means = transfer(chain, measure)
        if means is None:
            continue
        heading, rows = chain_table(chain, measure)
        found.append(
            {"name": DOMAIN_MEASURES[measure][0], "heading": heading, "rows": rows, "said": _said(means, measure)}
        )
    return found


def _said(means: Transfer, measure: str) -> str:
    def shown(found: Change) -> str:
        if math.isnan(found.value):  # a run before this one did not take the measure
            return "not measured"
        factor, digits, unit = (1, 2, "nats") if measure == "answer_nll" else (100, 1, "points")
        spread = f" ± {factor * found.stderr:.{digits}f}" if math.isfinite(found.stderr) else ""
        return f"{factor * found.value:+.{digits}f}{spread} {unit}".replace("-", "−")

    better = "above 0: forgotten" if DOMAIN_MEASURES[measure][1] else "below 0: forgotten"
    return f"Backward transfer {shown(means.backward)} ({better}); forward transfer {shown(means.forward)}."


def general_forgetting(chain: Mapping[str, Any]) -> str:
    """Mean forgetting of general text after each step, nats a token."""
    rises = chain["forgetting"]
    shown = [f"{name} {number(rises[name].get('mean')):+.3f}" for name in chain["domains"] if "mean" in rises[name]]
    return f"General forgetting, nats a token, after {', '.join(shown)}.".replace("-", "−") if shown else ""


def chain_picture(chain: Mapping[str, Any]) -> Figure:
    """Left: answer NLL of each domain over the steps, against the base model. Right: forgetting of general text."""
    domains = chain["domains"]
    steps = np.arange(len(domains) + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3), layout="constrained", facecolor="white")
        if not domains:
            return nothing(figure, "no domain")
        learned, forgotten = figure.subplots(1, 2)
        for number_of, name in enumerate(domains):
            values = [number(chain["base"][name].get("answer_nll"))]
            values += [number(chain["after"][step].get(name, {}).get("answer_nll")) for step in domains]
            if number_of > 0:
                values[number_of] = number(chain["before"][name].get("answer_nll"))
            share = np.array(values) / values[0]
            colour = _COLOURS[number_of % len(_COLOURS)]
            learned.plot(steps, share, "o-", color=colour, label=printable(name), markersize=4)
            learned.plot(number_of + 1, share[number_of + 1], "o", color=colour, markersize=9)
        learned.set(title="Answer NLL, share of the base model's", xlabel="after step")
        figure.legend(*learned.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False)
        rises = [0.0, *(number(chain["forgetting"][name].get("mean")) for name in domains)]
        worst = [0.0, *(number(chain["forgetting"][name].get("worst")) for name in domains)]
        forgotten.plot(steps, rises, "o-", color=BLACK, label="mean of texts", markersize=4)
        forgotten.plot(steps, worst, "x--", color=GREY, label="worst text", markersize=5)
        forgotten.axhline(0, color=GREY, linewidth=0.8)
        forgotten.set(title="General forgetting, nats a token", xlabel="after step")
        forgotten.legend(frameon=False)
        for axes in (learned, forgotten):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
        return figure
