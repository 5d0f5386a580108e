"""Perplexity or drift at equal domain NLL: what each arm forgets for the same learning, with bootstrap intervals."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from hlora.report.comparison.cells import base_arm, cells_of, values_of
from hlora.report.comparison.curve import curve_of
from hlora.report.comparison.significance import Interval, mean_sd
from hlora.system.errors import DataError

Point = tuple[float, float]
"""(domain NLL, general NLL or drift) of one strength of a method, both better when lower."""

Quantity = Literal["nll", "kl_from_base", "kl_from_general"]
"""What is read of a general text: its loss, shown as perplexity, or the drift from a model before. nats/token."""

_NO_INTERVAL = Interval(math.nan, math.nan, math.nan)
_TAIL = 0.025  # of the resamples, outside each end of a 95 % interval


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both, by rising domain NLL. Points that are not finite are left out."""
    front: list[Point] = []
    for domain, general in sorted(point for point in points if all(map(math.isfinite, point))):
        if not front or general < front[-1][1]:
            front.append((domain, general))
    return front


def value_at(points: Iterable[Point], target: float) -> float:
    """What a method attains on general text at a domain NLL of at most `target`; NaN when no point gets there.

    Linear interpolation along the Pareto front, which approximates an intermediate strength. Beyond the front's last
    point it is that point's value, which already meets the target.
    """
    front = pareto_front(points)
    above = bisect_right(front, (target, math.inf))
    if above == 0 or math.isnan(target):
        return math.nan
    if above == len(front):
        return front[-1][1]
    (x_0, y_0), (x_1, y_1) = front[above - 1], front[above]
    return y_0 + (y_1 - y_0) * (target - x_0) / (x_1 - x_0)


def equal_domain_target(comparison: Mapping[str, Any], task: str, share: float = 0.9) -> float:
    """Domain NLL at which `share` of the unprotected arm's improvement over Base is kept, mean over seeds.

    nats/answer. NaN where one of the two was not measured, or the unprotected arm improved nothing.
    """
    base = mean_sd(values_of(comparison, base_arm(comparison), task, "answer_nll").values())[0]
    unprotected = mean_sd(values_of(comparison, comparison["unprotected"], task, "answer_nll").values())[0]
    return base - share * (base - unprotected) if unprotected < base else math.nan


