"""Numbers and changes as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np


def number(value: Any) -> float:
    """A float, NaN for anything that is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


class Change(NamedTuple):
    """A measure of an arm less that of the base, and its standard error, both in the measure's unit.

    `stderr` is NaN when the evaluations carry none.
    """

    value: float
    stderr: float

    @property
    def noise(self) -> float:
        """What a change has to exceed to count: two standard errors, and never less than rounding (0.001)."""
        return max(2 * self.stderr, 1e-3) if math.isfinite(self.stderr) else 1e-3


def change(base: Mapping[str, Any], arm: Mapping[str, Any], measure: str) -> Change:
    """How `measure` (nll, answer_nll, acc, …) changed from base to arm.

    Both score the same tokens and rows, so their errors are correlated. Where the two evaluations list the parts
    (`<measure>_each`: one value a window or row), the standard error is that of the paired differences. Otherwise
    it is √(s² + s²) of both `<measure>_stderr`, an upper bound, under which small forgetting can pass as noise.
    """
    value = number(arm.get(measure)) - number(base.get(measure))
    parts = [np.array([number(x) for x in each.get(f"{measure}_each") or []]) for each in (base, arm)]
    if len(parts[0]) == len(parts[1]) > 1:
        return Change(value, float(np.std(parts[1] - parts[0], ddof=1) / math.sqrt(len(parts[0]))))
    return Change(value, math.hypot(*(number(each.get(f"{measure}_stderr")) for each in (base, arm))))


Tone = Literal["good", "mixed", "bad", "unknown"]


def three_digits(value: float) -> str:
    """Three significant digits: 38.9, 4.94, 1,234; words for what is not finite."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else "not a number" if math.isnan(value) else "−∞"
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    text = f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")
    return "0" if value == 0 else text.replace("-", "−")


def percent(share: float) -> str:
    """A change as +7 %, −36 %, +0.4 %, or as a factor (×12) once it is a large one."""
    if not math.isfinite(share):
        return "not finite"
    if share >= 9.995:
        return f"×{three_digits(1 + share)}"
    digits = 1 if abs(share) < 0.0995 else 0
    return f"{100 * share:+.{digits}f} %".replace("-", "−")
