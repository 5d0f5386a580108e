"""The figures: right marks at the right places, and SVG that can share a page."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from hlora.report.format import change
from hlora.report.heatmap import importance_heatmap
from hlora.report.run.figures import budget_curves, forgetting_picture, loss_curves
from hlora.report.style import running_mean, save, svg

NORMS = {f"model.layers.{i}.self_attn.{kind}": 10.0 ** (i - 1) for i in range(3) for kind in ("q_proj", "v_proj")}
HISTORY = {
    "record": [{"step": i, "loss": 4 - 0.1 * i} for i in range(1, 11)],
    "tune": [
        {
            "step": i,
            "loss": 3.0,
            "regularisation_loss": 0.01,
            "weighted_regularisation_loss": 0.5,
            "total_loss": 3.5,
        }
        for i in range(1, 11)
    ],
    "lora": [{"step": i, "loss": 2.5} for i in range(1, 11)],
}


def evaluation(nll: float, answer_nll: float, acc: float | None = None) -> dict[str, Any]:
    domain = {"rows": 9, "answer_nll": answer_nll, "answer_nll_stderr": 0.1}
    if acc is not None:
        domain |= {"acc": acc, "acc_stderr": 0.02}
    text = {"perplexity": math.exp(min(nll, 700)), "nll": nll, "nll_stderr": 0.01, "bits_per_byte": nll / 3}
    return {"texts": {"wiki": text}, "domain": domain}


def words(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def ids(svg: str) -> list[str]:
    return re.findall(r'\bid="([^"]+)"', svg)


def mesh(figure: Any) -> np.ma.MaskedArray:
    """The heat map's cells, (kinds, layers)."""
    return figure.axes[0].collections[0].get_array()


def test_heat_map_has_kinds_as_rows_and_layers_as_columns():
    figure = importance_heatmap(NORMS)
    np.testing.assert_allclose(mesh(figure), [[0.1, 1, 10], [0.1, 1, 10]])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["q_proj", "v_proj"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "1", "2"]


def test_heat_map_marks_zero_and_non_finite_norms_instead_of_colouring_them():
    norms = {**NORMS, "model.layers.0.self_attn.q_proj": 0.0, "model.layers.1.self_attn.v_proj": math.nan}
    figure = importance_heatmap(norms)
    assert mesh(figure).mask.tolist() == [[True, False, False], [False, True, False]]
    assert sorted(words(figure)) == ["!", "0"]
    svg(figure)


@pytest.mark.parametrize("norms", [{}, {"model.layers.0.q_proj": 0.0}, {"a.0.q": 1.0, "a.1.q": 1.0}])
def test_heat_map_draws_without_any_range_of_norms(norms):
    assert svg(importance_heatmap(norms)).startswith("<svg")


def test_matrices_outside_the_layers_stand_in_a_column_of_their_own():
    figure = importance_heatmap({**NORMS, "lm_head": 5.0})
    assert mesh(figure)[2, 3] == 5.0
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][-1] == "other"


def test_kinds_that_end_alike_keep_their_own_rows():
    figure = importance_heatmap({"encoder.layers.0.q_proj": 1.0, "decoder.layers.0.q_proj": 2.0})
    np.testing.assert_allclose(mesh(figure), [[1.0], [2.0]])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["encoder.layers.*.q_proj", "decoder.layers.*.q_proj"]


def test_loss_curves_give_each_phase_a_panel_and_the_penalty_its_own():
    figure = loss_curves(HISTORY)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "General phase",
        "Domain phase, HLoRA",
        "Domain phase, HLoRA: penalty",
        "Domain phase, LoRA (domain only)",
    ]
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert legends == [["task loss"], ["task loss", "total: task + penalty"], ["penalty φ·L_reg"], ["task loss"]]
    smooth_total = figure.axes[1].lines[3].get_ydata()
    np.testing.assert_allclose(smooth_total, 3.5)
    assert figure.axes[1].get_ylim() == figure.axes[3].get_ylim()


def test_loss_curves_leave_a_gap_where_a_loss_is_not_finite():
    figure = loss_curves({"record": [{"step": i, "loss": x} for i, x in enumerate((1.0, math.inf, 3.0))]})
    raw = figure.axes[0].lines[0].get_ydata()
    assert np.isnan(raw[1])
    assert (raw[0], raw[2]) == (1.0, 3.0)
    svg(figure)


def test_running_mean_is_centred_and_skips_what_is_not_finite():
    values = np.arange(100.0)
    values[50] = np.nan
    smooth = running_mean(values)
    assert smooth[20] == pytest.approx(20)
    assert smooth[50] == pytest.approx(50)


