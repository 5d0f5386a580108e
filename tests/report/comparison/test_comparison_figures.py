"""The comparison's figures: right values at the right places, and every gap survived."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import numpy as np
import pytest
from drawn import labels, lines, words
from made_comparison import COST, undone

from hlora.report.comparison import figures
from hlora.report.comparison.measures import t_tests
from hlora.report.comparison.trade_off import trade_off
from hlora.report.heatmap import importance_heatmap
from hlora.report.style import BLACK, BLUE, VERMILION


def test_violins_have_a_row_for_each_task_and_write_p_holm_and_effect_size(small_comparison):
    figure = figures.violins(small_comparison)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["piqa · PPL wikitext", "piqa · PPL shakespeare", "piqa · accuracy"]
    test = t_tests(small_comparison)[2]
    g = f"{test.welch.hedges_g:.2f}".replace("-", "−")
    assert words(figure)[2] == f"p {test.welch.p:.3f} · Holm {test.p_holm:.3f} · g {g}"
    assert all(len(axes.collections) == 2 for axes in figure.axes)
    points = [sorted(line.get_ydata()) for line in figure.axes[2].get_lines() if line.get_marker() in "os"]
    assert points == [sorted(test.ours), sorted(test.theirs)]


def test_two_seeds_are_points_and_a_mean_without_a_violin(small_comparison):
    small_comparison["cells"] = [each for each in small_comparison["cells"] if each["seed"] != 2]
    figure = figures.violins(small_comparison)
    axes, test = figure.axes[0], t_tests(small_comparison)[0]
    assert not axes.collections
    means = [line.get_ydata()[0] for line in axes.get_lines() if len(set(line.get_ydata())) == 1]
    assert means == [pytest.approx(np.mean(test.ours)), pytest.approx(np.mean(test.theirs))]


def test_violins_say_what_is_missing_diverged_or_untested(small_comparison):
    for each in small_comparison["cells"]:
        if each["arm"] == "EWC-LoRA" and each["strength"] == 10:
            each["test"]["texts"]["wikitext"]["perplexity"] = math.inf if each["seed"] == 0 else 20.0
            each["test"]["domain"].pop("acc")
    told = words(figures.violins(small_comparison))
    assert {
        "1 not finite",
        "not tested: values that are not finite",
        "no result",
        "too few seeds or questions to test",
    } <= set(told)


def test_training_curves_are_the_mean_and_range_over_seeds_of_the_chosen_strength(small_comparison):
    for each in small_comparison["cells"]:
        if each["arm"] == "HLoRA":
            loss = 3.0 + (each["seed"] or 0) if each["strength"] == 9 else 100.0
            each["history"] = [
                {"step": step, "loss": loss, "weighted_regularisation_loss": 0.5, "total_loss": loss + 0.5}
                for step in (1, 2, 3)
            ]
    figure = figures.training_curves(small_comparison)
    task_and_total, regularisation = figure.axes
    (task,), (total,) = lines(task_and_total, BLUE), lines(task_and_total, BLACK)
    np.testing.assert_allclose(task, [[1, 4], [2, 4], [3, 4]])
    np.testing.assert_allclose(total[:, 1], 4.5)
    np.testing.assert_allclose(lines(regularisation, VERMILION)[0][:, 1], 0.5)
    bands = [band.get_paths()[0].vertices[:, 1] for band in task_and_total.collections]
    assert [(band.min(), band.max()) for band in bands] == [(3.5, 5.5), (3.0, 5.0)]


def test_the_legend_of_the_training_curves_covers_no_curve(small_comparison):
    figure = figures.training_curves(small_comparison)
    assert labels(figure) == ["total: task + regularisation", "task loss", "regularisation φ·L_reg"]
    figure.draw_without_rendering()
    top = figure.legends[0].get_window_extent().y1
    assert all(axes.get_legend() is None and axes.get_tightbbox().y0 > top for axes in figure.axes)


def test_cost_bars_are_as_long_as_measured_and_say_so():
    figure = figures.cost_bars(COST)
    time, storage, *_ = figure.axes
    ends = sorted(bar.get_x() + bar.get_width() for bar in time.patches)
    np.testing.assert_allclose(ends, [0.021, 0.71, 39.8, 41.0, 93.1])
    assert {"93.1 s", "0.021 s", "538 MB", "230 kB"} <= set(words(figure))
    assert time.get_yticklabels()[1].get_text() == "HLoRA, float32\n20 sequences × 5 epochs, 12,700 tokens"
    assert time.get_title(loc="left") == "Time, the paper's counting × 1/200"
    assert storage.get_xscale() == "log"
    assert len(storage.patches) == 4


def test_importance_is_the_mean_over_seeds_of_our_arm(small_comparison):
    for each in small_comparison["cells"]:
        if each["arm"] == "HLoRA":
            each["importance"] = {"layer_norms": {"a.q_proj": 1.0 + (each["seed"] or 0)}}
    assert figures.importance_of(small_comparison) == {"a.q_proj": 2.0}
    assert importance_heatmap(figures.importance_of(small_comparison)).axes


def test_figures_without_data_are_left_out_and_named(small_comparison, caplog):
    for each in small_comparison["cells"]:
        each["history"], each["importance"] = [], None
    with caplog.at_level(logging.INFO, "hlora"):
        drawn = figures.all_figures(small_comparison)
    assert set(drawn) == {"trade_off", "figure_3_violins", "figure_6_strength"}
    assert "no figure_4_training_curves: no losses logged" in caplog.text
    assert "no figure_5_cost: no cost measured" in caplog.text


@pytest.mark.parametrize("status", ["failed", "missing", "cannot"])
def test_without_a_finished_cell_nothing_is_drawn_and_nothing_fails(small_comparison, status):
    small_comparison["cells"] = [undone(each, status, "why") for each in small_comparison["cells"]]
    assert figures.all_figures(small_comparison) == {}


@pytest.mark.slow
def test_names_are_drawn_as_they_are_and_never_read_as_mathematics(small_comparison):
    text = name = "costs $5 and $x_$"
    renamed = copy.deepcopy(small_comparison)
    renamed["tasks"], renamed["arms"][3], renamed["ours"] = [text], name, name
    renamed["chosen"] = {name: {text: 9.0}, "EWC-LoRA": {text: 10.0}}
    for each in renamed["cells"]:
        each["task"] = text
        each["arm"] = name if each["arm"] == "HLoRA" else each["arm"]
    for figure in figures.all_figures(renamed, COST).values():
        figure.draw_without_rendering()
    assert text in labels(trade_off(renamed))
    assert "$" not in "".join(label.get_text() for axes in figures.cost_bars(COST).axes for label in ticks(axes))


def ticks(axes: Any) -> list[Any]:
    axes.figure.draw_without_rendering()
    return [*axes.get_xticklabels(), *axes.get_yticklabels()]
