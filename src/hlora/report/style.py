"""How figures look, and how they get into a page or a file.

Colours are Okabe and Ito's, told apart by colour-blind readers. Text is never read as TeX mathematics, as names come
from the user.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from hlora.methods import METHODS, ArmStyle, label_of
from hlora.system.files import temporary_name, write_text

BLACK, BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE, GREY = (
    "#000000", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#777777",
)  # fmt: skip
_COLOURS = {
    "black": BLACK, "blue": BLUE, "sky": SKY, "green": GREEN, "orange": ORANGE, "vermilion": VERMILION,
    "purple": PURPLE, "grey": GREY,
}  # fmt: skip

_SVG = "http://www.w3.org/2000/svg"

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


def style_of(method: str) -> ArmStyle | None:
    """Colour, marker and line of a method in every figure; None for one without a style of its own."""
    style = METHODS[method].style if method in METHODS else None
    return None if style is None else (_COLOURS[style[0]], *style[1:])


def phase_label(phase: str) -> str:
    """What people read for a phase: the general one, the domain one of an arm, or an arm's evaluation."""
    if phase.startswith("evaluate "):
        return f"Evaluation, {label_of(phase.removeprefix('evaluate '))}"
    return "General phase" if phase == "record" else f"Domain phase, {label_of('hlora' if phase == 'tune' else phase)}"


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


def svg_file(drawing: str) -> str:
    """What `svg` returned, as a file of its own."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + drawing.replace("<svg", f'<svg xmlns="{_SVG}"', 1)


def save(figure: Figure, path_without_suffix: str | Path) -> tuple[Path, Path]:
    """Write <path>.png (200 dpi) and <path>.svg, each whole or not at all; returns both paths."""
    png, vector = Path(f"{path_without_suffix}.png"), Path(f"{path_without_suffix}.svg")
    png.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_name(png, "tmp")
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(partial, format="png", dpi=200)
        figure.savefig(text, format="svg", metadata={"Date": None})
    partial.replace(png)
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
