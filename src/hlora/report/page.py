"""A report as one HTML page: the head that all share, and the page to the disk.

Without what a model can write that a page cannot hold or should not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


def about(
    kind: str, config: Mapping[str, Any], provenance: Mapping[str, Any], domain: Sequence[str]
) -> tuple[str, list[tuple[str, str]]]:
    """The title of a page, and what it is of: model, domain, general text and date, as far as each is known.

    kind: what the page is called. domain: names of the domain's tasks or files.
    """
    general = config.get("general") or {}
    sources = [general, *(general.get("mixture") or [])]
    texts = [name for source in sources for name in (*(source.get("paths") or []), source.get("dataset") or "")]
    if any(source.get("source") == "model" for source in sources):
        texts.append("the model's own samples")
    facts = {
        "Model": str((config.get("model") or {}).get("name") or ""),
        "Domain": ", ".join(domain),
        "General text": ", ".join(text for text in texts if text),
        "Date": str(provenance.get("finished") or provenance.get("started") or "")[:10],
    }
    known = [(name, fact) for name, fact in facts.items() if fact]
    shown = [fact for name, fact in known if name != "General text"]
    return f"{kind}: {', '.join(shown)}" if shown else kind, known


def write_page(page: str, path: Path) -> None:
    """Write a report as UTF-8, whole or not at all. Half of a surrogate pair becomes ?, a bidirectional mark U+FFFD."""
    write_text(path, _TURNS_TEXT.sub("\ufffd", page).encode("utf-8", "replace").decode("utf-8"))
