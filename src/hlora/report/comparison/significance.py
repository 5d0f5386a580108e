"""Tests, intervals and effect sizes: what differs beyond the noise of seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scipy import special, stats

from hlora.system.errors import DataError


class Interval(NamedTuple):
    """An estimate with its 95 % interval, all in one unit; NaN where there is none."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two independent samples compared, ours − theirs."""

    difference: float
    """Of the means, in the measure's unit, as are `low` and `high`, its 95 % interval."""
    low: float
    high: float
    t: float
    df: float
    p: float
    """Two-sided."""
    hedges_g: float
    """Difference in pooled standard deviations, corrected for small samples."""


def mean_sd(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1). One value has no deviation (NaN), and no value has neither."""
    sample = [float(value) for value in values]
    if not sample or not all(map(math.isfinite, sample)):
        return (sum(sample) / len(sample) if sample else math.nan), math.nan
    # Exact sums (fmean would round): equal values have their own mean and deviate by 0.
    return statistics.mean(sample), statistics.stdev(sample) if len(sample) > 1 else math.nan


def welch(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Welch's t-test of two independent samples, the paper's Fig. 3 without its assumption of equal variances.

    With fewer than two values on a side, or one that is not finite, only the difference is known and the rest is
    NaN. Where neither side varies at all, the limit is returned: p = 1 for equal means, p = 0 for different ones.
    """
    (mean_1, sd_1), (mean_2, sd_2) = mean_sd(ours), mean_sd(theirs)
    difference = mean_1 - mean_2
    if math.isnan(sd_1) or math.isnan(sd_2):
        return Comparison(difference, *[math.nan] * 6)
    n_1, n_2 = len(ours), len(theirs)
    if sd_1 == sd_2 == 0:
        far = math.copysign(math.inf, difference) if difference else 0.0
        return Comparison(difference, difference, difference, far, n_1 + n_2 - 2, 0.0 if difference else 1.0, far)
    part_1, part_2 = sd_1**2 / n_1, sd_2**2 / n_2
    error = math.sqrt(part_1 + part_2)
    df = (part_1 + part_2) ** 2 / (part_1**2 / (n_1 - 1) + part_2**2 / (n_2 - 1))
    t = difference / error
    reach = float(stats.t.ppf(0.975, df)) * error
    p = 2 * float(stats.t.sf(abs(t), df))
    return Comparison(difference, difference - reach, difference + reach, t, df, p, _hedges_g(ours, theirs))


def _hedges_g(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Hedges 1981, with the exact correction J(m) = Γ(m/2) / (√(m/2) Γ((m − 1)/2)), m = n₁ + n₂ − 2."""
    (mean_1, sd_1), (mean_2, sd_2) = mean_sd(ours), mean_sd(theirs)
    m = len(ours) + len(theirs) - 2
    pooled = math.sqrt(((len(ours) - 1) * sd_1**2 + (len(theirs) - 1) * sd_2**2) / m)
    correction = math.exp(special.gammaln(m / 2) - special.gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    return (mean_1 - mean_2) / pooled * correction


def interval_of_paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Mean of ours − theirs over pairs (the same seed), with its t interval; NaN bounds for fewer than two pairs.

    Raises DataError when the two differ in length.
    """
    if len(ours) != len(theirs):
        raise DataError(
            f"paired differences need one value a seed on both sides, but there are {len(ours)} and {len(theirs)}. "
            "Pass the seeds that both have."
        )
    mean, sd = mean_sd([a - b for a, b in zip(ours, theirs, strict=True)])
    if math.isnan(sd):
        return Interval(mean, math.nan, math.nan)
    reach = float(stats.t.ppf(0.975, len(ours) - 1)) * sd / math.sqrt(len(ours))
    return Interval(mean, mean - reach, mean + reach)


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's step-down correction, in the order given. NaN stays NaN and does not count as a test."""
    given = list(p_values)
    order = sorted((i for i, p in enumerate(given) if not math.isnan(p)), key=lambda i: given[i])
    adjusted, largest = [math.nan] * len(given), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * given[i]))
        adjusted[i] = largest
    return adjusted
