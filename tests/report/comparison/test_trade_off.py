"""Curves over the strengths of an arm: right points at the right places."""

from __future__ import annotations

import math

import numpy as np
import pytest
from drawn import labels, lines, rings, words
from made_comparison import SEEDS, cell

from hlora.report.comparison.equal_domain import _losses
from hlora.report.comparison.trade_off import strength_sweep, trade_off
from hlora.report.style import BLACK, GREEN, svg


def test_strength_sweep_draws_the_arms_with_several_strengths_and_rings_the_chosen(small_comparison):
    figure = strength_sweep(small_comparison)
    assert labels(figure) == ["EWC-LoRA", "HLoRA", "Base", "LoRA(μ)", "chosen on validation"]
    perplexity = figure.axes[0]
    seed_0 = {
        each["strength"]: each["test"]["texts"]["wikitext"]["perplexity"]
        for each in small_comparison["cells"]
        if each["arm"] == "HLoRA" and each["seed"] == 0
    }
    ours = lines(perplexity, GREEN)[0]
    np.testing.assert_allclose(ours, sorted(seed_0.items()))
    assert (9.0, pytest.approx(seed_0[9.0])) in rings(perplexity)
    assert [axes.get_title(loc="left") for axes in figure.axes][2:] == ["piqa · answer NLL", "piqa · accuracy %"]


def test_trade_off_goes_through_the_points_of_one_set_of_seeds(small_comparison):
    figure = trade_off(small_comparison)
    ours = lines(figure.axes[0], GREEN)[0]
    points = _losses(small_comparison, "HLoRA", "piqa", "wikitext").points()  # (answer NLL, log of perplexity), seed 0
    np.testing.assert_allclose(sorted(map(tuple, ours)), sorted((x, math.exp(y)) for x, y in points))
    assert len(ours) == 4
    accuracy = [
        each["test"]["domain"]["acc"]
        for each in small_comparison["cells"]
        if each["arm"] == "HLoRA" and not each["seed"]
    ]
    np.testing.assert_allclose(sorted(lines(figure.axes[2], GREEN)[0][:, 0]), sorted(100 * acc for acc in accuracy))


def test_trade_off_averages_over_seeds_where_all_strengths_have_them(small_comparison):
    cells = [cell("HLoRA", "piqa", seed, strength) for seed in SEEDS for strength in (3.0, 9.0, 30.0, 100.0)]
    small_comparison["cells"] = [each for each in small_comparison["cells"] if each["arm"] != "HLoRA"] + cells
    ours = lines(trade_off(small_comparison).axes[0], GREEN)[0]
    at_3 = [each["test"]["texts"]["wikitext"]["perplexity"] for each in cells if each["strength"] == 3.0]
    assert ours[0][1] == pytest.approx(np.mean(at_3))


def test_trade_off_rings_the_chosen_points_and_keeps_a_far_base_at_the_edge(small_comparison):
    figure = trade_off(small_comparison)
    axes = figure.axes[0]
    assert len(rings(axes)) == 2
    base = small_comparison["cells"][0]["test"]
    crosses = [line for line in axes.get_lines() if line.get_color() == BLACK and line.get_marker() == "P"]
    ((x, y),) = crosses[0].get_xydata()
    assert y == pytest.approx(base["texts"]["wikitext"]["perplexity"])
    assert x == axes.get_xlim()[1] < base["domain"]["answer_nll"]
    assert f"{base['domain']['answer_nll']:.3g} →" in words(figure)


def test_one_diverged_arm_does_not_flatten_the_trade_off(small_comparison):
    assert trade_off(small_comparison).axes[0].get_yscale() == "linear"
    for each in small_comparison["cells"]:
        if each["arm"] == "LoRA(μ)":
            each["test"]["texts"]["wikitext"]["perplexity"] = 5000.0
    axes = trade_off(small_comparison).axes[0]
    assert axes.get_yscale() == "log"
    svg(axes.figure)
