"""The paper's figures and the one picture a newcomer needs: what was forgotten, what was learned.

Each function returns a Matplotlib Figure that no pyplot state knows of, so it works without a display. Colours are
Okabe and Ito's, told apart by colour-blind readers; arms differ by marker too, for print. Text is never read as
TeX mathematics, as names come from the user.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hlora.files import beside, write_text

ARM_LABELS = {
    "base": "Base",
    "after_general": "After general phase",
    "hlora": "HLoRA",
    "lora_mu": "LoRA (domain only)",
    "lora_nu_mu": "LoRA (general, then domain)",
}
BLACK, BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE, GREY = (
    "#000000", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#777777",
)  # fmt: skip
_ARM_LOOKS = {
    "base": (BLACK, "|"),
    "after_general": (SKY, "s"),
    "hlora": (GREEN, "o"),
    "lora_mu": (VERMILION, "X"),
    "lora_nu_mu": (ORANGE, "D"),
}
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "font.size": 9.5,
    "svg.fonttype": "path",  # looks the same whatever fonts the reader has
    "svg.hashsalt": "hlora",
    "text.parse_math": False,
}


class Change(NamedTuple):
    """A measure of an arm less that of the base, and its standard error, both in the measure's unit.

    `stderr` is NaN when the evaluations carry none.
    """

    value: float
    stderr: float

    @property
    def noise(self) -> float:
        """What a change has to exceed to count: two standard errors, and never less than rounding (0.001)."""
        return max(2 * self.stderr, 1e-3) if math.isfinite(self.stderr) else 1e-3


def number(value: Any) -> float:
    """A float, NaN for anything that is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def change(base: Mapping[str, Any], arm: Mapping[str, Any], measure: str) -> Change:
    """How `measure` (nll, answer_nll, acc, …) changed from base to arm.

    Both score the same tokens and rows, so their errors are correlated. Where the two evaluations list the parts
    (`<measure>_each`: one value a window or row), the standard error is that of the paired differences. Otherwise
    it is √(s² + s²) of both `<measure>_stderr`, an upper bound, under which small forgetting can pass as noise.
    """
    value = number(arm.get(measure)) - number(base.get(measure))
    parts = [np.array([number(x) for x in each.get(f"{measure}_each") or []]) for each in (base, arm)]
    if len(parts[0]) == len(parts[1]) > 1:
        return Change(value, float(np.std(parts[1] - parts[0], ddof=1) / math.sqrt(len(parts[0]))))
    return Change(value, math.hypot(*(number(each.get(f"{measure}_stderr")) for each in (base, arm))))


def arm_label(arm: str) -> str:
    """What people read for an arm of the comparison; unknown names stay as they are."""
    return ARM_LABELS.get(arm, arm)


def phase_label(phase: str) -> str:
    """What people read for a phase: the general one, the domain one of an arm, or an arm's evaluation."""
    if phase.startswith("evaluate "):
        return f"Evaluation, {arm_label(phase.removeprefix('evaluate '))}"
    return "General phase" if phase == "record" else f"Domain phase, {arm_label('hlora' if phase == 'tune' else phase)}"


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
    probes = [entry for entry in entries if math.isfinite(number(entry.get("probe_rise")))]
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
        right.set(title="penalty weight φ", xlabel="optimizer step")
        for axes in (left, right):
            axes.grid(alpha=0.25)
    return figure


def importance_heatmap(layer_norms: Mapping[str, float]) -> Figure:
    """Fig. 7: ‖Ω_l‖₂ of each adapted matrix on a log scale, kinds of matrix × transformer blocks.

    layer_norms: matrix name → norm. A matrix outside the blocks stands in the last column. A norm of zero is
    written as 0 and one that is not finite as !, as neither has a colour; an empty cell is a matrix not adapted.
    """
    from hlora.adapters import layer_number  # here, as it brings PyTorch

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
        figure = Figure(figsize=(8, 1.9 + 0.36 * len(kinds)), layout="constrained", facecolor="white")
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
        every = max(1, math.ceil(len(columns) / 32))
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