def test_forgetting_picture_shows_rise_of_loss_and_answer_measures_of_every_arm():
    arms = {
        "base": evaluation(3.0, 5.0, 0.2),
        "hlora": evaluation(2.9, 4.0, 0.3),
        "mine": evaluation(3.2, 3.9, 0.31),
    }
    figure = forgetting_picture(arms)
    assert [axes.get_title(loc="left").split("?\n")[1] for axes in figure.axes] == ["wiki", "answer NLL", "accuracy"]
    shown = words(figure)
    assert "−0.100 (−9.5 %)" in shown
    assert "+0.200 (+22 %)" in shown
    assert {"5.00", "4.00", "3.90", "20.0 %", "30.0 %", "31.0 %"} <= set(shown)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["Base", "HLoRA", "mine"]


def test_forgetting_picture_says_so_when_a_loss_is_not_finite():
    arms = {"base": evaluation(3.0, 5.0), "hlora": evaluation(math.nan, math.inf)}
    figure = forgetting_picture(arms)
    assert words(figure).count("not finite") == 2
    svg(figure)


@pytest.mark.parametrize(
    "arms", [{}, {"base": {}}, {"hlora": {"texts": {"a": {"nll": 1.0}}}}, {"base": evaluation(3, 5)}]
)
def test_forgetting_picture_draws_with_parts_missing(arms):
    assert svg(forgetting_picture(arms)).startswith("<svg")


def test_names_are_drawn_as_they_are_and_never_read_as_mathematics():
    arms = {"base": evaluation(3.0, 5.0), "costs $5 and $x_$ \n\x00": evaluation(3.0, 5.0)}
    figure = forgetting_picture(arms)
    svg(figure)
    assert figure.axes[0].get_yticklabels()[1].get_text() == "costs $5 and $x_$   "


def test_change_uses_paired_differences_where_the_parts_are_listed():
    base = {"nll": 3.0, "nll_stderr": 0.3, "nll_each": [1.0, 3.0, 5.0]}
    arm = {"nll": 3.1, "nll_stderr": 0.4, "nll_each": [1.1, 3.1, 5.1]}
    assert change(base, arm, "nll").stderr == pytest.approx(0, abs=1e-9)
    unpaired = change(base, {**arm, "nll_each": [1.1]}, "nll")
    assert unpaired.value == pytest.approx(0.1)
    assert unpaired.stderr == pytest.approx(0.5)


def test_svg_is_the_same_for_the_same_figure():
    assert svg(loss_curves(HISTORY)) == svg(loss_curves(HISTORY))


def test_svg_ids_of_two_figures_do_not_collide_and_each_reference_has_its_target():
    one, other = svg(loss_curves(HISTORY)), svg(importance_heatmap(NORMS))
    assert not set(ids(one)) & set(ids(other))
    for drawn in (one, other):
        assert len(ids(drawn)) == len(set(ids(drawn)))
        references = re.findall(r'(?:href="|url\()#([^")]+)', drawn)
        assert references
        assert set(references) <= set(ids(drawn))


def test_svg_is_wellformed_and_names_no_outside_address():
    drawn = svg(importance_heatmap(NORMS))
    ElementTree.fromstring(drawn)
    assert "http" not in drawn


def test_save_writes_png_and_svg_beside_each_other(tmp_path: Path):
    png, vector = save(importance_heatmap(NORMS), tmp_path / "fig.7")
    assert {path.name for path in tmp_path.iterdir()} == {"fig.7.png", "fig.7.svg"}
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(vector).getroot().tag.endswith("svg")


def test_budget_curves_show_probes_with_their_errors_the_budget_and_phi_on_a_log_scale():
    entries = [{"step": i, "loss": 3.0, "phi": 2.0**i} for i in range(1, 5)]
    entries[1] |= {"probe_step": 2, "probe_rise": 0.004, "probe_stderr": 0.001, "budget": 0.01}
    entries.append(
        {"step": 4, "phi": 16.0, "probe_step": 4, "probe_rise": 0.0098, "probe_stderr": 0.0005, "budget": 0.01}
        | {"alpha": 0.8}
    )
    left, right = budget_curves(entries).axes
    (bars,) = left.containers
    np.testing.assert_allclose(bars.lines[0].get_xydata(), [[2, 0.004], [4, 0.0098]])
    assert [label.get_text() for label in left.get_legend().get_texts()] == [
        "budget, 0.01",
        "landed, α 0.80",
        "probe ± s.e.",
    ]
    assert right.get_yscale() == "log"
    np.testing.assert_allclose(right.get_lines()[0].get_ydata(), [2, 4, 8, 16, 16])
    nothing = budget_curves([{"step": 1, "loss": 2.0}])
    assert [text.get_text() for text in nothing.texts] == ["no probe of the budget logged"]
