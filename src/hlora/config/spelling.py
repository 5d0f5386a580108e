"""The nearest valid name to one that is not."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any


def nearest(name: str, valid: set[str]) -> str:
    """The end of a message about an unknown name: the nearest valid one, else up to 20 of the valid ones."""
    names = sorted(valid)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return did_you_mean(name, names) or f"; valid: {', '.join(names[:20])}{more}"


def did_you_mean(name: Any, valid: list[str]) -> str:
    """The nearest name as a question; empty if none is near."""
    close = get_close_matches(str(name), valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
