"""The figures of a run: losses, the budget, and the one picture a newcomer needs: what was forgotten and learned.

Each function returns a Matplotlib Figure that no pyplot state knows of, so it works without a display. Arms differ by
colour and by marker, for print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hlora.methods import label_of
from hlora.report.format import change, number, percent
from hlora.report.run.measures import shown_value
from hlora.report.style import (
    BLACK,
    BLUE,
    GREY,
    STYLE,
    VERMILION,
    nothing,
    phase_label,
    printable,
    running_mean,
    style_of,
)


def loss_curves(history: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Fig. 4: total, task and weighted regularisation loss over the optimizer steps of each phase, nats/token.

    history: phase name → Trainer's log entries (step, loss, and where protected weighted_regularisation_loss and
    total_loss). Thin lines are the entries, thick ones their running mean. Domain phases share one axis.
    """
    panels: list[tuple[str, Sequence[Mapping[str, Any]], dict[str, tuple[str, str, str]]]] = []
    for phase, entries in history.items():
        protected = any("weighted_regularisation_loss" in entry for entry in entries)
        curves = {"loss": ("task loss", BLUE, "-")}
        if protected:
            curves["total_loss"] = ("total: task + penalty", BLACK, "--")
        if entries:
            panels.append((phase_label(phase), entries, curves))
        if protected:
            penalty = {"weighted_regularisation_loss": ("penalty φ·L_reg", VERMILION, "-")}
            panels.append((f"{phase_label(phase)}: penalty", entries, penalty))

    with matplotlib.rc_context(STYLE):
        rows = max(1, math.ceil(len(panels) / 2))
        figure = Figure(figsize=(8, 2.5 * rows), layout="constrained", facecolor="white")
        if not panels:
            return nothing(figure, "no losses logged")
        domain: list[Axes] = []
        for place, (title, entries, curves) in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, min(2, len(panels)), place)
            steps = np.array([number(entry.get("step", index)) for index, entry in enumerate(entries)])
            for key, (label, colour, line) in curves.items():
                values = np.array([number(entry.get(key)) for entry in entries])
                values[~np.isfinite(values)] = np.nan
                axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
                axes.plot(steps, running_mean(values), line, color=colour, linewidth=1.8, label=label)
            unit = "nats/token" if "loss" in curves else "nats"
            axes.set(title=printable(title), xlabel="optimizer step", ylabel=unit)
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
            if "loss" in curves and title != phase_label("record"):
                domain.append(axes)
        for axes in domain[1:]:
            axes.sharey(domain[0])
            axes.autoscale(axis="y")
    return figure


def budget_curves(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """A forgetting budget over the optimizer steps: what the probe measured, and φ as it was steered.

    entries: Trainer's log entries of the phase, with phi, and after a probe probe_step, probe_rise, probe_stderr and
    budget (nats/token). The last probe is the larger one after training, where the adapter was landed on the budget.
    """
    probes = [entry for entry in entries if "budget" in entry and math.isfinite(number(entry.get("probe_rise")))]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 2.7), layout="constrained", facecolor="white")
        if not probes:
            return nothing(figure, "no probe of the budget logged")
        left, right = figure.subplots(1, 2)
        steps = [number(entry.get("probe_step", entry.get("step"))) for entry in probes]
        rises, errors = ([number(entry.get(key)) for entry in probes] for key in ("probe_rise", "probe_stderr"))
        allowed = number(probes[-1].get("budget"))
        left.axhline(allowed, color=BLACK, linestyle="--", linewidth=1.2, label=f"budget, {allowed:.3g}")
        left.errorbar(steps, rises, errors, color=BLUE, marker="o", markersize=4, linewidth=1.4, label="probe ± s.e.")
        landed = number(probes[-1].get("alpha"))
        if landed < 1:
            left.plot(steps[-1:], rises[-1:], "D", color=VERMILION, markersize=6, label=f"landed, α {landed:.2f}")
        left.set(title="rise of the general loss over the base", xlabel="optimizer step", ylabel="nats/token")
        left.legend(frameon=False)
        phi = [(number(e.get("step")), number(e.get("phi"))) for e in entries if number(e.get("phi")) > 0]
        if phi:
            right.plot(*zip(*phi, strict=True), color=VERMILION, linewidth=1.6)
            right.set_yscale("log")
            for axis in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
                axis(FuncFormatter(lambda value, _: f"{value:g}"))  # Matplotlib's own labels are TeX
        right.set(title="penalty weight φ", xlabel="optimizer step")
        for axes in (left, right):
            axes.grid(alpha=0.25)
    return figure


