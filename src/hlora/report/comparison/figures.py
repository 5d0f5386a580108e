"""The paper's Figs. 3 to 5 of a comparison, and all that a comparison draws.

`comparison` is what comparison.json holds (see cells.py), `cost` what cost.json holds (see comparison/cost.py). As in
figures.py, each function returns a Matplotlib Figure that no pyplot state knows of; one without axes says in words that
there is nothing to draw.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from hlora.report.comparison.arm_styles import HALO, OURS, RIVAL, blank
from hlora.report.comparison.cells import cells_of
from hlora.report.comparison.measures import TestPanel, t_tests
from hlora.report.comparison.trade_off import strength_sweep, trade_off
from hlora.report.format import decimals, number, p_value, size
from hlora.report.heatmap import importance_heatmap
from hlora.report.style import BLACK, BLUE, GREEN, GREY, STYLE, VERMILION, nothing, printable, running_mean

logger = logging.getLogger("hlora")


def violins(comparison: Mapping[str, Any]) -> Figure:
    """Fig. 3: perplexity of each text and accuracy over seeds, ours beside the rival, a row for each task.

    Above each panel: Welch's p over seeds and questions, the same after Holm's correction over all panels, and Hedges'
    g over seeds (ours less rival). The short line is the mean. Fewer than three seeds, or equal values, have no violin.
    """
    tests = t_tests(comparison)
    with matplotlib.rc_context(STYLE):
        tasks = [task for task in comparison["tasks"] if any(t.ours or t.theirs for t in tests if t.task == task)]
        tasks = tasks if comparison["rival"] in comparison["arms"] else []
        columns = len(comparison["texts"]) + 1
        figure = blank(2.9 * columns, 2.6 * len(tasks))
        if not tasks:
            return nothing(figure, "no rival, or no finished cell")
        grid = figure.subplots(len(tasks), columns, squeeze=False)
        shown = [test for test in tests if test.task in tasks]
        for axes, test in zip(grid.flat, shown, strict=True):
            _draw_violins(axes, test, (comparison["ours"], comparison["rival"]))
    return figure


def _draw_violins(axes: Axes, test: TestPanel, names: tuple[str, str]) -> None:
    for place, (found, (colour, marker, _)) in enumerate(zip((test.ours, test.theirs), (OURS, RIVAL), strict=True)):
        sample = [value for value in found if math.isfinite(value)]
        if len(sample) > 2 and len(set(sample)) > 1:
            body = axes.violinplot([sample], [place], widths=0.7, showextrema=False)["bodies"][0]  # type: ignore[index]
            body.set(facecolor=colour, edgecolor=colour, alpha=0.25)
        if sample:
            axes.plot([place - 0.2, place + 0.2], [np.mean(sample)] * 2, color=BLACK, linewidth=1.5)
        spread = place + np.linspace(-0.08, 0.08, len(sample)) if len(sample) > 1 else [place] * len(sample)
        axes.plot(spread, sample, marker, color=colour, markersize=5.5, **HALO)
        if len(sample) < max(1, len(found)):
            lacking = f"{len(found) - len(sample)} not finite" if found else "no result"
            axes.text(
                place, 0.95, lacking, transform=axes.get_xaxis_transform(), ha="center", va="top", color=VERMILION
            )
    axes.set_xticks([0, 1], [printable(name, 22) for name in names])
    axes.set_xlim(-0.6, 1.6)
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", alpha=0.25)
    label = test.measure.label.replace("accuracy %", "accuracy")
    axes.set_ylabel("% of questions" if test.measure.name == "acc" else "perplexity")
    axes.set_title(f"{printable(test.task, 18)} · {printable(label, 24)}", pad=19)
    finite = all(map(math.isfinite, test.ours + test.theirs))
    result = "too few seeds or questions to test" if finite else "not tested: values that are not finite"
    if math.isfinite(test.welch.p):
        result = f"p {p_value(test.welch.p)} · Holm {p_value(test.p_holm)} · g {decimals(test.welch.hedges_g, 2)}"
    axes.text(0, 1.03, result, transform=axes.transAxes, fontsize=8.5).set_in_layout(False)


def training_curves(comparison: Mapping[str, Any]) -> Figure:
    """Fig. 4: losses of our arm at the chosen strength over the optimizer steps, a row for each task.

    Left the task loss (nats/token) and the total, right the weighted regularisation loss φ·L_reg. Lines are means over
    seeds of each seed's running mean, bands their minimum and maximum.
    """
    histories = {
        task: [cell["history"] for cell in cells_of(comparison, comparison["ours"], task) if cell.get("history")]
        for task in comparison["tasks"]
    }
    histories = {task: found for task, found in histories.items() if found}
    with matplotlib.rc_context(STYLE):
        figure = blank(8, 2.4 * len(histories))
        if not histories:
            return nothing(figure, "no losses logged")
        grid = figure.subplots(len(histories), 2, squeeze=False)
        for (task, found), (left, right) in zip(histories.items(), grid, strict=True):
            name, seeds = printable(task, 24), f"{len(found)} seed{'s' if len(found) > 1 else ''}"
            _draw_curve(left, found, "total_loss", "total: task + regularisation", BLACK, "--")
            _draw_curve(left, found, "loss", "task loss", BLUE, "-")
            _draw_curve(right, found, "weighted_regularisation_loss", "regularisation φ·L_reg", VERMILION, "-")
            left.set(title=f"{name}: task and total, {seeds}", ylabel="nats/token")
            right.set(title=f"{name}: regularisation, {seeds}", ylabel="nats")
            for axes in (left, right):
                axes.set_xlabel("optimizer step")
                axes.grid(alpha=0.25)
                if not axes.get_lines():
                    axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=GREY)
        lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
        if lines:  # below, where it covers no curve
            figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    return figure


def _draw_curve(axes: Axes, histories: Sequence[Any], key: str, label: str, colour: str, line: str) -> None:
    """Mean and range over the seeds that logged `key`, at the steps that all of them logged."""
    logged = [{entry.get("step", i): number(entry.get(key)) for i, entry in enumerate(each)} for each in histories]
    logged = [each for each in logged if any(map(math.isfinite, each.values()))]
    if not logged:
        return
    steps = sorted(set.intersection(*(set(each) for each in logged)))
    if not steps:
        return
    raw = np.array([[each[step] for step in steps] for each in logged])  # (seeds, steps)
    raw[~np.isfinite(raw)] = np.nan
    smooth = np.array([running_mean(row) for row in raw])
    known = np.isfinite(smooth).any(0)
    steps, smooth = np.array(steps)[known], smooth[:, known]
    if len(logged) > 1:
        axes.fill_between(steps, np.nanmin(smooth, 0), np.nanmax(smooth, 0), color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, np.nanmean(smooth, 0), linestyle=line, color=colour, linewidth=1.6, label=label)


def cost_bars(cost: Mapping[str, Any]) -> Figure:
    """Fig. 5: seconds and bytes of importance, EWC-LoRA and HLoRA by encoding, a row for each way of counting.

    Bars are what was measured at the sequences named beside them, on log axes. Hatched: HLoRA's seconds beyond a
    training that is done anyway; the bytes of EWC's whole model, which the paper counts.
    """
    rows = list(cost.get("rows") or [])
    countings = list(dict.fromkeys(row["counting"] for row in rows))
    titles = {"paper": "the paper's counting", "equal": "equal sequences"}
    with matplotlib.rc_context(STYLE):
        heights = [1 + sum(row["counting"] == counting for row in rows) for counting in countings]
        figure = blank(10, 0.9 + 0.55 * sum(heights))
        if not rows:
            return nothing(figure, "no cost measured")
        grid = figure.subplots(len(countings), 2, squeeze=False, sharey="row", height_ratios=heights)
        for (left, right), counting in zip(grid, countings, strict=True):
            shown = [row for row in rows if row["counting"] == counting]
            scale = cost.get("scale")
            share = f" × 1/{1 / scale:,.4g}" if counting == "paper" and scale else ""
            title = f"{titles.get(counting, printable(counting))}{share}"
            _draw_bars(left, shown, ("seconds", "seconds_beyond_training"), _seconds)
            _draw_bars(right, shown, ("bytes", "whole_model_bytes"), size)
            left.set_title(f"Time, {title}")
            right.set_title("Storage")
            left.set_yticks(range(len(shown)), [_counted(row) for row in shown])
            left.set_ylim(len(shown) - 0.5, -0.5)
        handles = [
            Patch(facecolor=BLUE, label="EWC-LoRA, adapted matrices"),
            Patch(facecolor="white", edgecolor=BLUE, hatch="////", label="EWC-LoRA, whole model"),
            Patch(facecolor=GREEN, label="HLoRA, training and recording"),
            Patch(
                facecolor="white", edgecolor=GREEN, hatch="////", label="HLoRA, only what recording adds to training"
            ),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_bars(axes: Axes, rows: Sequence[Mapping[str, Any]], keys: tuple[str, str], label: Any) -> None:
    found = [number(row.get(key)) for row in rows for key in keys]
    known = [value for value in found if math.isfinite(value) and value > 0]
    low, high = (min(known) / 3, max(known)) if known else (0.1, 1)
    for place, row in enumerate(rows):
        colour = BLUE if row["method"] == "EWC-LoRA" else GREEN
        both = all(number(row.get(key)) > 0 for key in keys)
        for key, hatch, shift in ((keys[0], "", -0.19), (keys[1], "////", 0.19)):
            value = number(row.get(key))
            if not value > 0:
                continue
            face = "white" if hatch else colour
            y = place + (shift if both else 0)
            axes.barh(y, value - low, 0.36, left=low, facecolor=face, edgecolor=colour, hatch=hatch)
            axes.annotate(label(value), (value, y), (3, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** 0.3)  # room for the labels
    decades = range(math.ceil(math.log10(low)), math.ceil(math.log10(high)) + 1)
    axes.xaxis.set_major_locator(FixedLocator([10.0**decade for decade in decades]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)


def _counted(row: Mapping[str, Any]) -> str:
    """A bar's name with the numbers that it was measured at."""
    samples, epochs = row.get("samples"), row.get("epochs") or 1
    passes = f" × {epochs} epochs" if epochs != 1 else ""
    tokens = f", {row['tokens']:,} tokens" if row.get("tokens") else ""
    counted = f"\n{samples:,} sequences{passes}{tokens}" if samples else ""
    return f"{printable(row['method'])}, {printable(row['encoding'])}{counted}"


