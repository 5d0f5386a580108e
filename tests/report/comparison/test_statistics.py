"""Statistics against SciPy, hand calculation, and what must hold whatever the numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hlora.report.comparison.cells import cells_of, measure, untuned, values_of
from hlora.report.comparison.equal_domain import (
    _losses,
    _two_sided,
    equal_domain,
    equal_domain_ratio,
    equal_domain_rise,
    equal_domain_target,
    pareto_front,
    value_at,
)
from hlora.report.comparison.significance import Interval, Sample, holm, mean_sd, welch
from hlora.system.errors import DataError

BLOCKS, ROWS, QUESTIONS = 40, 60, 200
HARD = np.random.default_rng(1)
BLOCK_SPREAD, ROW_SPREAD = HARD.normal(0, 0.5, BLOCKS), HARD.normal(0, 20, ROWS)  # what every model finds hard
BLOCK_SPREAD, ROW_SPREAD = BLOCK_SPREAD - BLOCK_SPREAD.mean(), ROW_SPREAD - ROW_SPREAD.mean()


def cell(
    arm: str,
    task: str,
    seed: int | None,
    strength: float | None = None,
    general: float = 3.0,
    domain: float = 80.0,
    acc: float | None = 0.5,
    **changes: Any,
) -> dict[str, Any]:
    """A finished cell whose text `wikitext` has the NLL `general`, `other` 0.5 more, over a Base of 3.3 and 3.8."""
    texts = {
        name: {
            "nll": general + more,
            "perplexity": math.exp(general + more),
            "nll_each": list(general + more + BLOCK_SPREAD),
            "forgetting": general - 3.3,
        }
        for name, more in (("wikitext", 0.0), ("other", 0.5))
    }
    rows: dict[str, Any] = {"rows": ROWS, "answer_nll": domain, "answer_nll_each": list(domain + ROW_SPREAD)}
    if acc is not None:
        rows |= {"acc": acc, "acc_each": [1.0] * round(QUESTIONS * acc) + [0.0] * round(QUESTIONS * (1 - acc))}
    return {
        "key": f"{arm}{task}{seed}{strength}",
        "arm": arm,
        "method": "base" if arm == "Base" else "any",
        "task": task,
        "seed": seed,
        "strength": strength,
        "status": "done",
        "error": None,
        "test": {"texts": texts, "domain": rows},
        "validation": None,
        "history": [],
        "importance": None,
        "seconds": {"train": 60.0, "evaluate": 20.0},
        "peak_memory_bytes": None,
        "config": {},
        **changes,
    }


def not_done(arm: str, task: str, seed: int, status: str, error: str | None, **changes: Any) -> dict[str, Any]:
    return cell(arm, task, seed, status=status, error=error, test=None, seconds={}, **changes)


def comparison_of(cells: list[dict[str, Any]], chosen: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    arms, tasks = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("arm", "task"))
    return {
        "config": {},
        "command": "hlora compare grid.yaml",
        "model": "smollm2-135m",
        "arms": arms,
        "tasks": tasks,
        "seeds": [0, 1, 2],
        "texts": ["wikitext", "other"],
        "ours": "HLoRA",
        "rival": "EWC-LoRA",
        "unprotected": "LoRA(μ)",
        "ablation": [],
        "chosen": chosen,
        "cells": cells,
    }


@pytest.fixture
def trade_off() -> dict[str, Any]:
    """HLoRA at three strengths on the line from LoRA(μ)'s (70, 3.4) through (72, 3.2) to (76, 3.0); EWC above it."""
    cells = [cell("Base", "piqa", None, general=3.3, domain=90.0)]
    for seed, off in enumerate((-0.02, 0.0, 0.02)):
        cells.append(cell("LoRA(μ)", "piqa", seed, general=3.4 + off, domain=70.0))
        for strength, general, domain in ((1.0, 3.4, 70.0), (3.0, 3.2, 72.0), (9.0, 3.0, 76.0)):
            cells.append(cell("HLoRA", "piqa", seed, strength, general + off, domain))
            cells.append(cell("EWC-LoRA", "piqa", seed, strength, general + 0.1 + off, domain))
    return comparison_of(cells, {"HLoRA": {"piqa": 3.0}, "EWC-LoRA": {"piqa": 9.0}})


