"""Equations as MathML, which browsers render themselves: no script and no font has to be loaded."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $…$ and of a block ```math.
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    return _EQUATION.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    tag, latex = found[1], unescape(found[2]).strip()
    mathml = convert(latex, display="block" if tag == "div" else "inline")
    return f'<{tag} class="equation">{mathml}</{tag}>'
