"""Nothing that is evaluated is trained on: long lines in common are found and left out."""

from __future__ import annotations

from collections.abc import Iterable

_LONG_LINE = 80  # characters; a line this long that stands in an evaluation text is no coincidence


def without_long_lines_of(documents: list[str], texts: Iterable[str]) -> tuple[list[str], int]:
    """The documents without long lines that stand in `texts`, and the number of characters taken out."""
    lines = {line.strip() for text in texts for line in text.splitlines() if len(line.strip()) >= _LONG_LINE}
    kept, dropped = [], 0
    for document in documents:
        parts = document.splitlines(keepends=True)
        left = [part for part in parts if part.strip() not in lines]
        if len(left) < len(parts):
            dropped += sum(map(len, parts)) - sum(map(len, left))
            document = "".join(left)
        if document.strip():
            kept.append(document)
    return kept, dropped