def forgetting_picture(arms: Mapping[str, Mapping[str, Any]]) -> Figure:
    """What each arm forgot and what it learned, one row an arm, each bar two standard errors to either side.

    Left, for each evaluation text: the rise of loss against base in nats/token, with the change of perplexity.
    Right: the domain's answer NLL (nats per answer), and accuracy where there is one.
    arms: arm name → evaluation, with the base under "base" (see report.write_report).
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
        grid[0].set_yticks(range(len(names)), [printable(arm_label(name)).replace(" (", "\n(") for name in names])
        grid[0].set_ylim(len(names) - 0.5, -0.65)
    return figure


def svg(figure: Figure) -> str:
    """An <svg> element to put into HTML: the same bytes for the same figure, ids its own, no outside address."""
    buffer = io.StringIO()
    no_metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    text = buffer.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    # Matplotlib numbers its groups from one in each file: prefixed, several figures can share a page.
    prefix = "f" + hashlib.sha256(text.encode()).hexdigest()[:10]
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)


def save(figure: Figure, path_without_suffix: str | Path) -> tuple[Path, Path]:
    """Write <path>.png (200 dpi) and <path>.svg, each whole or not at all; returns both paths."""
    png, vector = Path(f"{path_without_suffix}.png"), Path(f"{path_without_suffix}.svg")
    building = beside(png, "tmp")
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(building, format="png", dpi=200)
        figure.savefig(text, format="svg", metadata={"Date": None})
    building.replace(png)
    write_text(vector, text.getvalue())
    return png, vector


def nothing(figure: Figure, message: str) -> Figure:
    """The figure with a message and without axes: there is nothing to draw."""
    figure.text(0.5, 0.5, message, ha="center", va="center", color=GREY)
    return figure


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the run, centred, without the entries that are not finite. (n,) → (n,)"""
    window = np.ones(min(len(values), 2 * (len(values) // 40) + 1))
    known = np.isfinite(values)
    counts = np.convolve(known, window, mode="same")
    sums = np.convolve(np.where(known, values, 0.0), window, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def printable(text: str, length: int = 48) -> str:
    """One line of characters that a font can draw."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= length else f"{line[: length - 1]}…"


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
                # exp overflows at 709 nats; nobody reads such a perplexity
                label = f"{rise.value:+.2f} ({math.expm1(min(rise.value, 50)):+.0%})"
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
                points[arm] = (value, 2 * stderr, f"{value:.1f} %" if factor == 100 else f"{value:.2f}")
        if points:
            yield _Panel(title, unit, points.get("base", (math.nan,))[0], points, lower)


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
        colour, marker = _ARM_LOOKS.get(name, (PURPLE, "P"))
        if math.isfinite(value):
            error = half if math.isfinite(half) else None
            axes.errorbar(value, row, xerr=error, fmt=marker, color=colour, markersize=7, elinewidth=1.5)
            inside = min(max((value - low) / (high - low), 0.27), 0.73)  # keeps the label within the panel
            text = axes.text(inside, row - 0.2, label.replace("-", "−"), ha="center", va="bottom")
            text.set_bbox({"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6})
        else:
            text = axes.text(0.5, row, "not finite", ha="center", va="center", color=VERMILION, weight="bold")
        text.set_transform(axes.get_yaxis_transform())
    axes.set(title=panel.title, xlabel=panel.unit)
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=4)


def _kind(name: str) -> str:
    """A matrix name without its block number: model.layers.3.self_attn.q_proj → model.layers.*.self_attn.q_proj."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name, count=1)


def _kind_labels(kinds: list[str]) -> list[str]:
    """The last part of each kind, or all of it where two kinds end alike (an encoder's and a decoder's q_proj)."""
    ends = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return [end if ends.count(end) == 1 else kind for end, kind in zip(ends, kinds, strict=True)]
