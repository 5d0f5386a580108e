"""Numbers as the cells of a table show them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hlora.report.comparison.significance import Interval, mean_sd

NONE = "–"
"""In place of a number that there is not."""


def mean_and_sd(values: Iterable[float], decimals: int = 2) -> str:
    """Mean ± standard deviation, or the mean alone of one value."""
    sample = list(values)
    mean, sd = mean_sd(sample)
    if not sample:
        return NONE
    form = f"{{:.{decimals}f}}"
    return shown_number(mean, form) + ("" if math.isnan(sd) else f" ± {shown_number(sd, form)}")


def shown_number(value: float, form: str) -> str:
    """A number with a real minus sign and without a negative zero; huge ones by three digits."""
    if math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = form.format(value) if abs(value) < 1e5 else f"{value:.3g}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def with_bounds(interval: Interval, missing: str, sign: bool = False) -> str:
    """value [low, high], or the value alone where it has no interval."""
    if math.isnan(interval.value):
        return missing
    value, low, high = (shown_number(bound, "{:+.2f}" if sign else "{:.2f}") for bound in interval)
    return value if math.isnan(interval.low) else f"{value} [{low}, {high}]"


def p_value(p: float) -> str:
    """Three digits; a smaller one is <0.001."""
    return "<0.001" if p < 0.001 else shown_number(p, "{:.3f}")


def mean_of(values: Iterable[float | None], form: str) -> str:
    """Mean of the values that are known."""
    return shown_number(mean_sd(value for value in values if value is not None)[0], form)


def largest_of(values: Iterable[float | None], unit: float, form: str) -> str:
    """The largest that is known, in a unit."""
    found = [value for value in values if value is not None]
    return shown_number(max(found) / unit, form) if found else NONE
