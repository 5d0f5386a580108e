"""The comparison's report: wins and losses told alike, one safe file, every cell's settings in it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_comparison import COST, SMALL, answers, cell, make_comparison, undone
from made_results import HOSTILE, Page

from hlora.report.comparison.figures import all_figures
from hlora.report.comparison.page import write_comparison_report
from hlora.report.comparison.tables import all_tables
from hlora.report.comparison.verdict import comparison_verdict, outcomes
from hlora.report.drawing import Drawing, draw


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without drawing, which takes most of the time."""
    monkeypatch.setattr(f"{__name__}.draw", lambda figure: Drawing("<svg></svg>"))


def write(comparison: dict[str, Any], directory: Path, cost: dict[str, Any] | None = None) -> Page:
    drawings = {name: draw(figure) for name, figure in all_figures(comparison, cost).items()}
    write_comparison_report(comparison, all_tables(comparison), drawings, directory / "report.html", cost)
    return Page(directory / "report.html")


def set_values(comparison: dict[str, Any], arm: str, texts: dict[str, list[float]], acc: list[float]) -> None:
    """Perplexities and accuracies of an arm by seed, at every strength."""
    for each in comparison["cells"]:
        if each["arm"] == arm:
            seed = each["seed"] or 0
            for text, perplexities in texts.items():
                each["test"]["texts"][text]["perplexity"] = perplexities[seed]
            each["test"]["domain"] |= {"acc": acc[seed], "acc_each": answers(acc[seed])}


def state(comparison: dict[str, Any], other: str, text: str | None, name: str = "perplexity") -> str:
    (found,) = [
        o.state for o in outcomes(comparison) if (o.other, o.measure.text, o.measure.name) == (other, text, name)
    ]
    return found


LOW, HIGH, SAME = [19.0, 19.1, 19.2], [25.0, 25.1, 25.2], [0.60, 0.61, 0.62]


def test_verdict_praises_only_what_is_better_beyond_noise(small_comparison):
    set_values(small_comparison, "HLoRA", {"wikitext": LOW, "shakespeare": LOW}, SAME)
    set_values(small_comparison, "EWC-LoRA", {"wikitext": HIGH, "shakespeare": HIGH}, SAME)
    set_values(small_comparison, "LoRA(μ)", {"wikitext": HIGH, "shakespeare": HIGH}, SAME)
    found = comparison_verdict(small_comparison)
    assert found.headline == "HLoRA keeps more than EWC-LoRA and learns as much."
    assert found.tone == "good"


def test_verdict_says_where_ours_loses_as_plainly(small_comparison):
    set_values(small_comparison, "HLoRA", {"wikitext": HIGH, "shakespeare": HIGH}, [0.50, 0.51, 0.52])
    for arm in ("EWC-LoRA", "LoRA(μ)"):
        set_values(small_comparison, arm, {"wikitext": LOW, "shakespeare": LOW}, SAME)
    found = comparison_verdict(small_comparison)
    assert found.headline == "HLoRA keeps less than EWC-LoRA and learns less."
    assert found.tone == "bad"
    (losses,) = [lines for lead, lines in found.paragraphs if lead == "Where HLoRA loses beyond noise"]
    assert "Accuracy: to Base, LoRA(μ), EWC-LoRA on every task." in losses
    assert [line.split(":")[0] for line in losses] == [
        "Perplexity on wikitext",
        "Perplexity on shakespeare",
        "Accuracy",
    ]


def test_verdict_is_mixed_when_one_text_is_kept_and_the_other_lost(small_comparison):
    set_values(small_comparison, "HLoRA", {"wikitext": LOW, "shakespeare": HIGH}, SAME)
    set_values(small_comparison, "EWC-LoRA", {"wikitext": HIGH, "shakespeare": LOW}, SAME)
    found = comparison_verdict(small_comparison)
    assert found.headline == "HLoRA keeps more than EWC-LoRA in 1 test, less in 1; learns as much."
    assert found.tone == "mixed"


def test_a_difference_within_the_interval_is_no_difference(small_comparison):
    set_values(small_comparison, "HLoRA", {"wikitext": [19.0, 21.0, 23.0], "shakespeare": LOW}, SAME)
    set_values(small_comparison, "EWC-LoRA", {"wikitext": [20.0, 22.0, 24.0], "shakespeare": LOW}, SAME)
    assert state(small_comparison, "EWC-LoRA", "wikitext") == "same"
    headline = comparison_verdict(small_comparison).headline
    assert headline == "HLoRA keeps as much as EWC-LoRA within noise and learns as much."
    against = dict(comparison_verdict(small_comparison).paragraphs)["Against EWC-LoRA"]
    assert against[0].startswith("Perplexity on wikitext: no difference beyond noise on piqa (21.00 against 22.00; p")


