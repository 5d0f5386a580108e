"""The finished page to the disk, without what a model can write that a page cannot hold or should not."""

from __future__ import annotations

import re
from pathlib import Path

from hlora.files import write_text

# Marks that turn the direction of all text behind them: 20.1 → 18.2 of the verdict would read 2.81 → 1.02.
_TURNS_TEXT = re.compile("[\u202a-\u202e\u2066-\u2069]")


def write_page(page: str, path: Path) -> None:
    """Write a report as UTF-8, whole or not at all. Half of a surrogate pair becomes ?, a bidirectional mark U+FFFD."""
    write_text(path, _TURNS_TEXT.sub("\ufffd", page).encode("utf-8", "replace").decode("utf-8"))