def equal_domain(
    comparison: Mapping[str, Any],
    arm: str,
    task: str,
    text: str,
    target: float,
    *,
    quantity: Quantity = "nll",
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """What an arm attains on a text at a domain NLL of at most `target`, with a 95 % bootstrap interval.

    The perplexity; or with another `quantity` the drift, in nats per token.

    Each resample draws anew, with replacement, the seeds (those with every strength), the text's blocks
    (`nll_each`) and the domain's rows (`answer_nll_each`): the same for every strength, as the strengths are paired.
    The target moves with the rows drawn, being a mixture of what Base and the unprotected arm reach on them: easy
    rows must not pass for a good method. The value is NaN when the target is not reached; the upper bound is
    infinite when more than 2.5 % of the resamples do not reach it. Few seeds understate their own spread, and one
    seed adds none.

    Raises DataError when the cells of the arm were scored on different rows or blocks.
    """
    curve = _losses(comparison, arm, task, text, quantity)
    value, draws = _draws(comparison, curve, task, target, seed, resamples)
    return _percentile(value, draws) if quantity != "nll" else _percentile(_exp(value), _exp(draws))


def equal_domain_ratio(
    comparison: Mapping[str, Any],
    arm: str,
    other: str,
    task: str,
    text: str,
    target: float,
    *,
    quantity: Quantity = "nll",
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[Interval, float]:
    """Perplexity (or drift) of `arm` over `other`'s, as in `equal_domain` but on the same seeds, blocks and rows drawn.

    The spread that both share (a hard text, a lucky seed) cancels, so this tells two arms apart where their intervals
    overlap. Where one has its curve for fewer seeds, both are taken on the seeds that they share; NaN if they share
    none. The second value is the share of the resamples in which `other` misses the target. Nothing bounds the ratio
    from below there, so that from 2.5 % on its bounds are NaN.
    """
    one, two = (_losses(comparison, name, task, text, quantity) for name in (arm, other))
    shared = [each for each in one.seeds if each in two.seeds] if one and two else []
    if not (one and two and shared):
        return _NO_INTERVAL, math.nan
    value, draws = _draws(comparison, one.of(shared), task, target, seed, resamples)
    beside, others = _draws(comparison, two.of(shared), task, target, seed, resamples)
    missed = float(np.isinf(others).mean())
    with np.errstate(invalid="ignore"):  # both miss the target: ∞ − ∞ or ∞ / ∞, a resample that says nothing
        if quantity == "nll":
            found = _percentile(_exp(value - beside), _exp(draws - others))
        else:
            found = _percentile(value / beside, draws / others)
    return found if missed < _TAIL else Interval(found.value, math.nan, math.nan), missed


def equal_domain_rise(
    comparison: Mapping[str, Any],
    arm: str,
    other: str,
    task: str,
    text: str,
    target: float,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[Interval, float]:
    """How much higher the loss of `arm` is than `other`'s on a text, nats/token, and its p against no difference.

    As in `equal_domain_ratio`, on the same seeds, blocks and rows drawn. Base as `other` is compared where it is: the
    difference is what was forgotten. A resample that misses the target has an infinite loss. p is two-sided, of the
    difference over its bootstrap standard error, taken as normal. NaN as in `equal_domain_ratio`.
    """
    one, two = _losses(comparison, arm, task, text), _losses(comparison, other, task, text)
    base = other == base_arm(comparison)
    shared = one.seeds if one and base else [each for each in one.seeds if each in two.seeds] if one and two else []
    if not (one and two and shared):
        return _NO_INTERVAL, math.nan
    value, draws = _draws(comparison, one.of(shared), task, target, seed, resamples)
    of_other = two if base else two.of(shared)
    beside, others = _draws(comparison, of_other, task, math.inf if base else target, seed, resamples)
    with np.errstate(invalid="ignore"):  # both miss the target: ∞ − ∞
        difference = draws - others
    return _percentile(value - beside, difference), _two_sided(value - beside, difference)


def _two_sided(value: float, draws: np.ndarray) -> float:
    """p of no difference. The standard error is half of the middle 68 %, so that it stands some infinite draws.

    Counting draws beyond zero would need ten times as many resamples before Holm's correction left any p below 0.05.
    """
    known = draws[~np.isnan(draws)]
    if math.isnan(value) or not len(known):
        return math.nan
    low, high = np.quantile(known, stats.norm.cdf([-1, 1]), method="inverted_cdf")
    error = float(high - low) / 2
    return 2 * float(stats.norm.sf(abs(value) / error)) if error else float(not value)


class _Losses(NamedTuple):
    """K strengths by S seeds, with the b blocks and m rows of each cell."""

    general: np.ndarray  # (K, S) nats/token, the loss or the drift
    domain: np.ndarray  # (K, S) nats/answer
    blocks: np.ndarray  # (K, S, b)
    rows: np.ndarray  # (K, S, m)
    seeds: list[int | None]

    def of(self, seeds: list[int | None]) -> _Losses:
        chosen = [self.seeds.index(seed) for seed in seeds]
        general, domain = self.general[:, chosen], self.domain[:, chosen]
        return _Losses(general, domain, self.blocks[:, chosen], self.rows[:, chosen], seeds)

    def points(self) -> list[Point]:
        means = zip(self.domain.mean(1), self.general.mean(1), strict=True)
        return [(float(domain), float(general)) for domain, general in means]


def _losses(
    comparison: Mapping[str, Any], arm: str, task: str, text: str, quantity: Quantity = "nll"
) -> _Losses | None:
    found = curve_of(comparison, arm, task, text)
    if not found.cells:
        return None
    grid = [[cell["test"] for cell in cells] for cells in found.cells]
    if not all(quantity in test["texts"][text] for tests in grid for test in tests):
        return None  # no drift from the general phase where there was none
    return _Losses(
        np.array([[test["texts"][text][quantity] for test in tests] for tests in grid]),
        np.array([[test["domain"]["answer_nll"] for test in tests] for tests in grid]),
        _stacked([[test["texts"][text].get(f"{quantity}_each") for test in tests] for tests in grid], arm, task, text),
        _stacked(
            [[test["domain"].get("answer_nll_each") for test in tests] for tests in grid], arm, task, "the domain"
        ),
        found.seeds,
    )


def _stacked(parts: list[list[Any]], arm: str, task: str, what: str) -> np.ndarray:
    """(K, S, n); a single 0, which resamples to itself, where a cell does not list its parts."""
    if not all(part for tests in parts for part in tests):
        return np.zeros((len(parts), len(parts[0]), 1))
    lengths = sorted({len(part) for tests in parts for part in tests})
    if len(lengths) > 1:
        raise DataError(
            f"{arm} on {task}: every cell must score the same parts of {what}, but they list "
            f"{', '.join(map(str, lengths))} of them. Run the comparison again in a fresh directory."
        )
    return np.array(parts, dtype=float)


def _draws(
    comparison: Mapping[str, Any], curve: _Losses | None, task: str, target: float, seed: int, resamples: int
) -> tuple[float, np.ndarray]:
    """What is attained at the target, NaN if missed, and of each resample, (resamples,), ∞ if missed."""
    if curve is None:
        return math.nan, np.full(resamples, math.inf)
    rows = _weights(seed, "rows", curve.rows.shape[-1], resamples)
    blocks = _weights(seed, "blocks", curve.blocks.shape[-1], resamples)
    seeds = _weights(seed, "seeds", curve.general.shape[1], resamples)
    general = _resampled(curve.general, curve.blocks, blocks, seeds)
    domain = _resampled(curve.domain, curve.rows, rows, seeds)
    reference = _reference_rows(comparison, task, target)
    moved = np.zeros(resamples) if len(reference) != rows.shape[1] else rows @ reference - reference.mean()
    value = value_at(curve.points(), target)
    drawn = [value_at(zip(x, y, strict=True), target + move) for x, y, move in zip(domain, general, moved, strict=True)]
    return value, np.nan_to_num(np.array(drawn), nan=math.inf)


def _resampled(values: np.ndarray, parts: np.ndarray, drawn: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """(K, S), (K, S, n), (resamples, n), (resamples, S) → (resamples, K).

    Parts only say how far a draw is from the value: the mean over blocks is not quite the mean over tokens.
    """
    moved = values + np.tensordot(drawn, parts, axes=(1, 2)) - parts.mean(-1)  # (resamples, K, S)
    return np.einsum("rks,rs->rk", moved, seeds)


def _reference_rows(comparison: Mapping[str, Any], task: str, target: float) -> np.ndarray:  # (m,) or (0,)
    """NLL by row of the mixture of Base and the unprotected arm whose mean is the target."""

    def mean_rows(arm: str) -> np.ndarray:
        cells = [cell for cell in cells_of(comparison, arm, task) if cell["status"] == "done"]
        rows = [cell["test"]["domain"].get("answer_nll_each") or [] for cell in cells]
        return np.mean(rows, axis=0) if len({len(each) for each in rows}) == 1 else np.zeros(0)

    base, unprotected = mean_rows(base_arm(comparison)), mean_rows(comparison["unprotected"])
    if not base.size or base.shape != unprotected.shape:
        return np.zeros(0)
    distance = float(base.mean() - unprotected.mean())
    if not distance or not math.isfinite(distance) or math.isinf(target):  # nothing moves a target of ∞
        return np.zeros(0)
    share = (float(base.mean()) - target) / distance
    return (1 - share) * base + share * unprotected


@lru_cache(maxsize=8)
def _weights(seed: int, what: str, count: int, resamples: int) -> np.ndarray:  # (resamples, count), rows sum to 1
    """How often each of `count` is drawn, as shares. The same for all arms, so that arms are paired too."""
    generator = np.random.default_rng([seed, ("blocks", "rows", "seeds").index(what)])
    return generator.multinomial(count, np.full(count, 1 / count), size=resamples) / count


def _exp(value: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.exp(value)


def _percentile(value: float, draws: np.ndarray) -> Interval:
    """A value with the 95 % of its resamples; those that are NaN say nothing and are left out."""
    known = draws[~np.isnan(draws)]
    if math.isnan(value) or not len(known):
        return _NO_INTERVAL
    low, high = np.quantile(known, [_TAIL, 1 - _TAIL], method="inverted_cdf")  # takes observed values, ∞ among them
    return Interval(float(value), float(low), float(high))