def test_tasks_that_differ_in_outcome_are_counted():
    comparison = make_comparison(SMALL, ["piqa", "qasc"])
    for task, ours, theirs in (("piqa", LOW, HIGH), ("qasc", HIGH, LOW)):
        part = {"cells": [each for each in comparison["cells"] if each["task"] == task]}
        set_values(part, "HLoRA", {"wikitext": ours, "shakespeare": LOW}, SAME)
        set_values(part, "EWC-LoRA", {"wikitext": theirs, "shakespeare": HIGH}, SAME)
    headline = comparison_verdict(comparison).headline
    assert headline == "HLoRA keeps more than EWC-LoRA in 3 tests, less in 1; learns as much."
    assert len(headline.split()) < 15


def test_a_task_without_a_result_is_not_counted_as_won():
    comparison = make_comparison(SMALL, ["piqa", "qasc"])
    comparison["cells"] = [
        undone(each, "failed", "why") if (each["arm"], each["task"]) == ("EWC-LoRA", "qasc") else each
        for each in comparison["cells"]
    ]
    for arm, perplexities in (("HLoRA", LOW), ("EWC-LoRA", HIGH)):
        part = {"cells": [each for each in comparison["cells"] if each["test"]]}
        set_values(part, arm, {"wikitext": perplexities, "shakespeare": perplexities}, SAME)
    assert (
        comparison_verdict(comparison).headline == "HLoRA keeps more than EWC-LoRA in 2 of 4 tests and learns as much."
    )


def test_base_is_a_constant_that_the_seeds_are_tested_against(small_comparison):
    set_values(small_comparison, "HLoRA", {"wikitext": [19.0, 19.5, 20.0]}, SAME)
    set_values(small_comparison, "Base", {"wikitext": [21.0]}, [0.6])
    assert (
        state(small_comparison, "Base", "wikitext") == "better"
    )  # 19.5 ± 1.13: seeds ± 0.29, blocks ± 0.09, 2.4 degrees of freedom
    set_values(small_comparison, "Base", {"wikitext": [20.5]}, [0.6])
    assert state(small_comparison, "Base", "wikitext") == "same"


def test_one_seed_claims_nothing(small_comparison):
    small_comparison["cells"] = [each for each in small_comparison["cells"] if each["seed"] in (None, 0)]
    assert {outcome.state for outcome in outcomes(small_comparison)} == {"untested"}
    found = comparison_verdict(small_comparison)
    assert found.tone == "unknown"
    assert found.headline == "HLoRA is not tested against EWC-LoRA on general text; learning is not tested."
    lost = dict(found.paragraphs)["Where HLoRA loses beyond noise"]
    assert lost == ["Not known: too few seeds or questions to test."]
    behind = dict(found.paragraphs)["Where it is behind, with too few seeds or questions to test"]
    assert "Perplexity on shakespeare: to Base, LoRA(μ), EWC-LoRA on every task." in behind


@pytest.mark.parametrize(("diverged", "expected"), [("HLoRA", "worse"), ("EWC-LoRA", "better")])
def test_an_arm_that_diverged_on_a_seed_loses_to_one_that_did_not(small_comparison, diverged, expected):
    set_values(small_comparison, diverged, {"wikitext": [10.0, math.inf, 10.0]}, SAME)
    assert state(small_comparison, "EWC-LoRA", "wikitext") == expected


def test_verdict_without_finished_cells_claims_nothing(small_comparison):
    small_comparison["cells"] = [undone(each, "failed", "why") for each in small_comparison["cells"]]
    found = comparison_verdict(small_comparison)
    assert found.tone == "unknown"
    assert "nothing to compare yet" in found.headline


def test_verdict_falls_back_to_the_unprotected_arm_where_the_rival_cannot_run(small_comparison):
    small_comparison["cells"] = [
        undone(each, "cannot", "why") if each["arm"] == "EWC-LoRA" else each for each in small_comparison["cells"]
    ]
    found = comparison_verdict(small_comparison)
    assert "LoRA(μ)" in found.headline and "EWC-LoRA" not in found.headline
    assert "Against EWC-LoRA" not in dict(found.paragraphs)