def forgetting_picture(arms: Mapping[str, Mapping[str, Any]]) -> Figure:
    """What each arm forgot and what it learned, one row an arm, each bar two standard errors to either side.

    Left, for each evaluation text: the rise of loss against base in nats/token, with the change of perplexity.
    Right: the domain's answer NLL (nats per answer), and accuracy where there is one.
    arms: arm name → evaluation, with the base under "base" (see run/page.py).
    """
    names = list(arms)
    base = arms.get("base") or {}
    panels = [*_text_panels(arms, base), *_domain_panels(arms)]
    with matplotlib.rc_context(STYLE):
        width, height = max(8.0, 2.1 + 1.95 * len(panels)), 1.35 + 0.48 * len(names)
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        if not panels:
            return nothing(figure, "nothing to compare")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        texts = [panel for panel in panels if panel.reference == 0]
        for axes, panel in zip(grid, panels, strict=True):
            _draw_panel(axes, panel, names, texts if panel.reference == 0 else [panel])
        grid[0].set_yticks(range(len(names)), [printable(label_of(name)).replace(" (", "\n(") for name in names])
        grid[0].set_ylim(len(names) - 0.5, -0.65)
    return figure


class _Panel(NamedTuple):
    title: str
    unit: str
    reference: float
    """The base's value; zero where changes against the base are shown."""
    points: dict[str, tuple[float, float, str]]
    """arm → value, half the length of its bar, what is written at it"""
    lower_is_better: bool


def _text_panels(arms: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any]) -> Iterable[_Panel]:
    for text, before in (base.get("texts") or {}).items():
        points = {}
        for arm, evaluation in arms.items():
            after = (evaluation.get("texts") or {}).get(text)
            if arm == "base":
                points[arm] = (0.0, 0.0, "")
            elif after is not None:
                rise = change(before, after, "nll")
                label = f"{shown_value({'forgetting': rise.value}, 'forgetting')} ({_share(rise.value)})"
                points[arm] = (rise.value, 2 * rise.stderr, label)
        if len(points) > 1:
            title = f"Forgotten?\n{printable(text, 22)}"
            yield _Panel(title, "rise of loss, nats/token\n→ forgotten", 0.0, points, lower_is_better=True)


def _domain_panels(arms: Mapping[str, Mapping[str, Any]]) -> Iterable[_Panel]:
    for measure, title, unit, factor, lower in (
        ("answer_nll", "Learned?\nanswer NLL", "nats per answer\n← learned", 1, True),
        ("acc", "Learned?\naccuracy", "% of questions\n→ learned", 100, False),
    ):
        points = {}
        for arm, evaluation in arms.items():
            domain = evaluation.get("domain") or {}
            if measure in domain:
                value, stderr = factor * number(domain[measure]), factor * number(domain.get(f"{measure}_stderr"))
                points[arm] = (value, 2 * stderr, shown_value(domain, measure) + (" %" if factor == 100 else ""))
        if points:
            yield _Panel(title, unit, points.get("base", (math.nan,))[0], points, lower)


def _share(rise: float) -> str:
    """The change of perplexity that a rise of the loss is; exp overflows at 709 nats."""
    return percent(math.expm1(min(rise, 700)))


def _draw_panel(axes: Axes, panel: _Panel, names: list[str], same_axis: list[_Panel]) -> None:
    shown = [(value, half) for each in same_axis for value, half, _ in each.points.values()]
    ends = [end for value, half in shown for end in (value, value - half, value + half) if math.isfinite(end)] or [0.0]
    margin = 0.3 * (max(ends) - min(ends)) or 0.1
    low, high = min(ends) - margin, max(ends) + margin
    axes.set_xlim(low, high)
    if math.isfinite(panel.reference):
        axes.axvline(panel.reference, color=GREY, linewidth=1, linestyle=":")
        worse = (panel.reference, high) if panel.lower_is_better else (low, panel.reference)
        axes.axvspan(*worse, color=VERMILION, alpha=0.07, linewidth=0)
    for row, name in enumerate(names):
        if name not in panel.points:
            continue
        value, half, label = panel.points[name]
        colour, marker, _ = style_of(name) or (GREY, "v", "-")
        if math.isfinite(value):
            error = half if math.isfinite(half) else None
            axes.errorbar(value, row, xerr=error, fmt=marker, color=colour, markersize=7, elinewidth=1.5)
            inside = min(max((value - low) / (high - low), 0.27), 0.73)  # keeps the label within the panel
            text = axes.text(inside, row - 0.2, label, ha="center", va="bottom")
            text.set_bbox({"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6})
        else:
            text = axes.text(0.5, row, "not finite", ha="center", va="center", color=VERMILION, weight="bold")
        text.set_transform(axes.get_yaxis_transform())
    axes.set(title=panel.title, xlabel=panel.unit)
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=4)
