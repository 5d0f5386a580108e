"""The paper's figures of a comparison, and the trade-off curves that its single points hide.

`comparison` is what comparison.json holds (see comparison.py), `cost` what cost.json holds (see cost.py). As in
figures.py, each function returns a Matplotlib Figure that no pyplot state knows of; one without axes says in words that
there is nothing to draw. Arms differ by colour, marker and line, so that figures read in black and white.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from hlora import statistics
from hlora.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    STYLE,
    VERMILION,
    importance_heatmap,
    nothing,
    number,
    printable,
    running_mean,
)
from hlora.statistics import cells_of, measure, values_of

logger = logging.getLogger("hlora")

_OURS, _RIVAL = (GREEN, "o", "-"), (BLUE, "s", "--")
_PAPER_LOOKS = {  # colour, marker, line
    "base": (BLACK, "P", ":"),
    "lora": (VERMILION, "X", "-."),
    "lora_after_general": (ORANGE, "D", (0, (5, 1))),
    "rslora": (SKY, "^", ":"),
    "ewc": _RIVAL,
    "hlora": _OURS,
}
_OTHER_MARKERS: tuple[Any, ...] = ("v", "<", ">", "p", "*", "d", (4, 1, 0), (6, 1, 0), "h", (4, 1, 45), "8", "H")
_SMALL_MARKERS = ("*", (4, 1, 0), (6, 1, 0), (4, 1, 45))
_OTHER_LINES: tuple[Any, ...] = ("-", "--", "-.", ":")
_OTHER_GREYS = ("#4d4d4d", "#7a7a7a", "#a0a0a0")
_HALO: Any = {"markeredgecolor": "white", "markeredgewidth": 0.6}


class Measure(NamedTuple):
    """A measure that figures and the report compare arms by."""

    label: str
    name: str
    text: str | None
    """The general text that it is of; None: of the domain."""
    scale: float
    lower_is_better: bool


class Panel(NamedTuple):
    """One panel of Fig. 3: a measure on a task, ours against the rival."""

    task: str
    measure: Measure
    ours: list[float]
    theirs: list[float]
    welch: statistics.Comparison
    p_holm: float
    """Corrected over the panels that have a p."""


def measures(comparison: Mapping[str, Any]) -> list[Measure]:
    """Perplexity of each general text, the answers' NLL in nats, and accuracy in %."""
    texts = [Measure(f"PPL {text}", "perplexity", text, 1, True) for text in comparison["texts"]]
    return [*texts, Measure("answer NLL", "answer_nll", None, 1, True), Measure("accuracy %", "acc", None, 100, False)]


def values(comparison: Mapping[str, Any], arm: str, task: str, what: Measure) -> list[float]:
    """An arm's test values over seeds at the chosen strength, in the measure's unit; a diverged one is not finite."""
    return [what.scale * value for value in values_of(comparison, arm, task, what.name, what.text).values()]


def t_tests(comparison: Mapping[str, Any]) -> list[Panel]:
    """Fig. 3's tests, task by task: perplexity of each text and accuracy, as in tables.t_test_table."""
    panels = []
    for task in comparison["tasks"]:
        for what in measures(comparison):
            if what.name != "answer_nll":
                ours, theirs = (values(comparison, comparison[side], task, what) for side in ("ours", "rival"))
                panels.append((task, what, ours, theirs, statistics.welch(ours, theirs)))
    corrected = statistics.holm(panel[-1].p for panel in panels)
    return [Panel(*panel, p) for panel, p in zip(panels, corrected, strict=True)]


def violins(comparison: Mapping[str, Any]) -> Figure:
    """Fig. 3: perplexity of each text and accuracy over seeds, ours beside the rival, a row for each task.

    Above each panel: Welch's p, the same after Holm's correction over all panels, and Hedges' g (ours less rival). The
    short line is the mean. Fewer than three seeds, or equal values, have no violin.
    """
    tests = t_tests(comparison)
    with matplotlib.rc_context(STYLE):
        tasks = [task for task in comparison["tasks"] if any(t.ours or t.theirs for t in tests if t.task == task)]
        columns = len(comparison["texts"]) + 1
        figure = _figure(2.9 * columns, 2.6 * len(tasks))
        if not tasks:
            return nothing(figure, "neither arm has a finished cell")
        grid = figure.subplots(len(tasks), columns, squeeze=False)
        shown = [test for test in tests if test.task in tasks]
        for axes, test in zip(grid.flat, shown, strict=True):
            _draw_violins(axes, test, (comparison["ours"], comparison["rival"]))
    return figure


