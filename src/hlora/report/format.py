"""Numbers and changes as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from hlora.report.noise import variance_of_mean


def number(value: Any) -> float:
    """A float, NaN for anything that is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


SHARES = ("acc", "acc_norm", "exact_match")
"""Measures that are shares of right answers."""


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
    share = 1.0 if measure in SHARES else None
    value = number(arm.get(measure)) - number(base.get(measure))
    parts = [np.array([number(x) for x in each.get(f"{measure}_each") or []]) for each in (base, arm)]
    if len(parts[0]) == len(parts[1]) > 1:
        return Change(value, math.sqrt(variance_of_mean(parts[1] - parts[0], share)))
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


def decimals(value: float, digits: int, *, sign: bool = False) -> str:
    """So many digits behind the point, with a real minus sign and no negative zero; large ones by three digits.

    A dash for NaN. sign: a plus too.
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value) or abs(value) >= 1e5:
        return ("+" if sign and value > 0 else "") + three_digits(value)
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return (text if text.strip("+-0.") else text.lstrip("+-")).replace("-", "−")


def p_value(p: float) -> str:
    """Three digits; a smaller one is <0.001."""
    return "<0.001" if p < 0.001 else decimals(p, 3)


def size(count: float) -> str:
    """Bytes by three digits, in decimal units: 230 kB, 53.1 MB, 1.31 GB."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= of:
            return f"{count / of:.3g} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as people say them: 12.3 s, 4 min 20 s, 3 h 5 min."""
    if not math.isfinite(seconds):
        return "not measured"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def percent(share: float) -> str:
    """A change as +7 %, −36 %, +0.4 %, or as a factor (×12) once it is a large one."""
    if not math.isfinite(share):
        return "not finite"
    if share >= 9.995:
        return f"×{three_digits(1 + share)}"
    digits = 1 if abs(share) < 0.0995 else 0
    return f"{100 * share:+.{digits}f} %".replace("-", "−")