def test_report_is_one_safe_file_with_tables_figures_and_unique_ids(small_comparison, tmp_path):
    page = write(small_comparison, tmp_path, COST)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert page.attributes.count(("role", "img")) == 6
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href", "xlink:href") or value.startswith(("#", "data:image/png;base64,"))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in source.replace("http-equiv", "")
    found = [value for name, value in page.attributes if name == "id"]
    assert len(found) == len(set(found)) > 0


@pytest.mark.usefixtures("plain")
def test_report_has_the_verdict_first_and_the_command_last(small_comparison, tmp_path):
    text = write(small_comparison, tmp_path, COST).text
    order = [
        "hlora comparison",
        "Model smollm2-135m",
        "HLoRA keeps",
        "HLoRA against every other arm",
        "Table 1. Perplexity on wikitext",
        "Table 2. Ablation",
        "Welch's t-test",
        "Fig. 3. Over seeds.",
        "Measured at 1/200 of the paper's sequences",
        "Cells",
        "Provenance",
        "Repeat it",
        "hlora cost configs/x.yaml",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


@pytest.mark.usefixtures("plain")
def test_every_cell_is_listed_with_its_whole_configuration(small_comparison, tmp_path):
    write(small_comparison, tmp_path)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = [part.split("</pre>")[0].split("\n", 1) for part in source.split("<pre>cells/")[1:]]
    found = {key.removesuffix(".json"): json.loads(settings) for key, settings in shown}
    assert found == {each["key"]: each["config"] for each in small_comparison["cells"]}


@pytest.mark.usefixtures("plain")
def test_cells_without_a_result_come_first_with_their_reason_and_what_to_do(tmp_path):
    comparison = make_comparison([*SMALL, "CorDA", "KL to base", "replay"], ["qasc"])
    page = write(comparison, tmp_path)
    cells = page.text[page.text.index("Cells") :]
    assert "5 without a result." in cells
    assert "run again by hlora compare configs/compare-smollm2.yaml --retry" in cells
    reasons = ["CorDA needs a calibration set of 256 rows", "RuntimeError: out of memory", "not run yet"]
    assert all(cells.index(reason) < cells.index("Bold: the strength chosen") for reason in reasons)
    assert cells.index(reasons[0]) < cells.index(f"cells/{comparison['cells'][0]['key']}.json")
    assert "Traceback: …" in cells


@pytest.mark.usefixtures("plain")
def test_a_command_that_retries_is_not_told_to_retry_twice(small_comparison, tmp_path):
    small_comparison["command"] += " --retry"
    small_comparison["cells"][0] = undone(small_comparison["cells"][0], "failed", "why")
    assert "--retry --retry" not in write(small_comparison, tmp_path).text


@pytest.mark.usefixtures("plain")
def test_report_shows_what_users_and_libraries_wrote_as_text(small_comparison, tmp_path):
    hostile = copy.deepcopy(small_comparison)
    renamed = {"EWC-LoRA": HOSTILE}
    hostile["arms"] = [renamed.get(arm, arm) for arm in hostile["arms"]]
    hostile["rival"], hostile["tasks"], hostile["texts"] = HOSTILE, [HOSTILE], [HOSTILE]
    hostile["chosen"] = {renamed.get(arm, arm): {HOSTILE: (by["piqa"])} for arm, by in hostile["chosen"].items()}
    for each in hostile["cells"]:
        each["arm"], each["task"] = renamed.get(each["arm"], each["arm"]), HOSTILE
        each["config"] = {"x": "</pre>" + HOSTILE}
        each["test"]["texts"] = {HOSTILE: each["test"]["texts"]["wikitext"]}
    hostile["cells"][2] = undone(hostile["cells"][2], "failed", HOSTILE) | {"traceback": HOSTILE}
    hostile["provenance"]["hardware"] = hostile["command"] = hostile["config"]["output"] = HOSTILE
    page = write(hostile, tmp_path, {**COST, "notes": [HOSTILE]})
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) > 30


@pytest.mark.usefixtures("plain")
def test_three_hundred_cells_stay_a_small_file(small_comparison, tmp_path):
    config = {f"field_{i}": "a value of some twenty letters" for i in range(100)}
    for seed in range(3, 303):
        small_comparison["cells"].append({**cell("HLoRA", "piqa", seed, 9.0), "config": config})
    write(small_comparison, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000  # the figures are about 1.5 MB


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("part", ["provenance", "config", "command"])
def test_report_renders_without_what_is_not_measured(small_comparison, tmp_path, part):
    del small_comparison[part]
    for each in small_comparison["cells"]:
        each.update(history=[], importance=None, seconds={})
        each["test"]["domain"].pop("acc")
    assert "hlora comparison" in write(small_comparison, tmp_path).text
