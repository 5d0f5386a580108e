"""Equations as SVG, drawn when the site is built: they load no script and no font, and look alike in every browser."""

from __future__ import annotations

import re
from html import unescape
from typing import Any
from xml.etree import ElementTree

import ziamath

ziamath.config.svg2 = False  # paths in place: shared symbols of two equations would have the same names
SIZE = 20
EM = SIZE / 1.12  # STIX beside the sans serif of the text

# What pymdownx.arithmatex makes of $…$ and of a block ```math.
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    return _EQUATION.sub(_drawn, html)


def _drawn(found: re.Match[str]) -> str:
    """An image in the size and colour of the text around it; its LaTeX describes it to a screen reader."""
    inline, latex = found[1] == "span", unescape(found[2]).strip()
    equation = ziamath.Latex(latex, size=SIZE, color="currentColor", inline=inline, margin=0)
    image = equation.svgxml()
    width, height = (float(image.attrib.pop(side)) / EM for side in ("width", "height"))
    below = f"vertical-align:{equation.getyofst() / EM:.3f}em" if inline else "display:block;margin:auto"
    image.attrib |= {"role": "img", "aria-label": latex, "style": f"width:{width:.3f}em;height:{height:.3f}em;{below}"}
    drawn = ElementTree.tostring(image, encoding="unicode")
    return drawn if inline else f'<div class="equation">{drawn}</div>'
