"""A report as one HTML page: the head that all share, and the page to the disk.

Without what a model can write that a page cannot hold or should not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from hlora.system.files import write_text

# Marks that turn the direction of all text behind them: 20.1 → 18.2 of the verdict would read 2.81 → 1.02.
_TURNS_TEXT = re.compile("[\u202a-\u202e\u2066-\u2069]")


def render(package: str, values: Mapping[str, Any]) -> str:
    """The page.html of a package behind the head and the macro `plain` in head.html; everything in it escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    head, body = files(__package__).joinpath("head.html"), files(package).joinpath("page.html")
    return environment.from_string(head.read_text("utf-8") + body.read_text("utf-8")).render(values)


def write_page(page: str, path: Path) -> None:
    """Write a report as UTF-8, whole or not at all. Half of a surrogate pair becomes ?, a bidirectional mark U+FFFD."""
    write_text(path, _TURNS_TEXT.sub("\ufffd", page).encode("utf-8", "replace").decode("utf-8"))
