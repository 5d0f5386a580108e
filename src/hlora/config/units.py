"""Values that people write with a unit: a share of the rows, a rise of perplexity."""

from __future__ import annotations

import math
import re


def allowed(limit: int | str, rows: int) -> int:
    """How many of `rows` may be skipped: "1%" of them, rounded down, or a number. Raises ValueError otherwise."""
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", limit) if isinstance(limit, str) else None
    if share and float(share[1]) <= 100:
        return math.floor(rows * float(share[1]) / 100)
    if isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0:
        return limit
    raise ValueError('expected a share of the rows such as "1%", or a number of rows, 0 or more')


def parse_budget(text: str | float) -> float:
    """A budget in nats per token: "1%" is a perplexity higher by 1 %, log 1.01 nats; a number is in nats.

    Raises:
        ValueError: The text is neither, with what was expected.
    """
    expected = 'expected a rise of perplexity such as "1%", or nats per token such as 0.01, more than 0'
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ValueError(f"budget: {expected}; got {text!r}")
    match = re.fullmatch(r"\s*([^\s%]+)\s*(%?)\s*", str(text))
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not 0 < number < math.inf:
        raise ValueError(f"budget: {expected}; got {text!r}")
    return math.log1p(number / 100) if match[2] else number