def importance_of(comparison: Mapping[str, Any]) -> dict[str, float]:
    """Fig. 7's norms ‖Ω_l‖₂ of our arm: matrix name → mean over seeds, for heatmap.importance_heatmap.

    The importance is recorded before the domain is seen, so one cell a seed holds it.
    """
    by_seed: dict[Any, Mapping[str, Any]] = {}
    for task in comparison["tasks"]:
        for cell in cells_of(comparison, comparison["ours"], task):
            norms = (cell.get("importance") or {}).get("layer_norms")
            if norms:
                by_seed.setdefault(cell["seed"], norms)
    found: dict[str, list[float]] = {}
    for norms in by_seed.values():
        for name, norm in norms.items():
            found.setdefault(name, []).append(number(norm))
    return {name: sum(norms) / len(norms) for name, norms in found.items()}


def all_figures(comparison: Mapping[str, Any], cost: Mapping[str, Any] | None = None) -> dict[str, Figure]:
    """File name → figure, in the paper's order, without those that have nothing to draw, which the log names."""
    figures = {
        "trade_off": trade_off(comparison),
        "figure_3_violins": violins(comparison),
        "figure_4_training_curves": training_curves(comparison),
        "figure_5_cost": cost_bars(cost or {}),
        "figure_6_strength": strength_sweep(comparison),
        "figure_7_importance": importance_heatmap(importance_of(comparison)),
    }
    for name, figure in figures.items():
        if not figure.axes:
            logger.info("no %s: %s", name, figure.texts[0].get_text())
    return {name: figure for name, figure in figures.items() if figure.axes}


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"
