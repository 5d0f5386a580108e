"""The comparison's figures: right values at the right places, and every gap survived."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import numpy as np
import pytest

from hlora import comparison_figures as figures
from hlora import tables
from hlora.figures import BLACK, BLUE, GREEN, VERMILION, importance_heatmap, svg
from hlora.statistics import holm, points_of, welch

TASKS, SEEDS, TEXTS = ["piqa", "medmcqa", "qasc"], [0, 1, 2], ["wikitext", "shakespeare"]
ARMS: dict[str, tuple[str, tuple[float, ...], tuple[float, float, float]]] = {
    # method, strengths, (general NLL, answer NLL, accuracy) at a middling strength
    "Base": ("base", (), (3.35, 84.0, 0.57)),
    "LoRA(μ)": ("lora", (), (3.40, 74.0, 0.655)),
    "LoRA(ν+μ)": ("lora_after_general", (), (3.08, 74.4, 0.64)),
    "rsLoRA": ("rslora", (), (3.55, 73.5, 0.65)),
    "EWC-LoRA": ("ewc", (1.0, 10.0, 100.0), (3.28, 75.5, 0.64)),
    "HLoRA": ("hlora", (3.0, 9.0, 30.0, 100.0), (2.94, 75.6, 0.645)),
    "HLoRA float32": ("hlora", (3.0, 9.0, 30.0), (2.945, 75.7, 0.645)),
    "HLoRA w/o layer weights": ("hlora", (3.0, 9.0, 30.0), (2.96, 75.8, 0.64)),
    "HLoRA ξ 1e-6, share": ("hlora", (3.0, 9.0, 30.0), (2.93, 76.0, 0.63)),
    "HLoRA exact gradient": ("hlora", (3.0, 9.0, 30.0), (2.95, 75.5, 0.65)),
    "uniform importance": ("l2", (3.0, 9.0, 30.0), (3.01, 75.4, 0.64)),
    "replay": ("replay", (0.05, 0.2, 0.5), (3.05, 75.0, 0.645)),
    "KL to base": ("kl", (0.1, 1.0, 10.0), (3.30, 76.0, 0.63)),
    "OSF": ("osf", (), (3.33, 78.0, 0.61)),
    "CorDA": ("corda", (), (3.36, 75.0, 0.64)),
    "LoRA on the MLP": ("lora_mlp", (), (3.38, 73.9, 0.66)),
}
NORMS = {
    f"model.layers.{i}.self_attn.{kind}": 0.05 + i * 0.07 * (5 if kind == "v_proj" else 1)
    for i in range(30)
    for kind in ("q_proj", "v_proj")
}
COST: dict[str, Any] = {
    "model": "smollm2-135m",
    "scale": 1 / 200,
    "command": "hlora cost configs/x.yaml",
    "notes": ["Measured at 1/200 of the paper's sequences, not extrapolated."],
    "provenance": {"hardware": "2 cores"},
    "rows": [
        {
            "method": method, "encoding": encoding, "counting": counting, "samples": samples, "epochs": epochs,
            "tokens": samples * epochs * 127, "seconds": seconds, "bytes": size, **more,
        }
        for counting, factor in (("paper", 1.0), ("equal", 0.9))
        for method, encoding, samples, epochs, seconds, size, more in (
            ("EWC-LoRA", "float32", 100, 1, 93.1, 53_084_160, {"whole_model_bytes": 538_060_032}),
            ("HLoRA", "float32", 20 if factor == 1 else 100, 5 if factor == 1 else 1, 41.0 * factor, 53_084_160,
             {"seconds_beyond_training": 0.71}),
            ("HLoRA", "bfloat16", 20 if factor == 1 else 100, 5 if factor == 1 else 1, 40.2 * factor, 26_542_080,
             {"seconds_beyond_training": 0.9}),
            ("HLoRA", "factored", 20 if factor == 1 else 100, 5 if factor == 1 else 1, 39.8 * factor, 230_400,
             {"seconds_beyond_training": 0.021}),
        )
    ],
}  # fmt: skip
CONFIG = {
    "model": {"name": "smollm2-135m", "dtype": None, "device": None},
    "lora": {"rank": 8, "alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "general": {"paths": ["../shared/data/wikitext2/valid.txt"]},
    "penalty": {"phi": 9, "phi_scale": "relative", "layer_weights": "softmax"},
}


def cell(arm: str, task: str, seed: int | None, strength: float | None) -> dict[str, Any]:
    """A finished cell: the more strength, the lower the general loss and the less is learned."""
    method, strengths, (general, answer, acc) = ARMS[arm]
    place = math.log10(strength / strengths[1]) if strength else 0.0
    noise = np.random.default_rng([len(arm), TASKS.index(task), 0 if seed is None else seed + 1])
    shift = TASKS.index(task) * 0.02 + (noise.normal(0, 0.006) if seed is not None else 0)
    general, answer = (
        general + shift - 0.06 * place,
        answer - 20 * TASKS.index(task) + 1.2 * place**2 + 0.8 * place + noise.normal(0, 0.3),
    )
    acc = acc - 0.1 * TASKS.index(task) - 0.01 * place + (noise.normal(0, 0.006) if seed is not None else 0)
    texts = {
        name: {
            "nll": nll, "perplexity": math.exp(nll), "bits_per_byte": nll / 3, "nll_stderr": 0.02,
            "nll_each": [nll - 0.1, nll + 0.1] * 2, "forgetting": nll - base,
        }
        for name, nll, base in (
            ("wikitext", general, 3.35), ("shakespeare", 3.45 + 0.3 * abs(general - 3.3) + noise.normal(0, 0.004), 3.4)
        )
    }  # fmt: skip
    domain = {
        "rows": 4, "answer_nll": answer, "answer_nll_stderr": 2.0, "answer_nll_each": [answer - 9, answer + 9] * 2,
        "acc": acc, "acc_stderr": 0.03, "acc_norm": acc, "acc_each": [0, 1] * 2,
    }  # fmt: skip
    steps = np.arange(1, 61)
    task_loss = 2.0 + 1.5 * np.exp(-steps / 12) + noise.normal(0, 0.12, 60)
    penalty = 0.4 * steps / 20 * np.exp(1 - steps / 20) * noise.uniform(0.8, 1.2)
    history = [{"step": int(step), "loss": loss} for step, loss in zip(steps, task_loss, strict=True)]
    if strength:
        for entry, extra in zip(history, penalty, strict=True):
            entry |= {"weighted_regularisation_loss": extra, "total_loss": entry["loss"] + extra}
    importance = {"encoding": "factored", "bytes": 230_400, "layer_norms": NORMS} if method == "hlora" else None
    return {
        "key": f"{arm}-{task}-{seed}-{strength}", "arm": arm, "method": method, "task": task, "seed": seed,
        "strength": strength, "status": "done", "error": None, "test": {"texts": texts, "domain": domain},
        "validation": None, "history": history if method != "base" else [], "importance": importance,
        "seconds": {"importance": 0.1, "train": 61.2, "evaluate": 40.0}, "peak_memory_bytes": None,
        "config": {**CONFIG, "method": method, "strength": strength, "seed": seed, "domain": {"task": task}},
    }  # fmt: skip


def undone(like: dict[str, Any], status: str, error: str) -> dict[str, Any]:
    nothing = {"test": None, "validation": None, "history": [], "importance": None, "seconds": {}}
    return {**like, **nothing, "status": status, "error": error}


def make_comparison(arms: list[str] | None = None, tasks: list[str] | None = None) -> dict[str, Any]:
    """All strengths on the first seed, the chosen one on all; CorDA cannot run, one of KL failed, one is missing."""
    arms, tasks = arms or list(ARMS), tasks or TASKS
    chosen = {arm: dict.fromkeys(tasks, (ARMS[arm][1] or (None, None))[1]) for arm in arms}
    cells = []
    for arm in arms:
        for task in tasks:
            for seed in [None] if arm == "Base" else SEEDS:
                for strength in ARMS[arm][1] or (None,):
                    if seed in (None, 0) or strength == chosen[arm][task]:
                        cells.append(cell(arm, task, seed, strength))
    for place, each in enumerate(cells):
        if each["arm"] == "CorDA":
            cells[place] = undone(each, "cannot", "CorDA needs a calibration set of 256 rows; got 40. Give more rows.")
        if (each["arm"], each["task"], each["seed"]) == ("KL to base", "qasc", 1):
            cells[place] = {**undone(each, "failed", "RuntimeError: out of memory"), "traceback": "Traceback: …"}
        if (each["arm"], each["task"], each["seed"]) == ("replay", "qasc", 2):
            cells[place] = undone(each, "missing", None)  # type: ignore[arg-type]
    return {
        "config": {**CONFIG, "output": "runs/compare"}, "command": "hlora compare configs/compare-smollm2.yaml",
        "provenance": {"versions": {"torch": "2.13.0"}, "hardware": "2 CPU cores", "parameters": 134515008},
        "model": "smollm2-135m", "arms": arms, "tasks": tasks, "seeds": SEEDS, "texts": TEXTS, "ours": "HLoRA",
        "rival": "EWC-LoRA", "unprotected": "LoRA(μ)",
        "ablation": [arm for arm in ("LoRA(ν+μ)", "HLoRA w/o layer weights", "HLoRA") if arm in arms],
        "chosen": chosen, "cells": cells,
    }  # fmt: skip


SMALL = ["Base", "LoRA(μ)", "EWC-LoRA", "HLoRA"]


@pytest.fixture
def small() -> dict[str, Any]:
    return make_comparison(SMALL, ["piqa"])


def lines(axes: Any, colour: str) -> list[np.ndarray]:
    """Data of the lines of a colour, (n, 2) each."""
    return [line.get_xydata() for line in axes.get_lines() if line.get_color() == colour]


def rings(axes: Any) -> list[tuple[float, float]]:
    return [tuple(line.get_xydata()[0]) for line in axes.get_lines() if line.get_markerfacecolor() == "none"]


def words(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def labels(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_t_tests_are_those_of_the_table():
    comparison = make_comparison(SMALL, ["piqa", "qasc"])
    table = tables.t_test_table(comparison)
    place = table.columns.index("p, Holm")
    shown = [row[place].text for row in table.rows]
    tests = figures.t_tests(comparison)
    assert [("<0.001" if test.p_holm < 0.001 else f"{test.p_holm:.3f}") for test in tests] == shown
    assert [test.p_holm for test in tests] == holm([welch(test.ours, test.theirs).p for test in tests])
    assert len(tests) == 6


def test_violins_have_a_row_for_each_task_and_write_p_holm_and_effect_size(small):
    figure = figures.violins(small)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["piqa · PPL wikitext", "piqa · PPL shakespeare", "piqa · accuracy"]
    test = figures.t_tests(small)[2]
    g = f"{test.welch.hedges_g:+.3g}".replace("-", "−")
    assert words(figure)[2] == f"p {test.welch.p:.3f} · Holm {test.p_holm:.3f} · g {g}"
    assert all(len(axes.collections) == 2 for axes in figure.axes)
    points = [sorted(line.get_ydata()) for line in figure.axes[2].get_lines() if line.get_marker() in "os"]
    assert points == [sorted(test.ours), sorted(test.theirs)]


def test_two_seeds_are_points_and_a_mean_without_a_violin(small):
    small["cells"] = [each for each in small["cells"] if each["seed"] != 2]
    figure = figures.violins(small)
    axes, test = figure.axes[0], figures.t_tests(small)[0]
    assert not axes.collections
    means = [line.get_ydata()[0] for line in axes.get_lines() if len(set(line.get_ydata())) == 1]
    assert means == [pytest.approx(np.mean(test.ours)), pytest.approx(np.mean(test.theirs))]


def test_violins_say_what_is_missing_diverged_or_untested(small):
    for each in small["cells"]:
        if each["arm"] == "EWC-LoRA" and each["strength"] == 10:
            each["test"]["texts"]["wikitext"]["perplexity"] = math.inf if each["seed"] == 0 else 20.0
            each["test"]["domain"].pop("acc")
    told = words(figures.violins(small))
    assert {"1 not finite", "not tested: values that are not finite", "no result", "too few seeds to test"} <= set(told)


def test_training_curves_are_the_mean_and_range_over_seeds_of_the_chosen_strength(small):
    for each in small["cells"]:
        if each["arm"] == "HLoRA":
            loss = 3.0 + (each["seed"] or 0) if each["strength"] == 9 else 100.0
            each["history"] = [
                {"step": step, "loss": loss, "weighted_regularisation_loss": 0.5, "total_loss": loss + 0.5}
                for step in (1, 2, 3)
            ]
    figure = figures.training_curves(small)
    task_and_total, regularisation = figure.axes
    (task,), (total,) = lines(task_and_total, BLUE), lines(task_and_total, BLACK)
    np.testing.assert_allclose(task, [[1, 4], [2, 4], [3, 4]])
    np.testing.assert_allclose(total[:, 1], 4.5)
    np.testing.assert_allclose(lines(regularisation, VERMILION)[0][:, 1], 0.5)
    bands = [band.get_paths()[0].vertices[:, 1] for band in task_and_total.collections]
    assert [(band.min(), band.max()) for band in bands] == [(3.5, 5.5), (3.0, 5.0)]


def test_cost_bars_are_as_long_as_measured_and_say_so():
    figure = figures.cost_bars(COST)
    time, storage, *_ = figure.axes
    ends = sorted(bar.get_x() + bar.get_width() for bar in time.patches)
    np.testing.assert_allclose(ends, [0.021, 0.71, 0.9, 39.8, 40.2, 41.0, 93.1])
    assert {"93.1 s", "0.021 s", "538 MB", "230 kB"} <= set(words(figure))
    assert time.get_yticklabels()[1].get_text() == "HLoRA, float32\n20 sequences × 5 epochs, 12,700 tokens"
    assert time.get_title(loc="left") == "Time, the paper's counting × 1/200"
    assert storage.get_xscale() == "log"
    assert len(storage.patches) == 5


def test_strength_sweep_draws_the_arms_with_several_strengths_and_rings_the_chosen(small):
    figure = figures.strength_sweep(small)
    assert labels(figure) == ["EWC-LoRA", "HLoRA", "Base", "LoRA(μ)", "chosen on validation"]
    perplexity = figure.axes[0]
    seed_0 = {
        each["strength"]: each["test"]["texts"]["wikitext"]["perplexity"]
        for each in small["cells"]
        if each["arm"] == "HLoRA" and each["seed"] == 0
    }
    ours = lines(perplexity, GREEN)[0]
    np.testing.assert_allclose(ours, sorted(seed_0.items()))
    assert (9.0, pytest.approx(seed_0[9.0])) in rings(perplexity)
    assert [axes.get_title(loc="left") for axes in figure.axes][2:] == ["piqa · answer NLL", "piqa · accuracy %"]


def test_importance_is_the_mean_over_seeds_of_our_arm(small):
    for each in small["cells"]:
        if each["arm"] == "HLoRA":
            each["importance"] = {"layer_norms": {"a.q_proj": 1.0 + (each["seed"] or 0)}}
    assert figures.importance_of(small) == {"a.q_proj": 2.0}
    assert importance_heatmap(figures.importance_of(small)).axes


def test_trade_off_goes_through_the_points_of_one_set_of_seeds(small):
    figure = figures.trade_off(small)
    ours = lines(figure.axes[0], GREEN)[0]
    points = points_of(small, "HLoRA", "piqa", "wikitext")  # (answer NLL, log of perplexity) on the first seed
    np.testing.assert_allclose(sorted(map(tuple, ours)), sorted((x, math.exp(y)) for x, y in points))
    assert len(ours) == 4
    accuracy = [each["test"]["domain"]["acc"] for each in small["cells"] if each["arm"] == "HLoRA" and not each["seed"]]
    np.testing.assert_allclose(sorted(lines(figure.axes[2], GREEN)[0][:, 0]), sorted(100 * acc for acc in accuracy))


def test_trade_off_averages_over_seeds_where_all_strengths_have_them(small):
    cells = [cell("HLoRA", "piqa", seed, strength) for seed in SEEDS for strength in (3.0, 9.0, 30.0, 100.0)]
    small["cells"] = [each for each in small["cells"] if each["arm"] != "HLoRA"] + cells
    ours = lines(figures.trade_off(small).axes[0], GREEN)[0]
    at_3 = [each["test"]["texts"]["wikitext"]["perplexity"] for each in cells if each["strength"] == 3.0]
    assert ours[0][1] == pytest.approx(np.mean(at_3))


def test_trade_off_rings_the_chosen_points_and_keeps_a_far_base_at_the_edge(small):
    figure = figures.trade_off(small)
    axes = figure.axes[0]
    assert len(rings(axes)) == 2
    base = small["cells"][0]["test"]
    crosses = [line for line in axes.get_lines() if line.get_color() == BLACK and line.get_marker() == "P"]
    ((x, y),) = crosses[0].get_xydata()
    assert y == pytest.approx(base["texts"]["wikitext"]["perplexity"])
    assert x == axes.get_xlim()[1] < base["domain"]["answer_nll"]
    assert f"{base['domain']['answer_nll']:.3g} →" in words(figure)


def test_one_diverged_arm_does_not_flatten_the_trade_off(small):
    assert figures.trade_off(small).axes[0].get_yscale() == "linear"
    for each in small["cells"]:
        if each["arm"] == "LoRA(μ)":
            each["test"]["texts"]["wikitext"]["perplexity"] = 5000.0
    axes = figures.trade_off(small).axes[0]
    assert axes.get_yscale() == "log"
    svg(axes.figure)


def test_no_two_arms_look_alike_and_the_papers_are_in_colour():
    comparison = make_comparison(tasks=["piqa"])
    looks = figures.arm_looks(comparison)
    assert len({(colour, str(marker), str(line)) for colour, marker, line in looks.values()}) == len(ARMS)
    assert len({str(marker) for _, marker, _ in looks.values()}) == len(ARMS)
    coloured = [arm for arm, (colour, _, _) in looks.items() if colour not in figures._OTHER_GREYS]
    assert coloured == ["Base", "LoRA(μ)", "LoRA(ν+μ)", "rsLoRA", "EWC-LoRA", "HLoRA"]


def test_our_arm_has_the_main_colour_whatever_its_method(small):
    small["ours"] = "LoRA(μ)"
    assert figures.arm_looks(small)["LoRA(μ)"][0] == GREEN


def test_figures_without_data_are_left_out_and_named(small, caplog):
    for each in small["cells"]:
        each["history"], each["importance"] = [], None
    with caplog.at_level(logging.INFO, "hlora"):
        drawn = figures.all_figures(small)
    assert set(drawn) == {"trade_off", "figure_3_violins", "figure_6_strength"}
    assert "no figure_4_training_curves: no losses logged" in caplog.text
    assert "no figure_5_cost: no cost measured" in caplog.text


@pytest.mark.parametrize("status", ["failed", "missing", "cannot"])
def test_without_a_finished_cell_nothing_is_drawn_and_nothing_fails(small, status):
    small["cells"] = [undone(each, status, "why") for each in small["cells"]]
    assert figures.all_figures(small) == {}


def test_names_are_drawn_as_they_are_and_never_read_as_mathematics(small):
    text = name = "costs $5 and $x_$"
    renamed = copy.deepcopy(small)
    renamed["tasks"], renamed["arms"][3], renamed["ours"] = [text], name, name
    renamed["chosen"] = {name: {text: 9.0}, "EWC-LoRA": {text: 10.0}}
    for each in renamed["cells"]:
        each["task"] = text
        each["arm"] = name if each["arm"] == "HLoRA" else each["arm"]
    for figure in figures.all_figures(renamed, COST).values():
        figure.draw_without_rendering()
    assert text in labels(figures.trade_off(renamed))
    assert "$" not in "".join(label.get_text() for axes in figures.cost_bars(COST).axes for label in ticks(axes))


def ticks(axes: Any) -> list[Any]:
    axes.figure.draw_without_rendering()
    return [*axes.get_xticklabels(), *axes.get_yticklabels()]
