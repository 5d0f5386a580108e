"""The nearest valid name to one that is not."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any


def nearest(name: str, valid: set[str]) -> str:
    """The end of a message about a name that is not valid: the nearest one, else those that are."""
    return did_you_mean(name, sorted(valid)) or f"; valid: {', '.join(sorted(valid)[:12])}"


def did_you_mean(name: Any, valid: list[str]) -> str:
    """The nearest name as a question, nothing where none is near."""
    close = get_close_matches(str(name), valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