def _draw_violins(axes: Axes, test: Panel, names: tuple[str, str]) -> None:
    for place, (found, (colour, marker, _)) in enumerate(zip((test.ours, test.theirs), (_OURS, _RIVAL), strict=True)):
        sample = [value for value in found if math.isfinite(value)]
        if len(sample) > 2 and len(set(sample)) > 1:
            body = axes.violinplot([sample], [place], widths=0.7, showextrema=False)["bodies"][0]  # type: ignore[index]
            body.set(facecolor=colour, edgecolor=colour, alpha=0.25)
        if sample:
            axes.plot([place - 0.2, place + 0.2], [np.mean(sample)] * 2, color=BLACK, linewidth=1.5)
        spread = place + np.linspace(-0.08, 0.08, len(sample)) if len(sample) > 1 else [place] * len(sample)
        axes.plot(spread, sample, marker, color=colour, markersize=5.5, **_HALO)
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
    result = "too few seeds to test" if finite else "not tested: values that are not finite"
    if math.isfinite(test.welch.p):
        result = f"p {_p(test.welch.p)} · Holm {_p(test.p_holm)} · g {_signed(test.welch.hedges_g)}"
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
        figure = _figure(8, 2.4 * len(histories))
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
        figure = _figure(10, 0.9 + 0.55 * sum(heights))
        if not rows:
            return nothing(figure, "no cost measured")
        grid = figure.subplots(len(countings), 2, squeeze=False, sharey="row", height_ratios=heights)
        for (left, right), counting in zip(grid, countings, strict=True):
            shown = [row for row in rows if row["counting"] == counting]
            scale = cost.get("scale")
            share = f" × 1/{1 / scale:,.4g}" if counting == "paper" and scale else ""
            title = f"{titles.get(counting, printable(counting))}{share}"
            _draw_bars(left, shown, ("seconds", "seconds_beyond_training"), _seconds)
            _draw_bars(right, shown, ("bytes", "whole_model_bytes"), _bytes)
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


def strength_sweep(comparison: Mapping[str, Any]) -> Figure:
    """Fig. 6: each measure on test over the strength (log axis) of every arm that has several, a row for each task.

    Values are means over the seeds that have most strengths. Rings are the chosen strengths; level lines the base
    model and the unprotected arm.
    """
    curves = _curves(comparison)
    tasks = [task for task in comparison["tasks"] if any(len(_positive(c)) > 1 for c in curves[task].values())]
    arms = [arm for arm in comparison["arms"] if any(len(_positive(curves[task].get(arm, {}))) > 1 for task in tasks)]
    level = [*statistics.untuned(comparison, "base"), comparison["unprotected"]]
    level = [arm for arm in dict.fromkeys(level) if arm not in arms]
    with matplotlib.rc_context(STYLE):
        what = [m for m in measures(comparison) if any(_mean(c, m) is not None for t in tasks for c in _all(curves[t]))]
        figure = _figure(2.75 * max(len(what), 2), 2.4 * len(tasks) + 0.25 * math.ceil((len(arms) + 4) / 4))
        if not tasks or not what:
            return nothing(figure, "no arm has several strengths")
        looks = arm_looks(comparison)
        grid = figure.subplots(len(tasks), len(what), squeeze=False, sharex=True)
        for task, row in zip(tasks, grid, strict=True):
            for axes, each in zip(row, what, strict=True):
                for arm in arms:
                    found = _positive(curves[task].get(arm, {}))
                    points = {s: v for s, cells in found.items() if (v := _mean(cells, each)) is not None}
                    _draw_line(axes, list(points), list(points.values()), looks[arm])
                    chosen = comparison["chosen"].get(arm, {}).get(task)
                    if chosen in points:
                        _ring(axes, chosen, points[chosen], looks[arm])
                for arm in level:
                    value = _mean([c for cells in curves[task].get(arm, {}).values() for c in cells], each)
                    if value is not None:
                        axes.axhline(value, color=looks[arm][0], linestyle=looks[arm][2], linewidth=1)
                axes.set_xscale("log")
                _ticks(axes, "x", plain=True)
                axes.set_title(f"{printable(task, 14)} · {printable(each.label, 22)}", fontsize=9)
                axes.grid(alpha=0.25)
                axes.yaxis.set_major_locator(MaxNLocator(5))
                if task == tasks[-1]:
                    axes.set_xlabel("strength (φ, λ, p or β)")
        handles = [_handle(arm, looks[arm]) for arm in arms]
        handles += [
            Line2D([], [], color=looks[arm][0], linestyle=looks[arm][2], label=printable(arm, 30)) for arm in level
        ]
        figure.legend(handles=[*handles, _chosen_handle()], loc="outside lower center", ncols=4, frameon=False)
    return figure


