"""Trade-off curves over each arm's strengths, and the paper's Fig. 6.

As in figures.py, each function returns a Matplotlib Figure, without axes if there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from hlora.report.comparison.arm_styles import HALO, OTHER_GREYS, ArmStyle, blank, styles_by_arm
from hlora.report.comparison.cells import measure, untuned
from hlora.report.comparison.curve import curve_of
from hlora.report.comparison.measures import Measure, measures
from hlora.report.style import BLACK, GREY, STYLE, nothing, printable

_SMALL_MARKERS = ("*", (4, 1, 0), (6, 1, 0), (4, 1, 45))

Points = dict[float | None, list[Mapping[str, Any]]]
"""Strength → finished cells of the seeds that have every strength (see curve.py)."""


def trade_off(comparison: Mapping[str, Any]) -> Figure:
    """General perplexity against what was learned: a line through each arm's strengths, a column for each text.

    Each task has two rows: against the answers' NLL (better: lower left) and against accuracy (better: lower right). A
    point is the mean over the seeds that have every strength, and the ringed one was chosen on validation. The base
    model is a horizontal line with a cross, which is put at the edge if it is far off. Points that are not finite are
    omitted.
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
        figure = blank(max(10, 4.5 * len(texts)), 3.1 * len(rows) + 0.25 * math.ceil((len(drawn) + 1) / 4))
        if not rows or not texts:
            return nothing(figure, "no cell has both a general text and the domain")
        styles = styles_by_arm(comparison)
        grid = figure.subplots(len(rows), len(texts), squeeze=False)
        reference = untuned(comparison)
        # Draw the paper's arms above the others, and ours on top.
        order = sorted(drawn, key=lambda arm: (arm == comparison["ours"], styles[arm][0] not in OTHER_GREYS))
        for (task, domain), row in zip(rows, grid, strict=True):
            for axes, text in zip(row, texts, strict=True):
                for arm in order:
                    points = _points(curves[task].get(arm, {}), domain, text)
                    if not points or arm in reference:
                        continue
                    x, y = np.array(list(points.values())).T
                    _draw_line(axes, x, y, styles[arm])
                    chosen = comparison["chosen"].get(arm, {}).get(task)
                    if chosen is not None and chosen in points:
                        _ring(axes, *points[chosen], styles[arm])
                _finish_trade_off(axes, task, domain, text)
                for arm in reference:
                    for x, y in _points(curves[task].get(arm, {}), domain, text).values():
                        _draw_reference(axes, x, y, styles[arm])
        handles = [*(_handle(arm, styles[arm]) for arm in drawn), _chosen_handle()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _points(curve: Points, domain: Measure, text: Measure) -> dict[float | None, tuple[float, float]]:
    """Strength → (domain, perplexity), if both were measured."""
    found = {strength: (_mean(cells, domain), _mean(cells, text)) for strength, cells in curve.items()}
    return {strength: (x, y) for strength, (x, y) in found.items() if x is not None and y is not None}


def _finish_trade_off(axes: Axes, task: str, domain: Measure, text: Measure) -> None:
    ends = axes.dataLim.intervaly
    if 0 < 4 * ends[0] < ends[1]:  # an arm that is far off must not flatten the others
        axes.set_yscale("log")
        _ticks(axes, "y")
    axes.margins(0.08)
    axes.grid(alpha=0.25)
    unit = "answer NLL, nats" if domain.lower_is_better else "accuracy, % of questions"
    axes.set(xlabel=unit, ylabel="perplexity", title=f"{printable(task, 18)} · {printable(text.text or '', 26)}")
    # Above the axes, where there is no data.
    better = "better ↙" if domain.lower_is_better else "better ↘"
    axes.text(1, 1.03, better, transform=axes.transAxes, ha="right", color=GREY)


def _draw_reference(axes: Axes, x: float, y: float, style: ArmStyle) -> None:
    """Draw a model that never saw the domain: a horizontal line at its perplexity, and a marker.

    If it is far off, the marker is put at the edge: it learned nothing, and would squeeze the others into a corner.
    """
    colour, marker, line = style
    low, high = sorted(axes.get_xlim())
    alone = not axes.has_data()
    reach = 0 if alone else 0.5 * (high - low)
    axes.axhline(y, color=colour, linestyle=line, linewidth=0.9, zorder=1)
    place = x if alone or low - reach <= x <= high + reach else high if x > high else low
    axes.plot([place], [y], marker=marker, color=colour, markersize=8, clip_on=False, zorder=5, **HALO)
    if place != x:
        side, arrow = ("right", f"{x:.3g} →") if x > high else ("left", f"← {x:.3g}")
        offset = -6 if side == "right" else 6
        note = axes.annotate(arrow, (place, y), (offset, 5), textcoords="offset points", ha=side, fontsize=8)
        note.set_bbox({"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6})
        axes.set_xlim(low, high)


def strength_sweep(comparison: Mapping[str, Any]) -> Figure:
    """Fig. 6: each measure on test over the strength (log axis) of every arm that has several, a row for each task.

    Values are means over the seeds that have every strength. Rings mark the chosen strengths. Horizontal lines are the
    base model and the unprotected arm.
    """
    curves = _curves(comparison)
    tasks = [task for task in comparison["tasks"] if any(len(_positive(c)) > 1 for c in curves[task].values())]
    arms = [arm for arm in comparison["arms"] if any(len(_positive(curves[task].get(arm, {}))) > 1 for task in tasks)]
    level = [arm for arm in (*untuned(comparison, "base"), comparison["unprotected"]) if arm in comparison["arms"]]
    level = [arm for arm in dict.fromkeys(level) if arm not in arms]
    with matplotlib.rc_context(STYLE):
        what = [m for m in measures(comparison) if any(_mean(c, m) is not None for t in tasks for c in _all(curves[t]))]
        figure = blank(2.75 * max(len(what), 2), 2.4 * len(tasks) + 0.25 * math.ceil((len(arms) + 4) / 4))
        if not tasks or not what:
            return nothing(figure, "no arm has several strengths")
        styles = styles_by_arm(comparison)
        grid = figure.subplots(len(tasks), len(what), squeeze=False, sharex=True)
        for task, row in zip(tasks, grid, strict=True):
            for axes, each in zip(row, what, strict=True):
                for arm in arms:
                    found = _positive(curves[task].get(arm, {}))
                    points = {s: v for s, cells in found.items() if (v := _mean(cells, each)) is not None}
                    _draw_line(axes, list(points), list(points.values()), styles[arm])
                    chosen = comparison["chosen"].get(arm, {}).get(task)
                    if chosen in points:
                        _ring(axes, chosen, points[chosen], styles[arm])
                for arm in level:
                    value = _mean([c for cells in curves[task].get(arm, {}).values() for c in cells], each)
                    if value is not None:
                        axes.axhline(value, color=styles[arm][0], linestyle=styles[arm][2], linewidth=1)
                axes.set_xscale("log")
                _ticks(axes, "x", plain=True)
                axes.set_title(f"{printable(task, 14)} · {printable(each.label, 22)}", fontsize=9)
                axes.grid(alpha=0.25)
                axes.yaxis.set_major_locator(MaxNLocator(5))
                axes.tick_params(labelbottom=True)  # a panel is shown by itself on a phone
                axes.set_xlabel("strength, in each method's own unit", fontsize=8.5)
        handles = [_handle(arm, styles[arm]) for arm in arms]
        handles += [
            Line2D([], [], color=styles[arm][0], linestyle=styles[arm][2], label=printable(arm, 30)) for arm in level
        ]
        figure.legend(handles=[*handles, _chosen_handle()], loc="outside lower center", ncols=4, frameon=False)
    return figure


def _curves(comparison: Mapping[str, Any]) -> dict[str, dict[str, Points]]:
    """Task → arm → curve."""
    return {
        task: {arm: points for arm in comparison["arms"] if (points := curve_of(comparison, arm, task).points())}
        for task in comparison["tasks"]
    }


def _all(curves: Mapping[str, Points]) -> Iterable[list[Mapping[str, Any]]]:
    return (cells for curve in curves.values() for cells in curve.values())


def _positive(curve: Points) -> dict[float, list[Mapping[str, Any]]]:
    """The points whose strength a log axis can show."""
    return {strength: cells for strength, cells in curve.items() if strength is not None and strength > 0}


def _mean(cells: Sequence[Mapping[str, Any]], what: Measure) -> float | None:
    """Mean over cells; None if a cell lacks the value or has one that is not finite."""
    found = [value for cell in cells if (value := measure(cell, what.name, what.text)) is not None]
    if not found or len(found) < len(cells) or not all(map(math.isfinite, found)):
        return None
    return what.scale * sum(found) / len(found)


def _draw_line(axes: Axes, x: Any, y: Any, style: ArmStyle) -> None:
    colour, marker, line = style
    front = colour not in OTHER_GREYS
    axes.plot(
        x,
        y,
        marker=marker,
        color=colour,
        linestyle=line,
        linewidth=1.5 if front else 0.9,
        markersize=_size(marker),
        zorder=3 if front else 2,
        **HALO,
    )


def _ring(axes: Axes, x: float, y: float, style: ArmStyle) -> None:
    ring: Any = {"markerfacecolor": "none", "markeredgecolor": style[0], "markeredgewidth": 1.1}
    axes.plot([x], [y], "o", markersize=11, zorder=4, **ring)


def _handle(arm: str, style: ArmStyle) -> Line2D:
    colour, marker, line = style
    shown: Any = {"markersize": _size(marker), **HALO}
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=printable(arm, 34), **shown)


def _size(marker: Any) -> float:
    """Size of a marker; stars look smaller than they are."""
    return 9 if marker in _SMALL_MARKERS else 6.5


def _chosen_handle() -> Line2D:
    style: Any = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": BLACK}
    return Line2D([], [], linestyle="", marker="o", label="chosen on validation", **style)


def _ticks(axes: Axes, which: str, plain: bool = False) -> None:
    """Few plain numbers on a log axis; Matplotlib's own ticks are powers of ten."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    low, high = axes.dataLim.intervalx if which == "x" else axes.dataLim.intervaly
    if not (0 < low < high < math.inf):
        return
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if plain and len(decades) > 3 else (1, 3) if plain else (1, 2, 5)
    if plain and len(decades) > 5:  # 1000 would touch 10000
        decades = decades[::2]
    axis.set_major_locator(FixedLocator([step * 10.0**decade for decade in decades for step in steps]))
