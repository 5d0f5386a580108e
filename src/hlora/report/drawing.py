"""A figure in a page: whole where there is room, its panels one below the other on a phone.

The panels are windows onto the whole drawing (<use> elements), so they cost a page few bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.transforms import Bbox

from hlora.report.style import STYLE, svg

_MARGIN = 4
"""Points around a panel."""


class Drawing(NamedTuple):
    """A figure as SVG."""

    whole: str
    """One <svg> element."""
    panels: str = ""
    """A <div> of an <svg> for each panel, and one for the columns of a common legend; empty if there is one panel."""
    inches: float = 8.0
    """Width of the whole."""

    @property
    def html(self) -> Markup:
        """Both, for the style sheet in head.html to choose from."""
        whole = (
            f'<div class="whole{" stacked" if self.panels else ""}" style="--inches:{self.inches:g}">{self.whole}</div>'
        )
        return Markup(whole + self.panels)


def draw(figure: Figure) -> Drawing:
    """The figure, and its panels with the row names that they share."""
    groups: dict[object, list[Axes]] = {}  # by place in the grid, which twin axes share and a colour bar lacks
    for axes in figure.axes:
        if (spec := axes.get_subplotspec()) is not None:
            groups.setdefault(spec.get_position(figure).bounds, []).append(axes)
    for place, axes in enumerate(figure.axes):
        axes.set_gid(f"panel{place}")
    for place, legend in enumerate(figure.legends):
        legend.set_gid(f"key{place}")
    figure.dpi = 72  # an SVG's unit: what is measured below is in points
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # a second layout would move the panels by some points
    whole = svg(figure)
    inches = float(figure.get_figwidth())
    if len(groups) < 2:
        return Drawing(whole, inches=inches)
    prefix = next(iter(re.findall(r'id="(f\w+-)panel0"', whole)))
    height = 72 * figure.get_figheight()
    panels = [_panel(group, f"#{prefix}", height) for group in groups.values()]
    keys = [_window([(box, [f"#{prefix}{key.get_gid()}"])], height) for key in figure.legends for box in _columns(key)]
    rows = (f'<div class="panels">{"".join(parts)}</div>' for parts in (panels, keys) if parts)
    return Drawing(whole, "".join(rows), inches)


def _panel(group: list[Axes], prefix: str, height: float) -> str:
    """One place of the grid; before it the names of its row where another panel bears them."""
    box = Bbox.union([box for axes in group if (box := axes.get_tightbbox()) is not None])
    windows = [(box, [f"{prefix}{axes.get_gid()}" for axes in group])]
    if group[0].yaxis.get_tick_params().get("labelleft") is False:
        first = next(a for a in group[0].figure.axes if a.get_shared_y_axes().joined(a, group[0]))
        left = (first.yaxis.get_tightbbox() or first.bbox).x0
        windows.insert(0, (Bbox([[left, box.y0], [first.bbox.x0 - 2, box.y1]]), [f"{prefix}{first.get_gid()}"]))
    return _window(windows, height)


def _columns(legend: Legend) -> Iterable[Bbox]:
    """The columns of a legend that lies below the whole figure, in points."""
    box = legend.get_window_extent()
    texts = legend.get_texts()
    before = (legend.handlelength + legend.handletextpad) * float(texts[0].get_fontsize())
    columns: dict[int, list[Bbox]] = {}
    for text in texts:
        columns.setdefault(round(text.get_window_extent().x0), []).append(text.get_window_extent())
    for place, found in columns.items():
        yield Bbox([[place - before, box.y0], [max(each.x1 for each in found), box.y1]])


def _window(parts: list[tuple[Bbox, list[str]]], height: float) -> str:
    """An <svg> element onto parts of the whole drawing, side by side. height: of the whole, in points."""
    shown, at = "", 0.0
    low, high = min(box.y0 for box, _ in parts) - _MARGIN, max(box.y1 for box, _ in parts) + _MARGIN
    for place, (box, targets) in enumerate(parts):
        left = box.x0 - (_MARGIN if place == 0 else 0)
        width = box.x1 + (_MARGIN if place == len(parts) - 1 else 0) - left
        uses = "".join(f'<use href="{target}"/>' for target in targets)
        view = f"{left:.1f} {height - high:.1f} {width:.1f} {high - low:.1f}"
        shown += f'<svg x="{at:.1f}" y="0" width="{width:.1f}" height="{high - low:.1f}" viewBox="{view}">{uses}</svg>'
        at += width
    return f'<svg viewBox="0 0 {at:.1f} {high - low:.1f}" style="--inches:{at / 72:.2f}">{shown}</svg>'
