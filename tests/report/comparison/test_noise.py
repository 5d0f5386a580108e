"""Small tests are told from large ones: intervals on made-up questions whose true difference is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hlora.report.comparison.significance import Sample, WelchTest, welch
from hlora.report.format import change
from hlora.report.noise import variance_of_mean

TRIALS = 400


def arms(generator: np.random.Generator, questions: int, difference: float, seeds: int = 3) -> tuple[Sample, Sample]:
    """Two arms asked the same questions, right where the model is above the question's difficulty.

    Scoring is deterministic, so seeds answer most questions alike. What the second arm gains differs by question.
    """
    hard, gain = generator.normal(0, 1, questions), difference + generator.normal(0, 0.5, questions)
    sides = []
    for advantage in (gain, 0):
        skill = generator.normal(0, 0.05, (seeds, 1)) + generator.normal(0, 0.1, (seeds, questions))
        right = (skill + advantage > hard).astype(float)
        sides.append(Sample([100 * float(each.mean()) for each in right], 100 * right.mean(0), 100))
    return sides[0], sides[1]


def over_seeds_alone(ours: Sample, theirs: Sample) -> WelchTest:
    """The interval without the noise of questions."""
    nothing = np.zeros(2)
    return welch(Sample(ours.seeds, nothing), Sample(theirs.seeds, nothing))


@pytest.mark.parametrize("questions", [12, 64])
@pytest.mark.parametrize("difference", [0.0, 0.4])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(questions: int, difference: float) -> None:
    ours, theirs = arms(np.random.default_rng(1), 10_000, difference, seeds=400)  # known to a fifth of a point
    expected = np.mean(ours.seeds) - np.mean(theirs.seeds)
    generator = np.random.default_rng(0)
    held = by_seeds = 0
    for _ in range(TRIALS):
        sides = arms(generator, questions, difference)
        found, alone = welch(*sides), over_seeds_alone(*sides)
        assert found.high > found.low
        held += found.low <= expected <= found.high
        by_seeds += alone.low <= expected <= alone.high
    assert held / TRIALS > 0.93  # 95 % less two standard errors of 400 trials
    assert by_seeds / TRIALS < 0.85  # what the questions' noise is needed for


def test_one_question_of_twelve_is_not_beyond_noise_though_every_seed_agrees() -> None:
    theirs, ours = np.array([1.0] * 6 + [0.0] * 6), np.array([1.0] * 7 + [0.0] * 5)
    found = welch(Sample([7 / 12] * 3, ours, 1), Sample([6 / 12] * 3, theirs, 1))
    assert found.low < 0 < found.difference == pytest.approx(1 / 12) and found.p > 0.2


def test_equal_counts_on_the_same_questions_still_leave_a_doubt() -> None:
    same = np.array([1.0, 0.0] * 6)
    found = welch(Sample([0.5] * 3, same, 1), Sample([0.5] * 3, same, 1))
    # Two pseudo-questions: (0 + 1) / 14 squares over 14 questions, so a standard error of 1/14.
    assert found.high == -found.low == pytest.approx(2.201 / 14, rel=1e-3) and found.p == 1


def test_questions_that_are_not_listed_leave_the_difference_untested() -> None:
    found = welch(Sample([0.5, 0.6], None, 1), Sample([0.3, 0.4], np.zeros(9), 1))
    assert found.difference == pytest.approx(0.2) and math.isnan(found.low) and math.isnan(found.p)


def test_the_variance_of_a_mean_difference_by_hand() -> None:
    assert variance_of_mean(np.array([1.0, 3.0])) == pytest.approx(1.0)  # variance 2 over 2 values
    assert variance_of_mean(np.array([100.0, 0.0]), share=100) == pytest.approx(100**2 * (2 / 4 - 1 / 16) / 4)
    assert math.isnan(variance_of_mean(np.array([1.0])))


def test_a_run_that_got_both_of_two_questions_right_has_not_improved_beyond_noise() -> None:
    found = change({"acc": 0.0, "acc_each": [0, 0]}, {"acc": 1.0, "acc_each": [1, 1]}, "acc")
    assert found.value == 1 and found.noise > 0.4
