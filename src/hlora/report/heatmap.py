"""The importance of each adapted matrix as a heat map (Fig. 7)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hlora.report.format import number
from hlora.report.style import STYLE, VERMILION, nothing, printable


def importance_heatmap(layer_norms: Mapping[str, float]) -> Figure:
    """Fig. 7: ‖Ω_l‖₂ of each adapted matrix on a log scale, kinds of matrix × transformer blocks.

    layer_norms: matrix name → norm. A matrix outside the blocks stands in the last column. A norm of zero is
    written as 0 and one that is not finite as !, as neither has a colour; an empty cell is a matrix not adapted.
    """
    kinds = list(dict.fromkeys(_kind(name) for name in layer_norms))
    layers = sorted({n for name in layer_norms if (n := layer_number(name)) is not None})
    outside = any(layer_number(name) is None for name in layer_norms)
    columns: list[int | None] = [*layers, *([None] if outside else [])]
    norms = np.full((len(kinds), len(columns)), np.nan)  # (kinds, layers)
    marks = []
    for name, norm in layer_norms.items():
        row, column, value = kinds.index(_kind(name)), columns.index(layer_number(name)), number(norm)
        if math.isfinite(value) and value > 0:
            norms[row, column] = value
        else:
            marks.append((column, row, "0" if value == 0 else "!"))

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 1.9 + 0.3 * len(kinds)), layout="constrained", facecolor="white")
        if not kinds:
            return nothing(figure, "no importance recorded")
        axes = figure.add_subplot()
        shown = norms[np.isfinite(norms)]
        low, high = (shown.min(), shown.max()) if shown.size else (1.0, 1.0)
        scale = LogNorm(low / 1.1, high * 1.1)  # a little wider, so that equal norms have a scale as well
        edges = (np.arange(len(columns) + 1) - 0.5, np.arange(len(kinds) + 1) - 0.5)
        cells = np.ma.masked_invalid(norms)
        mesh = axes.pcolormesh(*edges, cells, norm=scale, cmap="cividis", edgecolors="white", linewidth=0.8)
        for column, row, mark in marks:
            axes.text(column, row, mark, ha="center", va="center", color=VERMILION, weight="bold")
        every = max(1, math.ceil(len(columns) / 20))
        ticks = [i for i, layer in enumerate(columns) if layer is None or i % every == 0]
        axes.set_xticks(ticks, ["other" if columns[i] is None else str(columns[i]) for i in ticks])
        axes.set_yticks(range(len(kinds)), [printable(label) for label in _kind_labels(kinds)])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="transformer block", title="Importance of each adapted matrix, ‖Ω‖₂ (log scale)")
        bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", aspect=60, shrink=0.7)
        values = np.geomspace(low / 1.1, high * 1.1, 5)
        bar.set_ticks(list(values), labels=[f"{value:.2g}" for value in values])
        bar.ax.xaxis.set_minor_locator(NullLocator())
        bar.outline.set_visible(False)
    return figure


def layer_number(name: str) -> int | None:
    """The first number in a dotted module name: model.layers.3.self_attn.q_proj → 3."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else None


def _kind(name: str) -> str:
    """A matrix name without its block number: model.layers.3.self_attn.q_proj → model.layers.*.self_attn.q_proj."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name, count=1)


def _kind_labels(kinds: list[str]) -> list[str]:
    """The last part of each kind, or all of it where two kinds end alike (an encoder's and a decoder's q_proj)."""
    ends = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return [end if ends.count(end) == 1 else kind for end, kind in zip(ends, kinds, strict=True)]