def importance_of(comparison: Mapping[str, Any]) -> dict[str, float]:
    """Fig. 7's norms ‖Ω_l‖₂ of our arm: matrix name → mean over seeds, for figures.importance_heatmap.

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


def trade_off(comparison: Mapping[str, Any]) -> Figure:
    """General perplexity against what was learned: a line through the strengths of each arm, a column for each text.

    Two rows for each task: against the answers' NLL (better: lower left) and against accuracy (better: lower right).
    A point is the mean over the seeds that have most strengths; the ringed one was chosen on validation. The base model
    is a level line with a cross, at the edge where it is far off. Points that are not finite are left out.
    """
    curves = _curves(comparison)
    *texts, nll, acc = measures(comparison)
    rows = [
        (task, domain)
        for task in comparison["tasks"]
        for domain in (nll, acc)
        if any(_mean(cells, domain) is not None for cells in _all(curves[task]))
    ]
    drawn = [arm for arm in comparison["arms"] if any(curves[task].get(arm) for task, _ in rows)]
    with matplotlib.rc_context(STYLE):
        figure = _figure(max(10, 4.5 * len(texts)), 3.1 * len(rows) + 0.25 * math.ceil((len(drawn) + 1) / 4))
        if not rows or not texts:
            return nothing(figure, "no cell has both a general text and the domain")
        looks = arm_looks(comparison)
        grid = figure.subplots(len(rows), len(texts), squeeze=False)
        reference = statistics.untuned(comparison)
        # The paper's arms above the others, ours above all.
        order = sorted(drawn, key=lambda arm: (arm == comparison["ours"], looks[arm][0] not in _OTHER_GREYS))
        for (task, domain), row in zip(rows, grid, strict=True):
            for axes, text in zip(row, texts, strict=True):
                for arm in order:
                    points = _points(curves[task].get(arm, {}), domain, text)
                    if not points or arm in reference:
                        continue
                    x, y = np.array(list(points.values())).T
                    _draw_line(axes, x, y, looks[arm])
                    chosen = comparison["chosen"].get(arm, {}).get(task)
                    if chosen is not None and chosen in points:
                        _ring(axes, *points[chosen], looks[arm])
                _finish_trade_off(axes, task, domain, text)
                for arm in reference:
                    for x, y in _points(curves[task].get(arm, {}), domain, text).values():
                        _draw_reference(axes, x, y, looks[arm], arm)
        handles = [*(_handle(arm, looks[arm]) for arm in drawn), _chosen_handle()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _points(curve: Curve, domain: Measure, text: Measure) -> dict[float | None, tuple[float, float]]:
    """Strength → (domain, perplexity), where both were measured."""
    found = {strength: (_mean(cells, domain), _mean(cells, text)) for strength, cells in curve.items()}
    return {strength: (x, y) for strength, (x, y) in found.items() if x is not None and y is not None}


def _finish_trade_off(axes: Axes, task: str, domain: Measure, text: Measure) -> None:
    ends = axes.dataLim.intervaly
    if 0 < 4 * ends[0] < ends[1]:  # one arm far off must not flatten the others
        axes.set_yscale("log")
        _ticks(axes, "y")
    axes.margins(0.08)
    axes.grid(alpha=0.25)
    unit = "answer NLL, nats" if domain.lower_is_better else "accuracy, % of questions"
    axes.set(xlabel=unit, ylabel="perplexity", title=f"{printable(task, 18)} · {printable(text.text or '', 26)}")
    # Above the axes, where no data can be.
    better = "better ↙" if domain.lower_is_better else "better ↘"
    axes.text(1, 1.03, better, transform=axes.transAxes, ha="right", color=GREY)


def _draw_reference(axes: Axes, x: float, y: float, look: Look, arm: str) -> None:
    """A model that never saw the domain: its perplexity as a level line, its place at the edge if it is far off.

    It learned nothing, and would squeeze those that did into a corner.
    """
    colour, marker, line = look
    low, high = sorted(axes.get_xlim())
    alone = not axes.has_data()
    reach = 0 if alone else 0.5 * (high - low)
    axes.axhline(y, color=colour, linestyle=line, linewidth=0.9, zorder=1)
    place = x if alone or low - reach <= x <= high + reach else high if x > high else low
    axes.plot([place], [y], marker=marker, color=colour, markersize=8, clip_on=False, zorder=5, **_HALO)
    if place != x:
        side, arrow = ("right", f"{x:.3g} →") if x > high else ("left", f"← {x:.3g}")
        offset = -6 if side == "right" else 6
        note = axes.annotate(arrow, (place, y), (offset, 5), textcoords="offset points", ha=side, fontsize=8)
        note.set_bbox({"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6})
        axes.set_xlim(low, high)


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


Look = tuple[str, Any, Any]


def arm_looks(comparison: Mapping[str, Any]) -> dict[str, Look]:
    """Colour, marker and line of each arm: the paper's methods in colour, the first arm of each; others in greys."""
    methods = {cell["arm"]: cell["method"] for cell in comparison["cells"]}
    main = {comparison["rival"]: _RIVAL, comparison["ours"]: _OURS}
    looks: dict[str, Look] = {}
    taken: set[str] = {look[0] for look in main.values()}
    for arm in comparison["arms"]:
        colour, marker, line = main.get(arm) or _PAPER_LOOKS.get(methods.get(arm, ""), ("", "", ""))
        if arm in main or (colour and colour not in taken):
            looks[arm] = (colour, marker, line)
            taken.add(colour)
            continue
        place = sum(look[0] in _OTHER_GREYS for look in looks.values())
        looks[arm] = (
            _OTHER_GREYS[place % len(_OTHER_GREYS)],
            _OTHER_MARKERS[place % len(_OTHER_MARKERS)],
            _OTHER_LINES[place % len(_OTHER_LINES)],
        )
    return looks