def test_one_value_has_a_mean_and_no_deviation():
    assert mean_sd([2.0]) == (2.0, pytest.approx(math.nan, nan_ok=True))
    assert mean_sd([1.0, 2.0, 4.5]) == pytest.approx((2.5, np.std([1.0, 2.0, 4.5], ddof=1)))
    assert all(map(math.isnan, mean_sd([])))


def test_equal_values_deviate_by_exactly_nothing():
    assert mean_sd([0.1] * 3) == (0.1, 0.0)


def test_a_loss_that_is_not_finite_spoils_the_mean_instead_of_vanishing():
    assert math.isnan(mean_sd([1.0, math.nan])[0])
    assert mean_sd([1.0, math.inf])[0] == math.inf


def seeds(values: list[float]) -> Sample:
    """Values over seeds on questions that make no noise."""
    return Sample(values, np.zeros(2))


def test_welch_without_noise_of_questions_equals_scipy_and_its_interval():
    ours, theirs = [18.9, 19.1, 19.0], [19.6, 19.2, 20.1, 19.9]
    found, expected = welch(seeds(ours), seeds(theirs)), stats.ttest_ind(ours, theirs, equal_var=False)
    bounds = expected.confidence_interval(0.95)
    assert found.difference == pytest.approx(-0.7)
    assert (found.t, found.df, found.p) == pytest.approx((expected.statistic, expected.df, expected.pvalue))
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high))


def test_hedges_g_is_cohens_d_by_the_exact_correction():
    # Means 1 and 3, both of variance 1 over 3 values: d = −2, m = 4, J = Γ(2) / (√2 Γ(1.5)) = 0.797885.
    assert welch(seeds([0.0, 1.0, 2.0]), seeds([2.0, 3.0, 4.0])).hedges_g == pytest.approx(-2 * 0.797885, abs=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [2.0, 3.0]), ([1.0, 2.0], [3.0]), ([1.0, math.nan], [1.0, 2.0])])
def test_welch_claims_nothing_where_a_side_has_no_spread_to_know(ours, theirs):
    found = welch(seeds(ours), seeds(theirs))
    assert all(math.isnan(x) for x in found[1:])
    assert found.difference == pytest.approx(np.mean(ours) - np.mean(theirs), nan_ok=True)


def test_welch_without_any_variance_is_certain():
    assert welch(seeds([0.1] * 3), seeds([0.1] * 2)) == (0.0, 0.0, 0.0, 0.0, math.inf, 1.0, 0.0)
    assert welch(seeds([1.0] * 2), seeds([2.0] * 2)) == (-1.0, -1.0, -1.0, -math.inf, math.inf, 0.0, -math.inf)


def test_welch_with_one_constant_side_has_the_degrees_of_freedom_of_the_other():
    found = welch(seeds([1.0] * 3), seeds([2.0, 3.0, 4.0]))
    assert found.df == pytest.approx(2)
    assert found.p == pytest.approx(stats.ttest_1samp([2.0, 3.0, 4.0], 1.0).pvalue)


def test_a_model_without_seeds_is_tested_as_a_constant_with_the_noise_of_its_questions():
    parts = np.array([0.0, 1.0, 2.0])
    found = welch(seeds([2.0, 3.0, 4.0])._replace(parts=parts), Sample([1.0], np.zeros(3), seedless=True))
    # Variances of the means: 1/3 over three seeds and 1/3 over three questions, each with 2 degrees of freedom.
    assert (found.difference, found.df) == (2.0, pytest.approx(4.0))
    assert found.high - found.difference == pytest.approx(stats.t.ppf(0.975, 4) * math.sqrt(2 / 3))


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: the last, 0.04, may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_does_not_count_what_was_not_tested():
    assert holm([math.nan, 0.02, math.nan, 0.03]) == pytest.approx([math.nan, 0.04, math.nan, 0.04], nan_ok=True)
    assert holm([]) == []


@given(st.lists(st.floats(0, 1)))
def test_holm_never_lowers_a_p_value_nor_swaps_two(p_values):
    corrected = holm(p_values)
    assert all(before <= after <= 1 for before, after in zip(p_values, corrected, strict=True))
    assert sorted(corrected) == [corrected[i] for i in sorted(range(len(p_values)), key=p_values.__getitem__)]


