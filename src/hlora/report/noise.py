"""The noise of a test set: how far a difference would move with other questions, or another piece of the same text."""

from __future__ import annotations

import numpy as np


def variance_of_mean(differences: np.ndarray, share: float | None = None) -> float:
    """Variance of the mean of paired differences, one a question or block of text; NaN for fewer than two.

    Args:
        differences: (n,) of two models, in the measure's unit.
        share: what a right answer counts (1, or 100 for per cent) where the measure is a share of right answers. Two
            pseudo-questions are added then: half a win, half a loss, one draw. Models that answer every question of a
            small test alike would otherwise differ by exactly nothing, without any doubt.

    Source: paired differences by question, Miller 2024 (arXiv:2411.00640); the pseudo-questions, Agresti and Min 2005
    (Statistics in Medicine 24, 729).
    """
    n = len(differences)
    if n < 2:
        return float("nan")
    if share is None:
        return float(np.var(differences, ddof=1)) / n
    unit = differences / share
    mean, square = unit.sum() / (n + 2), (np.sum(unit**2) + 1) / (n + 2)
    return float(share**2 * (square - mean**2) / (n + 2))
