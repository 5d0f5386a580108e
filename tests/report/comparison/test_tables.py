"""The tables: right numbers and honest gaps."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from test_statistics import cell, comparison_of, not_done
from test_table_formats import assert_compiles

from hlora.report.comparison.measures import t_tests
from hlora.report.comparison.published import PAPER
from hlora.report.comparison.rise_table import rise_table
from hlora.report.comparison.significance import holm
from hlora.report.comparison.table_formats import Table, TableCell
from hlora.report.comparison.tables import (
    all_tables,
    equal_domain_table,
    forgetting_table,
    t_test_table,
    table_1,
    table_2,
)

REASON = "CorDA needs a linear layer with a bias-free weight, but transformer.h.0 is a Conv1D & 100 % of them are"
OURS = {"general": (2.95, 2.94, 2.96), "acc": (0.640, 0.650, 0.645)}
RIVAL = {"general": (3.05, 3.06, 3.04), "acc": (0.630, 0.655, 0.660)}


@pytest.fixture
def comparison() -> dict[str, Any]:
    """Seven arms on two tasks by three seeds: CorDA cannot run, EWC-LoRA failed once, HLoRA has three strengths."""
    cells = []
    for task in ("piqa", "medmcqa"):
        cells.append(cell("Base", task, None, general=3.3, domain=90.0, acc=0.57))
        for seed in range(3):
            off = (-0.01, 0.0, 0.01)[seed]
            cells.append(cell("LoRA(μ)", task, seed, None, 3.35 + off, 70.0, 0.655))
            cells.append(cell("LoRA(ν+μ)", task, seed, None, 3.1 + off, 70.5, 0.640))
            for strength in (1.0, 9.0):
                cells.append(cell("EWC-LoRA", task, seed, strength, RIVAL["general"][seed], 71.0, RIVAL["acc"][seed]))
            cells.append(not_done("CorDA", task, seed, "cannot", REASON))
            cells.append(cell("HLoRA w/o layer weights", task, seed, 9.0, 2.98 + off, 71.5, 0.60))
            for strength, more in ((1.0, 0.1), (9.0, 0.0), (30.0, -0.05)):
                if seed == 0 or strength == 9.0:
                    general = OURS["general"][seed] + more
                    ours = cell("HLoRA", task, seed, strength, general, 72.0 - 10 * more, OURS["acc"][seed])
                    cells.append({**ours, "importance": {"bytes": 230_000}, "peak_memory_bytes": 2**31})
    cells = [c for c in cells if (c["arm"], c["task"], c["seed"]) != ("EWC-LoRA", "medmcqa", 2)]
    cells += [not_done("EWC-LoRA", "medmcqa", 2, "failed", "out of\nmemory", strength=s) for s in (1.0, 9.0)]
    arms = ("EWC-LoRA", "HLoRA w/o layer weights", "HLoRA")
    found = comparison_of(cells, {arm: {"piqa": 9.0, "medmcqa": 9.0} for arm in arms})
    found["ablation"] = ["LoRA(ν+μ)", "HLoRA w/o layer weights", "HLoRA"]
    return found


def row(table: Table, *labels: str) -> dict[str, TableCell]:
    """Heading → cell of the row so labelled."""
    found = next(cells for cells in table.rows if [cell.text for cell in cells[: len(labels)]] == list(labels))
    return dict(zip(table.columns, found, strict=True))


def looks(table: Table, column: str) -> dict[str, str]:
    place = table.columns.index(column)
    return {cells[0].text: cells[place].rank for cells in table.rows if cells[place].rank}


def test_table_1_has_the_mean_and_deviation_of_the_chosen_strength(comparison):
    table = table_1(comparison, "wikitext")
    ours = row(table, "HLoRA")
    perplexity = [math.exp(nll) for nll in OURS["general"]]  # 19.106, 18.916, 19.298: mean 19.107, deviation 0.191
    assert sum(perplexity) / 3 == pytest.approx(19.107, abs=1e-3)
    assert ours["piqa PPL"].text == "19.11 ± 0.19"
    assert ours["piqa Acc %"].text == "64.5 ± 0.5"
    assert row(table_1(comparison, "other"), "HLoRA")["piqa PPL"].text == "31.50 ± 0.32"
    assert table.columns == ["Method", "piqa PPL", "piqa Acc %", "medmcqa PPL", "medmcqa Acc %"]
    assert [cells[0].text for cells in table.rows] == comparison["arms"]


def test_one_value_is_shown_without_a_deviation(comparison):
    base = row(table_1(comparison, "wikitext"), "Base")
    assert (base["piqa PPL"].text, base["piqa Acc %"].text) == (f"{math.exp(3.3):.2f}", "57.0")


def test_best_and_second_are_tuned_methods_by_low_perplexity_and_high_accuracy(comparison):
    for each in comparison["cells"]:
        if each["arm"] == "Base":  # would win both
            each["test"]["texts"]["wikitext"]["perplexity"] = 1.0
            each["test"]["domain"]["acc"] = 1.0
    table = table_1(comparison, "wikitext")
    assert looks(table, "piqa PPL") == {"HLoRA": "best", "HLoRA w/o layer weights": "second"}
    assert looks(table, "piqa Acc %") == {"LoRA(μ)": "best", "EWC-LoRA": "second"}


def test_values_printed_alike_share_their_place(comparison):
    for each in comparison["cells"]:
        if each["status"] == "done" and each["arm"] in ("LoRA(μ)", "LoRA(ν+μ)"):
            each["test"]["domain"]["acc"] = 0.7 + (each["arm"] == "LoRA(μ)") * 1e-6
    assert looks(table_1(comparison, "wikitext"), "piqa Acc %") == {
        "LoRA(μ)": "best",
        "LoRA(ν+μ)": "best",
        "EWC-LoRA": "second",
    }


def test_what_cannot_run_says_why_in_short_and_below_in_full(comparison):
    table = table_1(comparison, "wikitext")
    corda = row(table, "CorDA")
    assert corda["piqa PPL"].text == "cannot run: CorDA needs a linear layer with a…"
    assert corda["piqa Acc %"].text == "–"
    assert f"CorDA, piqa, medmcqa: cannot run: {REASON}" in table.notes


def test_a_mean_over_fewer_seeds_says_so(comparison):
    table = table_1(comparison, "wikitext")
    assert row(table, "EWC-LoRA")["medmcqa PPL"].text == "21.22 ± 0.15"  # exp(3.05) = 21.115, exp(3.06) = 21.328
    assert "EWC-LoRA, medmcqa seed 2: failed: out of memory" in table.notes


@pytest.mark.parametrize(
    ("status", "chosen", "text"), [("failed", 9.0, "failed"), ("missing", 9.0, "–"), ("failed", None, "failed")]
)
def test_an_arm_without_results_says_failed_or_nothing(comparison, status, chosen, text):
    comparison["chosen"]["EWC-LoRA"]["piqa"] = chosen
    for each in comparison["cells"]:
        if (each["arm"], each["task"]) == ("EWC-LoRA", "piqa"):
            each |= {"status": status, "test": None, "error": None}
    assert row(table_1(comparison, "wikitext"), "EWC-LoRA")["piqa PPL"].text == text


def test_accuracy_that_was_not_measured_is_a_dash_and_does_not_rank(comparison):
    for each in comparison["cells"]:
        if each["test"]:
            del each["test"]["domain"]["acc"]
    table = table_1(comparison, "wikitext")
    assert {cells[2].text for cells in table.rows} == {"–"}
    assert looks(table, "piqa Acc %") == {}


def test_a_diverged_seed_is_not_averaged_away_nor_ranked(comparison):
    diverged = next(c for c in comparison["cells"] if c["arm"] == "HLoRA" and c["strength"] == 9.0)
    diverged["test"]["texts"]["wikitext"]["perplexity"] = math.inf
    table = table_1(comparison, "wikitext")
    assert row(table, "HLoRA")["piqa PPL"] == TableCell("∞")
    assert looks(table, "piqa PPL")["HLoRA w/o layer weights"] == "best"


@pytest.mark.parametrize(
    "model", ["meta-llama/Llama-3.2-3B", "/models/llama-3.2-3b/", "hub/models--meta--Llama-3.2-3B/1"]
)
def test_the_papers_numbers_stand_beside_ours_on_its_models_and_tasks(comparison, model):
    comparison["model"] = model
    comparison["tasks"] = ["piqa", "qasc"]
    table = table_1(comparison, "wikitext")
    ours = row(table, "HLoRA")
    assert (ours["piqa PPL, paper"].text, ours["piqa Acc %, paper"].text) == ("4.90", "51.14")
    assert row(table, "CorDA")["piqa PPL, paper"].text == "–"
    assert [column for column in table.columns if "qasc" in column] == ["qasc PPL", "qasc Acc %"]


@pytest.mark.parametrize("model", ["smollm2-135m", "meta-llama/Llama-3.2-3B-Instruct", "my-gpt-j-6b.v2"])
def test_another_model_has_no_numbers_of_the_paper(comparison, model):
    comparison["model"] = model
    assert not [column for column in table_1(comparison, "wikitext").columns if "paper" in column]


def test_table_2_is_the_ablation_with_the_papers_numbers(comparison):
    comparison["model"] = "EleutherAI/gpt-j-6b"
    table = table_2(comparison, "wikitext")
    assert [cells[0].text for cells in table.rows] == comparison["ablation"]
    without = row(table, "HLoRA w/o layer weights")
    assert without["medmcqa PPL, paper"].text == "3.35"
    assert without["piqa Acc %"].text == "60.0 ± 0.0"
    assert not any("CorDA" in note for note in table.notes)


def test_the_papers_data_is_complete_and_reads_as_in_the_paper():
    for arms in PAPER.values():
        assert len(arms) == 7
        assert all(set(numbers) == {"sciq", "piqa", "medmcqa"} for numbers in arms.values())
        best = min(numbers["sciq"][0] for arm, numbers in arms.items() if arm != "Base" and "w/o" not in arm)
        assert best == arms["HLoRA"]["sciq"][0]


def test_forgetting_table_has_loss_cost_and_strength(comparison):
    table = forgetting_table(comparison)
    ours = {heading: cell.text for heading, cell in row(table, "piqa", "HLoRA").items()}
    assert ours == {
        "Task": "piqa",
        "Method": "HLoRA",
        "Strength": "9",
        "Forgetting, nats/token wikitext": "−0.350 ± 0.010",
        "Forgetting, nats/token other": "−0.350 ± 0.010",
        "Answer NLL, nats": "72.00 ± 0.00",
        "Acc %": "64.5 ± 0.5",
        "Train s": "60",
        "Peak GB": "2.15",
        "Importance MB": "0.23",
    }
    base = row(table, "piqa", "Base")
    assert base["Forgetting, nats/token wikitext"] == TableCell("0.000")
    assert base["Importance MB"].text == base["Strength"].text == "–"
    corda = row(table, "piqa", "CorDA")
    assert corda["Forgetting, nats/token wikitext"].text.startswith("cannot run")
    assert corda["Forgetting, nats/token other"].text == "–"
    assert len(table.rows) == 14


def test_forgetting_table_has_the_drift_from_the_base_model_where_cells_measured_it(comparison):
    for each in comparison["cells"]:
        if each["arm"] == "HLoRA" and each["status"] == "done":
            each["test"]["texts"]["wikitext"]["kl_from_base"] = 0.0123
    table = forgetting_table(comparison)
    heading = "Drift from the base model, nats/token wikitext"
    assert row(table, "piqa", "HLoRA")[heading].text == "0.0123 ± 0.0000"
    assert row(table, "piqa", "Base")[heading].text == "–"
    assert "Drift from the base model, nats/token other" not in row(table, "piqa", "HLoRA")


def test_equal_domain_table_states_its_target_and_reads_curves_there(comparison):
    table = equal_domain_table(comparison, resamples=200)
    assert "piqa 72.00; medmcqa 72.00" in table.title  # 90 − 0.9 (90 − 70)
    found = row(table, "HLoRA")["piqa, wikitext PPL [95 %]"]
    value, low, high = map(float, re.findall(r"[\d.]+", found.text))
    assert value == pytest.approx(math.exp(2.95), abs=0.006)
    assert low < value < high
    assert found.rank == "best"
    rival = row(table, "EWC-LoRA")["piqa, wikitext % above HLoRA [95 %]"].text
    assert rival.startswith("+10.5 [+")  # exp(0.10) − 1, rival's mean NLL 3.05 against 2.95
    assert row(table, "HLoRA")["piqa, wikitext % above HLoRA [95 %]"].text == "–"
    assert "Base" not in [cells[0].text for cells in table.rows]
    assert any("HLoRA on piqa (1)" in note for note in table.notes)


def test_drift_at_equal_domain_nll_is_of_the_arms_that_have_it(comparison):
    drift = {"HLoRA w/o layer weights": 0.025, "HLoRA": 0.01}
    for each in comparison["cells"]:
        if each["arm"] in drift and each["test"]:
            for text in each["test"]["texts"].values():
                text |= {"kl_from_general": drift[each["arm"]], "kl_from_general_each": [drift[each["arm"]]] * 8}
    table = equal_domain_table(comparison, resamples=50, quantity="kl_from_general")
    assert table.title.startswith("Drift from the end of the general phase, nats/token, at equal domain NLL")
    assert [cells[0].text for cells in table.rows] == list(drift)
    found = row(table, "HLoRA w/o layer weights")
    assert found["piqa, wikitext drift [95 %]"].text.startswith("0.0250 [")
    assert found["piqa, wikitext % above HLoRA [95 %]"].text.startswith("+150.0 [+150.0")
    assert [each.name for each in all_tables(comparison)].count("equal_domain_kl_from_general") == 1


def test_rise_table_compares_each_arm_with_base_and_with_ours(comparison):
    table = rise_table(comparison, resamples=200)
    assert len(table.rows) == 2 * 2 * 6  # tasks, texts, arms but for Base
    ours, rival = (row(table, "piqa", "wikitext", arm) for arm in ("HLoRA", "EWC-LoRA"))
    assert ours["Over Base [95 %]"].text.startswith("−0.3500 [−")  # 2.95 − 3.3, seed 0 alone has every strength
    assert rival["Above HLoRA [95 %]"].text.startswith("+0.1000 [")  # 3.05 of seed 0
    assert {ours[column].text for column in table.columns[5:]} == {"–"}
    ps = [cells[place].text for cells in table.rows for place in (4, 6)]
    assert "<0.001" in ps
    assert (ours["p over Base, Holm"].text, ours["p over Base, Holm"].rank) == ("<0.001", "best")
    assert any("HLoRA on piqa (1)" in note for note in table.notes)
    corda = [cell.text for cell in row(table, "piqa", "wikitext", "CorDA").values()]
    assert corda[3].startswith("cannot run")
    assert corda[4:] == ["–"] * 3


def test_equal_domain_table_without_any_improvement_has_no_numbers(comparison):
    for each in comparison["cells"]:
        if each["arm"] == "LoRA(μ)":
            each["test"]["domain"]["answer_nll"] = 95.0
    table = equal_domain_table(comparison, resamples=50)
    assert "piqa none: no improvement measured" in table.title
    assert row(table, "HLoRA")["piqa, wikitext PPL [95 %]"] == TableCell("–")


def test_where_our_arm_misses_the_domain_nll_the_difference_says_so_in_place_of_an_interval(comparison):
    for each in comparison["cells"]:
        if each["arm"] == "HLoRA" and each["task"] == "piqa":  # learns other rows than LoRA(μ) does
            each["test"]["domain"]["answer_nll_each"].reverse()
    table = equal_domain_table(comparison, resamples=400)
    for arm in ("LoRA(μ)", "HLoRA w/o layer weights"):
        found = row(table, arm)["piqa, wikitext % above HLoRA [95 %]"].text
        assert re.fullmatch(r"\+[\d.]+, HLoRA misses in \d+ %", found)
        assert row(table, arm)["medmcqa, wikitext % above HLoRA [95 %]"].text.endswith("]")
    assert "HLoRA misses in n %: in n % of the resamples HLoRA itself does not reach it" in table.notes[0]
    assert "−100" not in table.markdown() and "−∞" not in table.markdown()


def test_t_tests_are_corrected_over_all_panels(comparison):
    table = t_test_table(comparison)
    assert [(cells[0].text, cells[1].text) for cells in table.rows] == [
        (task, measure) for task in ("piqa", "medmcqa") for measure in ("PPL wikitext", "PPL other", "accuracy %")
    ]
    perplexity, *_, accuracy = (test.welch for test in t_tests(comparison)[:3])
    found = row(table, "piqa", "accuracy %")
    assert found["p"].text == f"{accuracy.p:.3f}"
    assert found["Difference [95 %]"].text == (
        f"{accuracy.difference:+.1f} [{accuracy.low:+.1f}, {accuracy.high:+.1f}]".replace("-", "−")
    )
    assert found["Hedges' g"].text == f"{accuracy.hedges_g:.2f}".replace("-", "−")
    assert (found["HLoRA"].text, found["EWC-LoRA"].text) == ("64.5 ± 0.5", "64.8 ± 1.6")
    assert found["p, Holm"].rank == ""
    ps = [float(cells[table.columns.index("p")].text.replace("<", "")) for cells in table.rows]
    shown = [float(cells[table.columns.index("p, Holm")].text.replace("<", "")) for cells in table.rows]
    assert shown == pytest.approx(holm(ps), abs=0.006)
    assert perplexity.p < 0.01
    assert row(table, "piqa", "PPL wikitext")["p, Holm"].rank == "best"


def test_t_test_of_one_seed_has_means_and_no_p(comparison):
    comparison["cells"] = [each for each in comparison["cells"] if each["seed"] in (0, None)]
    comparison["seeds"] = [0]
    found = row(t_test_table(comparison), "piqa", "PPL wikitext")
    assert (found["HLoRA"].text, found["EWC-LoRA"].text) == ("19.11", "21.12")
    assert found["Difference [95 %]"].text == "−2.01"
    assert {found[column].text for column in ("t", "df", "p", "p, Holm", "Hedges' g")} == {"–"}


def test_every_table_of_a_comparison_holds_in_every_form(comparison):
    comparison["model"] = "meta-llama/Llama-3.2-3B"
    made = all_tables(comparison)
    assert [table.name for table in made] == [
        "table_1_wikitext", "table_1_other", "table_2_wikitext", "table_2_other", "forgetting", "equal_domain",
        "equal_domain_rise", "t_test",
    ]  # fmt: skip
    for table in made:
        assert {len(cells) for cells in table.rows} == {len(table.columns)}
        assert len(set(table.columns)) == len(table.columns)
        assert_compiles(table.latex(), len(table.columns))
        root = ElementTree.fromstring(table.html())
        assert {len(tr) for tr in root.findall("tbody/tr")} == {len(table.columns)}


def test_texts_whose_names_make_one_file_name_keep_their_own_tables(comparison):
    for each in comparison["cells"]:
        if each["test"]:
            each["test"]["texts"] = {"a/b": each["test"]["texts"]["wikitext"], "a b": each["test"]["texts"]["other"]}
    comparison["texts"] = ["a/b", "a b"]
    names = [table.name for table in all_tables(comparison)]
    assert names[:4] == ["table_1_a-b", "table_1_a-b-2", "table_2_a-b", "table_2_a-b-2"]


def test_a_comparison_without_any_result_still_has_its_tables(comparison):
    for each in comparison["cells"]:
        each |= {"status": "missing", "test": None, "error": None, "importance": None, "seconds": {}}
    for table in all_tables(comparison):
        assert {len(cells) for cells in table.rows} == {len(table.columns)}
        assert not any(cell.rank for cells in table.rows for cell in cells)


def test_tables_of_arms_that_are_not_configured_are_left_out(comparison):
    comparison |= {"rival": "", "unprotected": "", "ablation": []}
    assert [table.name for table in all_tables(comparison)] == ["table_1_wikitext", "table_1_other", "forgetting"]