FRONT = [(70.0, 3.4), (72.0, 3.2), (76.0, 3.0)]


@pytest.mark.parametrize(
    ("target", "expected"), [(69.9, math.nan), (70.0, 3.4), (71.0, 3.3), (74.0, 3.1), (76.0, 3.0), (99.0, 3.0)]
)
def test_nll_at_interpolates_the_front_and_is_flat_behind_it(target, expected):
    assert value_at(FRONT, target) == pytest.approx(expected, nan_ok=True)


def test_nll_at_ignores_points_that_another_beats_or_that_diverged():
    worse = [(71.0, 3.9), (76.0, 3.3), (80.0, 3.5), (60.0, math.inf), (math.nan, 1.0)]
    assert pareto_front(FRONT + worse) == FRONT
    assert value_at(FRONT + worse, 71.0) == pytest.approx(3.3)
    assert math.isnan(value_at([], 71.0))
    assert math.isnan(value_at(FRONT, math.nan))


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1), st.floats(0, 9), st.floats(0, 9))
def test_nll_at_never_rises_when_more_loss_on_the_domain_is_allowed(points, one, other):
    strict, lax = (value_at(points, target) for target in sorted((one, other)))
    assert math.isnan(strict) or lax <= strict + 1e-9


def test_cells_of_an_arm_are_those_at_the_chosen_strength(trade_off):
    assert [(c["seed"], c["strength"]) for c in cells_of(trade_off, "HLoRA", "piqa")] == [(0, 3), (1, 3), (2, 3)]
    assert len(cells_of(trade_off, "HLoRA", "piqa", "all")) == 9
    assert [c["strength"] for c in cells_of(trade_off, "HLoRA", "piqa", 9.0)] == [9.0] * 3
    assert [c["seed"] for c in cells_of(trade_off, "Base", "piqa")] == [None]
    assert cells_of(trade_off, "HLoRA", "piqa", None) == []


def test_values_hold_what_was_measured_and_nothing_for_what_was_not(trade_off):
    assert values_of(trade_off, "HLoRA", "piqa", "nll", "other") == pytest.approx({0: 3.68, 1: 3.7, 2: 3.72})
    assert values_of(trade_off, "HLoRA", "piqa", "exact_match") == {}
    broken = cell("HLoRA", "piqa", 0)
    broken["test"]["domain"]["answer_nll"] = None
    assert math.isnan(measure(broken, "answer_nll"))
    assert measure(not_done("HLoRA", "piqa", 0, "failed", "out of memory"), "answer_nll") is None
    assert untuned(trade_off) == ["Base"]


def test_target_keeps_nine_tenths_of_the_unprotected_improvement(trade_off):
    assert equal_domain_target(trade_off, "piqa") == pytest.approx(90 - 0.9 * 20)
    for each in trade_off["cells"]:
        if each["arm"] == "LoRA(μ)":
            each["test"]["domain"]["answer_nll"] = 91.0
    assert math.isnan(equal_domain_target(trade_off, "piqa"))


def test_equal_domain_reads_the_mean_curve_at_the_target(trade_off):
    found = equal_domain(trade_off, "HLoRA", "piqa", "wikitext", 74.0)
    assert found.value == pytest.approx(math.exp(3.1))
    assert found.low < found.value < found.high
    assert found == equal_domain(trade_off, "HLoRA", "piqa", "wikitext", 74.0, seed=0)
    assert found != equal_domain(trade_off, "HLoRA", "piqa", "wikitext", 74.0, seed=1)


def test_the_interval_has_the_width_of_blocks_and_seeds_together(trade_off):
    found = equal_domain(trade_off, "HLoRA", "piqa", "wikitext", 74.0, resamples=20_000)
    # Rows cancel: the target moves with them. Variance of a bootstrap mean: the plain (n) variance over n.
    variance = np.var(BLOCK_SPREAD) / BLOCKS + np.var([-0.02, 0.0, 0.02]) / 3
    assert math.log(found.high / found.low) == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.05)


