"""Tests, intervals and effect sizes: what differs beyond the noise of seeds and of test questions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from hlora.report.noise import variance_of_mean


class Interval(NamedTuple):
    """An estimate with its 95 % interval, all in one unit; NaN where there is none."""

    value: float
    low: float
    high: float


class Sample(NamedTuple):
    """One measure of one arm on a task, in the measure's unit."""

    seeds: Sequence[float]
    """One value a seed."""
    parts: np.ndarray | None
    """(n,) The value of each test question or block of text, mean over seeds; None where the cells do not list them."""
    share: float | None = None
    """What a right answer counts, where the measure is a share of right answers (see noise.variance_of_mean)."""
    seedless: bool = False
    """No seed changes the model, as the base model: one value is all there is."""


class WelchTest(NamedTuple):
    """Two arms compared, ours − theirs."""

    difference: float
    """Of the means, in the measure's unit, as are `low` and `high`, its 95 % interval."""
    low: float
    high: float
    t: float
    df: float
    p: float
    """Two-sided."""
    hedges_g: float
    """Difference in pooled standard deviations over seeds, corrected for small samples."""


def mean_sd(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1). One value has no deviation (NaN), and no value has neither."""
    sample = [float(value) for value in values]
    if not sample or not all(map(math.isfinite, sample)):
        return (sum(sample) / len(sample) if sample else math.nan), math.nan
    # Exact sums (fmean would round): equal values have their own mean and deviate by 0.
    return statistics.mean(sample), statistics.stdev(sample) if len(sample) > 1 else math.nan


def welch(ours: Sample, theirs: Sample) -> WelchTest:
    """Welch's t-test of two arms, with the noise of the test questions beside that of the seeds.

    The variance of the difference has three components: s²/S of each side's S seeds, as in Welch's test, and the
    variance of the mean paired difference over the test questions (or blocks of text), which both sides share. The
    degrees of freedom are Satterthwaite's over the components. Seeds and questions are crossed, and what depends on
    both is in two components, so the interval errs on the wide side.

    Args:
        ours, theirs: each with two or more seeds, unless it is seedless, and with as many parts as the other.

    Returns only the difference, NaN for the rest, where the noise is not known: too few seeds, a value that is not
    finite, or cells that do not list their questions.

    Source: Welch 1947; the sum over crossed sources, Owen 2007 (Annals of Applied Statistics 1, 386); see also
    Cameron, Gelbach and Miller 2011 (Journal of Business and Economic Statistics 29, 238).
    """
    difference = mean_sd(ours.seeds)[0] - mean_sd(theirs.seeds)[0]
    components = [_of_seeds(ours), _of_seeds(theirs), _of_parts(ours, theirs)]
    variance = sum(each for each, _ in components)
    if math.isnan(variance) or math.isnan(difference):
        return WelchTest(difference, *[math.nan] * 6)
    if variance == 0:  # the same model, scored twice; or a difference that nothing makes vary
        far = math.copysign(math.inf, difference) if difference else 0.0
        p = 0.0 if difference else 1.0
        return WelchTest(difference, difference, difference, far, math.inf, p, _hedges_g(ours.seeds, theirs.seeds))
    df = variance**2 / sum(each**2 / df for each, df in components if each)
    error = math.sqrt(variance)
    t, reach = difference / error, float(stats.t.ppf(0.975, df)) * error
    p = 2 * float(stats.t.sf(abs(t), df))
    return WelchTest(difference, difference - reach, difference + reach, t, df, p, _hedges_g(ours.seeds, theirs.seeds))


def _of_seeds(sample: Sample) -> tuple[float, float]:
    """Variance of the mean over seeds, and its degrees of freedom; NaN where there are too few."""
    if sample.seedless:
        return 0.0, math.inf
    sd = mean_sd(sample.seeds)[1]
    return sd**2 / max(1, len(sample.seeds)), len(sample.seeds) - 1


def _of_parts(ours: Sample, theirs: Sample) -> tuple[float, float]:
    """Variance of the mean difference over the questions that both were asked, and its degrees of freedom."""
    if ours.parts is None or theirs.parts is None or len(ours.parts) != len(theirs.parts):
        return math.nan, math.nan
    return variance_of_mean(ours.parts - theirs.parts, ours.share), len(ours.parts) - 1


def _hedges_g(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Hedges 1981, with the exact correction J(m) = Γ(m/2) / (√(m/2) Γ((m − 1)/2)), m = n₁ + n₂ − 2."""
    (mean_1, sd_1), (mean_2, sd_2) = mean_sd(ours), mean_sd(theirs)
    m = len(ours) + len(theirs) - 2
    if m < 1 or math.isnan(sd_1 + sd_2):
        return math.nan
    pooled = math.sqrt(((len(ours) - 1) * sd_1**2 + (len(theirs) - 1) * sd_2**2) / m)
    if pooled == 0:
        return math.copysign(math.inf, mean_1 - mean_2) if mean_1 != mean_2 else 0.0
    correction = math.exp(special.gammaln(m / 2) - special.gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    return (mean_1 - mean_2) / pooled * correction


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's step-down correction, in the order given. NaN stays NaN and does not count as a test."""
    given = list(p_values)
    order = sorted((i for i, p in enumerate(given) if not math.isnan(p)), key=lambda i: given[i])
    adjusted, largest = [math.nan] * len(given), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * given[i]))
        adjusted[i] = largest
    return adjusted
