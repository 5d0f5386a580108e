"""A figure's panels on a phone: windows onto the one drawing, each with the names of its rows."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from made_results import evaluation, results

from hlora.report.drawing import draw
from hlora.report.heatmap import importance_heatmap
from hlora.report.run.figures import forgetting_picture, loss_curves


def test_each_panel_shows_a_part_that_the_whole_drawing_has_and_starts_with_the_shared_row_names():
    drawn = draw(forgetting_picture(results(hlora=evaluation(2.9, answer_nll=4.0))["arms"]))
    panels = ElementTree.fromstring(f"<p>{drawn.panels}</p>").findall("./div/svg")
    assert [len(panel) for panel in panels] == [1, 2, 2]  # the text's panel has names of its own
    shown = re.findall(r'use href="#([^"]+)"', drawn.panels)
    assert len(set(shown)) == 3 and all(f' id="{each}"' in drawn.whole for each in shown)
    for panel in panels:
        *_, width, height = map(float, panel.attrib["viewBox"].split())
        assert sum(float(part.attrib["width"]) for part in panel) == width < 72 * drawn.inches
        assert {float(part.attrib["height"]) for part in panel} == {height}


def test_a_common_legend_is_shown_too():
    figure = loss_curves({"record": [{"step": 1, "loss": 2.0}], "tune": [{"step": 1, "loss": 3.0}]})
    figure.legend([figure.axes[0].get_lines()[0]], ["a loss"], loc="outside lower center")
    drawn = draw(figure)
    assert drawn.panels.count('class="panels"') == 2 and drawn.panels.count("-key0") == 1


def test_a_figure_of_one_panel_is_shown_whole():
    drawn = draw(importance_heatmap({"model.layers.0.q_proj": 0.5, "model.layers.1.q_proj": 1.0}))
    assert drawn.panels == "" and "stacked" not in drawn.html