def test_hard_rows_move_the_target_with_them(trade_off):
    for each in trade_off["cells"]:  # one text block, one seed: only the rows are left to vary
        for text in each["test"]["texts"].values():
            text["nll_each"] = text["nll_each"][:1]
    trade_off["cells"] = [each for each in trade_off["cells"] if each["seed"] in (1, None)]
    same = equal_domain(trade_off, "HLoRA", "piqa", "wikitext", 74.0)
    assert (same.low, same.high) == pytest.approx((same.value, same.value))
    for each in trade_off["cells"]:
        if each["arm"] == "Base":
            del each["test"]["domain"]["answer_nll_each"]  # now nothing says how the target would move
    fixed = equal_domain(trade_off, "HLoRA", "piqa", "wikitext", 74.0)
    assert fixed.low < fixed.value - 1
    assert fixed.high > fixed.value + 1


def test_ratio_of_two_arms_is_far_narrower_than_either(trade_off):
    ratio, missed = equal_domain_ratio(trade_off, "EWC-LoRA", "HLoRA", "piqa", "wikitext", 74.0)
    assert ratio == pytest.approx(Interval(*[math.exp(0.1)] * 3))
    assert missed == 0
    ours, rival = (equal_domain(trade_off, arm, "piqa", "wikitext", 74.0) for arm in ("HLoRA", "EWC-LoRA"))
    assert ours.high > rival.low


def test_ratio_is_taken_on_the_seeds_that_both_have(trade_off):
    trade_off["cells"] = [
        each for each in trade_off["cells"] if each["arm"] != "HLoRA" or each["seed"] == 0 or each["strength"] == 3.0
    ]
    ours, rival = (equal_domain(trade_off, arm, "piqa", "wikitext", 74.0).value for arm in ("HLoRA", "EWC-LoRA"))
    assert rival / ours == pytest.approx(math.exp(0.12))  # seed 0 alone has 0.02 less
    ratio, _ = equal_domain_ratio(trade_off, "EWC-LoRA", "HLoRA", "piqa", "wikitext", 74.0)
    assert ratio == pytest.approx(Interval(*[math.exp(0.1)] * 3))


def test_arms_without_a_seed_in_common_have_no_ratio(trade_off):
    trade_off["cells"] = [each for each in trade_off["cells"] if each["seed"] == (2 if each["arm"] == "HLoRA" else 0)]
    ratio, missed = equal_domain_ratio(trade_off, "EWC-LoRA", "HLoRA", "piqa", "wikitext", 74.0)
    assert all(map(math.isnan, (*ratio, missed)))


def test_a_target_out_of_reach_has_no_perplexity(trade_off):
    assert all(map(math.isnan, equal_domain(trade_off, "HLoRA", "piqa", "wikitext", 69.0)))
    assert all(map(math.isnan, equal_domain(trade_off, "OSF", "piqa", "wikitext", 74.0)))
    assert all(map(math.isnan, equal_domain_ratio(trade_off, "OSF", "HLoRA", "piqa", "wikitext", 74.0)[0]))


def test_the_rise_over_base_is_the_loss_at_the_target_less_bases_on_the_same_blocks(trade_off):
    rise, p = equal_domain_rise(trade_off, "HLoRA", "Base", "piqa", "wikitext", 74.0, resamples=20_000)
    assert rise.value == pytest.approx(3.1 - 3.3)
    # Blocks and rows cancel. The seeds' spread is left, whose bootstrap mean is −0.02 or 0.02 in 1 of 27 draws each.
    assert (rise.low, rise.high) == pytest.approx((-0.22, -0.18))
    assert p < 1e-6


def test_p_of_normal_draws_is_that_of_their_standard_error():
    draws = np.random.default_rng(0).normal(3.0, 0.5, 200_000)
    assert _two_sided(0.5 * 1.96, draws) == pytest.approx(0.05, rel=0.05)
    assert (_two_sided(0.0, draws), _two_sided(1.0, np.full(9, 1.0)), _two_sided(0.0, np.zeros(9))) == (1, 0, 1)
    assert math.isnan(_two_sided(math.nan, draws))