Curve = dict[float | None, list[dict[str, Any]]]
"""Strength → finished cells of the seeds that have most strengths, by rising strength."""


def _curves(comparison: Mapping[str, Any]) -> dict[str, dict[str, Curve]]:
    """Task → arm → curve."""
    return {
        task: {arm: curve for arm in comparison["arms"] if (curve := _curve(comparison, arm, task))}
        for task in comparison["tasks"]
    }


def _curve(comparison: Mapping[str, Any], arm: str, task: str) -> Curve:
    """The points of a curve must be of the same seeds, or a change of seed would look like one of strength."""
    by_seed: dict[Any, dict[float | None, dict[str, Any]]] = {}
    for cell in cells_of(comparison, arm, task, "all"):
        if cell["status"] == "done":
            by_seed.setdefault(cell["seed"], {})[cell["strength"]] = cell
    strengths = max((set(found) for found in by_seed.values()), key=len, default=set())
    whole = [found for found in by_seed.values() if strengths <= found.keys()]
    return {s: [found[s] for found in whole] for s in sorted(strengths, key=lambda s: -math.inf if s is None else s)}


def _all(curves: Mapping[str, Curve]) -> Iterable[list[dict[str, Any]]]:
    return (cells for curve in curves.values() for cells in curve.values())


def _positive(curve: Curve) -> dict[float, list[dict[str, Any]]]:
    """Without the strengths that a log axis has no place for."""
    return {strength: cells for strength, cells in curve.items() if strength is not None and strength > 0}


def _mean(cells: Sequence[Mapping[str, Any]], what: Measure) -> float | None:
    """Mean over cells; None where one lacks it or is not finite."""
    found = [value for cell in cells if (value := measure(cell, what.name, what.text)) is not None]
    if not found or len(found) < len(cells) or not all(map(math.isfinite, found)):
        return None
    return what.scale * sum(found) / len(found)


def _draw_line(axes: Axes, x: Any, y: Any, look: Look) -> None:
    colour, marker, line = look
    front = colour not in _OTHER_GREYS
    axes.plot(
        x,
        y,
        marker=marker,
        color=colour,
        linestyle=line,
        linewidth=1.5 if front else 0.9,
        markersize=_size(marker),
        zorder=3 if front else 2,
        **_HALO,
    )


def _ring(axes: Axes, x: float, y: float, look: Look) -> None:
    ring: Any = {"markerfacecolor": "none", "markeredgecolor": look[0], "markeredgewidth": 1.1}
    axes.plot([x], [y], "o", markersize=11, zorder=4, **ring)


def _handle(arm: str, look: Look) -> Line2D:
    colour, marker, line = look
    shown: Any = {"markersize": _size(marker), **_HALO}
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=printable(arm, 34), **shown)


def _size(marker: Any) -> float:
    """Stars look smaller than they are."""
    return 9 if marker in _SMALL_MARKERS else 6.5


def _chosen_handle() -> Line2D:
    look: Any = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": BLACK}
    return Line2D([], [], linestyle="", marker="o", label="chosen on validation", **look)


def _ticks(axes: Axes, which: str, plain: bool = False) -> None:
    """Few plain numbers on a log axis, whose own ticks are powers of ten."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    low, high = axes.dataLim.intervalx if which == "x" else axes.dataLim.intervaly
    if not (0 < low < high < math.inf):
        return
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if plain and len(decades) > 3 else (1, 3) if plain else (1, 2, 5)
    axis.set_major_locator(FixedLocator([step * 10.0**decade for decade in decades for step in steps]))


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, max(height, 1.5)), layout="constrained", facecolor="white")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _signed(value: float) -> str:
    return (f"{value:+.3g}" if math.isfinite(value) else "∞" if value > 0 else "−∞").replace("-", "−")


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
