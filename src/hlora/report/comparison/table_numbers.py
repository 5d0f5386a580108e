"""Numbers as the cells of a table show them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hlora.report.comparison.significance import Interval, mean_sd
from hlora.report.format import decimals

NONE = "–"
"""In place of a number that does not exist."""


def mean_and_sd(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± standard deviation, or the mean alone of one value."""
    sample = list(values)
    mean, sd = mean_sd(sample)
    if not sample:
        return NONE
    return decimals(mean, digits) + ("" if math.isnan(sd) else f" ± {decimals(sd, digits)}")


def with_bounds(interval: Interval, missing: str, digits: int, *, sign: bool = False) -> str:
    """value [low, high], or the value alone where it has no interval."""
    if math.isnan(interval.value):
        return missing
    value, low, high = (decimals(bound, digits, sign=sign) for bound in interval)
    return value if math.isnan(interval.low) else f"{value} [{low}, {high}]"


def mean_of(values: Iterable[float | None], digits: int) -> str:
    """Mean of the values that are known."""
    return decimals(mean_sd(value for value in values if value is not None)[0], digits)


def largest_of(values: Iterable[float | None], unit: float, digits: int) -> str:
    """The largest value that is known, in a unit."""
    found = [value for value in values if value is not None]
    return decimals(max(found) / unit, digits) if found else NONE