def test_the_rise_above_another_arm_is_the_difference_at_the_target(trade_off):
    for each in trade_off["cells"]:  # a spread that the two do not share
        if each["arm"] == "EWC-LoRA" and each["seed"] == 0:
            each["test"]["texts"]["wikitext"]["nll"] += 0.3
    rise, p = equal_domain_rise(trade_off, "EWC-LoRA", "HLoRA", "piqa", "wikitext", 74.0)
    turned, same_p = equal_domain_rise(trade_off, "HLoRA", "EWC-LoRA", "piqa", "wikitext", 74.0)
    assert rise.value == pytest.approx(0.2)
    assert (turned.value, turned.low, turned.high) == pytest.approx((-rise.value, -rise.high, -rise.low), abs=1e-9)
    assert 0.001 < p < 0.2
    assert same_p == pytest.approx(p)


def test_an_arm_that_misses_the_target_has_no_rise_and_base_never_misses(trade_off):
    for pair in (("HLoRA", "EWC-LoRA"), ("EWC-LoRA", "HLoRA"), ("HLoRA", "Base"), ("OSF", "HLoRA")):
        rise, p = equal_domain_rise(trade_off, *pair, "piqa", "wikitext", 69.0)
        assert all(map(math.isnan, (*rise, p)))
    learns_other_rows(trade_off, "HLoRA")
    rise, p = equal_domain_rise(trade_off, "HLoRA", "Base", "piqa", "wikitext", 70.0)
    assert rise.value == pytest.approx(0.1)
    assert rise.high == math.inf
    assert p == 1


def learns_other_rows(trade_off: dict[str, Any], arm: str) -> None:
    """Than LoRA(μ), so that the rows drawn decide whether the arm reaches the target."""
    for each in trade_off["cells"]:
        if each["arm"] == arm:
            each["test"]["domain"]["answer_nll_each"].reverse()


def test_a_target_that_resamples_miss_is_open_above(trade_off):
    learns_other_rows(trade_off, "HLoRA")
    found = equal_domain(trade_off, "HLoRA", "piqa", "wikitext", 70.0)
    assert found.value == pytest.approx(math.exp(3.4))
    assert found.high == math.inf


def test_a_ratio_to_an_arm_that_misses_the_target_has_no_bounds_but_the_share_of_misses(trade_off):
    learns_other_rows(trade_off, "HLoRA")
    ratio, missed = equal_domain_ratio(trade_off, "EWC-LoRA", "HLoRA", "piqa", "wikitext", 70.5)
    assert ratio.value == pytest.approx(math.exp(0.1))
    assert all(map(math.isnan, ratio[1:]))
    assert 0.3 < missed < 0.5  # from half a nat on the better side of the target, rows that deviate by 3.6 in the mean
    turned, missed = equal_domain_ratio(trade_off, "HLoRA", "EWC-LoRA", "piqa", "wikitext", 70.5)
    assert turned.low < turned.value < turned.high == math.inf
    assert missed == 0


def test_the_curve_is_of_the_seeds_that_have_every_strength(trade_off):
    trade_off["cells"] = [
        each for each in trade_off["cells"] if each["arm"] != "HLoRA" or each["seed"] == 0 or each["strength"] == 3.0
    ]
    assert _losses(trade_off, "HLoRA", "piqa", "wikitext").points() == pytest.approx(
        np.array([(70.0, 3.38), (72.0, 3.18), (76.0, 2.98)])
    )


def test_a_diverged_strength_leaves_the_losses(trade_off):
    for each in trade_off["cells"]:
        if each["arm"] == "HLoRA" and each["strength"] == 1.0:
            each["test"]["texts"]["wikitext"]["nll"] = math.nan
    assert len(_losses(trade_off, "HLoRA", "piqa", "wikitext").points()) == 2
    assert len(_losses(trade_off, "HLoRA", "piqa", "other").points()) == 3


def test_cells_scored_on_different_rows_are_refused(trade_off):
    cells_of(trade_off, "HLoRA", "piqa", 9.0)[0]["test"]["domain"]["answer_nll_each"].pop()
    with pytest.raises(DataError, match=r"HLoRA on piqa: .* 59, 60"):
        equal_domain(trade_off, "HLoRA", "piqa", "wikitext", 74.0)
