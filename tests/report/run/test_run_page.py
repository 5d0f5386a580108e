"""The report: an honest verdict, one safe file, and every part optional."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_results import HOSTILE, Page, evaluation, results
from rich.console import Console

from hlora.evaluation.evaluate import add_forgetting
from hlora.report.drawing import Drawing
from hlora.report.run.page import write_report
from hlora.report.run.summary import summary_rows, summary_table
from hlora.report.run.verdict import verdict


@pytest.fixture
def full() -> dict[str, Any]:
    entries = [{"step": i, "loss": 3.0} for i in range(1, 5)]
    protected = [
        {**e, "regularisation_loss": 0.1, "weighted_regularisation_loss": 0.9, "total_loss": 3.9} for e in entries
    ]
    norms = {f"model.layers.{i}.self_attn.q_proj": 0.5 + i for i in range(2)}
    return {
        **results(
            after_general=evaluation(2.8),
            hlora=evaluation(2.9, answer_nll=4.0, acc=0.3),
            lora=evaluation(3.4, answer_nll=3.9, acc=0.31),
            **{HOSTILE: evaluation(3.0)},
        ),
        "seconds": {"record": 141.2, "tune": 7.0},
        "history": {"record": entries, "tune": protected, HOSTILE: entries},
        "importance": {
            "encoding": "factored",
            "bytes": 230400,
            "layer_norms": {**norms, HOSTILE: 1.0},
            "layer_weights": {**dict.fromkeys(norms, 0.3), HOSTILE: 0.4},
            "undo_cost": 0.01,
            "xi": 1e-3,
            "steps": 100,
            "skipped_steps": 0,
            "clamped_share": 0.004,
        },
        "provenance": {
            "versions": {"torch": "2.13.0"},
            "seed": 0,
            "hardware": HOSTILE,
            "data": {
                "domain": {
                    "sha256": "60303ae2",
                    "unusable": {
                        f"{HOSTILE}.jsonl": {
                            "rows": 2,
                            "of": 300,
                            "reasons": {"wrong label": 1, HOSTILE: 1},
                            "first": {"row 17": "wrong label: 7", "row 18": HOSTILE},
                        }
                    },
                }
            },
        },
        "config": {"output": HOSTILE, "model": {"name": '"><img src=x onerror=alert(1)>', "dtype": None}},
        "command": f"hlora run '{HOSTILE}'",
    }


def write(content: dict[str, Any], directory: Path) -> Page:
    write_report(content, directory / "report.html")
    return Page(directory / "report.html")


def test_verdict_says_forgotten_when_the_loss_rose_beyond_noise():
    found = verdict(results(hlora=evaluation(3.1, answer_nll=4.0)))
    assert found.kept_state == "forgotten"
    assert found.tone == "bad"
    assert found.headline == "Forgot some of what it knew. Learned a fair amount."
    assert found.kept == "General text got harder to predict: perplexity on wiki 20.1 → 22.2 (+11 %)."


def test_verdict_says_kept_when_the_rise_is_within_noise_and_names_the_noise():
    found = verdict(results(hlora=evaluation(3.02, answer_nll=4.0, acc=0.3)))
    assert found.kept_state == "kept"
    assert found.tone == "good"
    assert found.kept == (
        "General text got no harder to predict: perplexity on wiki 20.1 → 20.5 (+2.0 %, within the noise of ±2.9 %)."
    )
    assert found.learned == "75 of 250 questions right, before 50; answer NLL 5.00 → 4.00."


def test_a_rise_within_unpaired_noise_is_forgetting_when_the_same_tokens_show_it():
    content = results(hlora=evaluation(3.02))
    content["arms"]["base"]["texts"]["wiki"]["nll_each"] = [2.0, 3.0, 4.0]
    content["arms"]["hlora"]["texts"]["wiki"]["nll_each"] = [2.02, 3.021, 4.019]
    assert verdict(content).kept_state == "forgotten"


def test_verdict_says_learned_nothing_when_the_domain_did_not_improve():
    found = verdict(results(hlora=evaluation(2.5, answer_nll=4.9, acc=0.21)))
    assert found.learned_state == "nothing"
    assert found.headline == "Kept what it knew. Learned next to nothing."
    assert found.learned == (
        "52 of 250 questions right, before 50 (within noise); answer NLL 5.00 → 4.90 (within noise)."
    )


@pytest.mark.parametrize(
    ("answer_nll", "headline"),
    [(4.95, "next to nothing"), (4.8, "a little"), (4.0, "a fair amount"), (1.0, "a lot"), (5.2, "")],
)
def test_what_was_learned_is_sized_and_too_little_is_not_called_learning(answer_nll: float, headline: str):
    content = results(hlora=evaluation(3.0, answer_nll=answer_nll, acc=None))
    for arm in content["arms"].values():
        arm["domain"] |= {"answer_nll_stderr": 0.001}
        arm["domain"].pop("acc", None)
    found = verdict(content)
    assert found.headline.endswith(f"Learned {headline}." if headline else "Got worse at the domain.")
    assert (found.learned_state == "learned") == (headline not in ("", "next to nothing"))


@pytest.mark.parametrize(("rise", "words", "tone"), [(0.009, "held", "good"), (0.013, "was exceeded", "mixed")])
def test_whether_a_budget_held_is_in_the_headline(rise: float, words: str, tone: str):
    content = results(hlora=evaluation(3.0, answer_nll=4.0))
    content["history"] = {"tune": [{"step": 1, "loss": 3.0}, {"step": 1, "probe_rise": rise, "budget": 0.00995}]}
    found = verdict(content)
    assert found.headline == f"Kept what it knew. The budget of 1.0 % {words}. Learned a fair amount."
    assert found.kept.endswith(f"The budget allowed +1.0 % on its probe; the probe measured +{100 * rise:.1f} %.")
    assert found.tone == tone


def test_what_evaluations_probed_while_training_is_not_taken_for_a_budget():
    watched = {"step": 2, "eval_loss": 2.0, "probe_step": 2, "probe_rise": 0.05, "probe_stderr": 0.01}
    content = results(hlora=evaluation(3.0, answer_nll=4.0))
    content["history"] = {"tune": [{"step": 1, "loss": 3.0}, watched], "lora": [watched]}
    found = verdict(content)
    assert found.headline == "Kept what it knew. Learned a fair amount." and "budget" not in found.kept
    content["history"]["tune"].append({"step": 2, "probe_rise": 0.009, "budget": 0.00995})
    assert "The budget of 1.0 % held." in verdict(content).headline


def test_text_of_the_general_phases_kind_alone_is_cautioned_against(tmp_path):
    content = results(hlora=evaluation(2.9, answer_nll=4.0))
    assert verdict(content).cautions == ()
    for arm in content["arms"].values():
        arm["texts"] = {"general (held out)": arm["texts"]["wiki"]}
        arm.pop("forgetting", None)
    assert "Caution. Only held-out text of the general phase's own kind" in write(content, tmp_path).text


def test_a_page_says_what_it_is_of_in_its_title_and_at_its_top(tmp_path):
    content = results(hlora=evaluation(2.9))
    content["config"] = {
        "model": {"name": "smollm2-135m"},
        "domain": {"task": "piqa", "train": "data/train.jsonl"},
        "general": {"paths": ["general.txt"]},
    }
    content["provenance"] = {"finished": "2026-11-28T21:00:00+0000"}
    page = write(content, tmp_path)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>hlora report: smollm2-135m, piqa, data/train.jsonl, 2026-11-28</title>" in source
    top = page.text[: page.text.index("Kept what it knew")]
    assert all(fact in top for fact in ("smollm2-135m", "piqa, data/train.jsonl", "general.txt", "2026-11-28"))


def test_an_empty_answer_is_shown_as_nothing(tmp_path):
    content = results(hlora=evaluation(2.9))
    content["arms"]["hlora"]["samples"][0]["answer"] = " "
    assert "(nothing)" in write(content, tmp_path).text


def test_verdict_says_worse_and_mixed_when_so():
    assert verdict(results(hlora=evaluation(3.0, answer_nll=6.0))).learned_state == "worse"
    assert verdict(results(hlora=evaluation(3.0, answer_nll=4.0, acc=0.1))).learned_state == "mixed"


def test_verdict_names_each_text_that_was_forgotten_beside_those_kept():
    content = results(hlora=evaluation(2.5, answer_nll=4.0))
    for arm, nll in (("base", 2.0), ("hlora", 2.2)):
        content["arms"][arm]["texts"]["novels"] = evaluation(nll)["texts"]["wiki"]
    add_forgetting(content["arms"]["hlora"], content["arms"]["base"])
    found = verdict(content)
    assert found.kept_state == "forgotten in part"
    assert found.kept == (
        "Some general text got harder to predict: perplexity on novels 7.39 → 9.03 (+22 %). "
        "No harder: wiki 20.1 → 12.2 (−39 %). "
        "Worst text: novels, +22 %; mean of all: −14 %."
    )
    measured = {row.measure: row.after for row in summary_rows(content)}
    assert measured["forgetting, worst text: novels"] == "+0.200" and measured["forgetting, mean of texts"] == "−0.150"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_verdict_counts_a_loss_that_is_not_finite_as_lost(broken):
    found = verdict(results(hlora=evaluation(broken, answer_nll=broken, acc=None)))
    assert (found.kept_state, found.learned_state, found.tone) == ("forgotten", "worse", "bad")
    assert "no longer finite" in found.kept


def test_verdict_without_standard_errors_says_that_the_noise_is_unknown():
    content = results(hlora=evaluation(3.1))
    for arm in content["arms"].values():
        del arm["texts"]["wiki"]["nll_stderr"]
    found = verdict(content)
    assert found.kept_state == "forgotten"
    assert "noise unknown" in found.kept


def test_verdict_tells_of_the_baselines_on_the_same_data():
    found = verdict(results(hlora=evaluation(2.9, answer_nll=4.0), lora=evaluation(3.4, answer_nll=3.9)))
    (line,) = found.beside
    assert line.startswith("LoRA (domain only), on the same data. General text got harder to predict: perplexity")


def test_where_a_later_domain_starts_is_a_column_of_the_summary_and_no_rival_in_the_verdict():
    content = results(**{"before this domain": evaluation(2.8), "hlora": evaluation(2.9)})
    assert verdict(content).beside == ()
    assert summary_rows(content)[0].before == f"{math.exp(2.8):.1f}"
    assert [str(column.header).replace("\n", " ") for column in summary_table(content).columns][
        2
    ] == "before this domain"


def test_verdict_of_the_base_alone_claims_nothing():
    found = verdict(results())
    assert (found.kept_state, found.learned_state, found.tone) == ("not measured", "not measured", "unknown")
    assert "nothing to compare" in found.headline


def test_summary_rows_give_base_before_after_and_change(full):
    rows = {row.measure: row for row in summary_rows(full)}
    assert rows["perplexity, wiki"][1:] == ("20.1", "16.4", "18.2", "−9.5 %", True)
    assert rows["answer NLL, nats"][1:] == ("5.00", "5.00", "4.00", "−1.00", True)
    assert rows["accuracy, %"][1:] == ("20.0", "20.0", "30.0", "+10.0 points", True)


def test_forgetting_is_the_rise_of_the_loss_with_its_sign_and_paired_noise_everywhere_it_is_summarised(tmp_path):
    content = results(after_general=evaluation(2.8), hlora=evaluation(3.05))
    for arm, each in (("base", [2.9, 3.1]), ("hlora", [2.94, 3.16])):  # differences 0.04 and 0.06: 0.01 standard error
        content["arms"][arm]["texts"]["wiki"]["nll_each"] = each
    (row,) = (row for row in summary_rows(content) if row.measure == "forgetting, wiki")
    assert row[1:] == ("0", "−0.200", "+0.050", "± 0.010 nats", False)
    page = write(content, tmp_path)
    assert "forgetting, wiki" in page.text and "+0.050± 0.010" in page.text and "−0.200± 0.014" in page.text


def test_a_result_from_before_there_was_forgetting_has_no_column_of_it(tmp_path):
    content = results(hlora=evaluation(3.05))
    for arm in content["arms"].values():
        del arm["texts"]["wiki"]["forgetting"]
    assert not [row for row in summary_rows(content) if "forgetting" in row.measure]
    assert "forgetting, wiki" not in write(content, tmp_path).text


def test_the_drift_on_a_text_is_in_summary_and_page_and_has_no_column_where_nobody_measured_it(tmp_path):
    content = results(after_general=evaluation(2.8), hlora=evaluation(3.05))
    assert not [row for row in summary_rows(content) if "drift" in row.measure]
    assert "drift" not in write(content, tmp_path).text
    content["arms"]["after_general"]["texts"]["wiki"]["kl_from_base"] = 0.0213
    content["arms"]["hlora"]["texts"]["wiki"] |= {"kl_from_base": 0.03456, "kl_from_general": 0.0111}
    (row,) = (row for row in summary_rows(content) if "drift" in row.measure)
    assert row == ("drift from base, wiki", "0", "0.0213", "0.0346", "nats", None)
    text = write(content, tmp_path).text
    assert "drift from base, wiki" in text and "0.0346" in text and "0.0111 from the general phase" in text


def test_each_measure_of_the_summary_stands_on_one_line_of_a_terminal_of_80_columns(full):
    for arm in full["arms"].values():
        arm["texts"] = {"general (held out)": {**arm["texts"]["wiki"], "perplexity": 123456.7, "kl_from_base": 0.0123}}
        add_forgetting(arm, full["arms"]["base"])
    console = Console(width=80)
    with console.capture() as capture:
        console.print(summary_table(full))
    lines = capture.get().splitlines()
    for row in summary_rows(full):
        cells = (row.measure, row.base, row.before, row.after, row.change)
        assert any(all(cell in line for cell in cells) for line in lines), row


def test_summary_rows_of_the_base_alone_have_no_change():
    for row in summary_rows(results()):
        assert (row.before, row.after, row.change, row.better) == (None, "–", "", None)


def test_summary_table_prints_names_with_brackets_as_they_are():
    content = results(hlora=evaluation(2.9))
    for arm in content["arms"].values():
        arm["texts"]["[red]x[/nope]"] = arm["texts"]["wiki"]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(summary_table(content))
    assert "perplexity, [red]x[/nope]" in capture.get()


def test_report_is_one_file_without_scripts_or_outside_addresses(full, tmp_path):
    page = write(full, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert page.attributes.count(("role", "img")) == 3
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", (tmp_path / "report.html").read_text(encoding="utf-8"))


def test_report_shows_what_users_and_models_wrote_as_text(full, tmp_path):
    page = write(full, tmp_path)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert "<img" not in source
    # Five sample answers, arm names, a matrix, hardware, a skipped row, configuration, command.
    assert page.text.count(HOSTILE) >= 11


def test_report_has_the_verdict_first_and_the_command_last(full, tmp_path):
    text = write(full, tmp_path).text
    order = [
        "Kept what it knew. Learned a fair amount.",
        "What was forgotten",
        "Numbers",
        "Time and importance",
        "Loss curves",
        "Where the general knowledge is",
        "Layer weights",
        "Sample answers",
        "Provenance",
        "Resolved configuration",
        "Repeat it",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "2 min 21 s" in text
    assert "230 kB" in text
    assert "60303ae2" in text


def test_report_ids_are_unique_on_the_page(full, tmp_path):
    found = [value for name, value in write(full, tmp_path).attributes if name == "id"]
    assert found
    assert len(found) == len(set(found))


@pytest.mark.parametrize("content", [{}, {"arms": {}}, results(), {"arms": {"hlora": evaluation(3.0)}}])
def test_report_renders_with_almost_everything_missing(content, tmp_path):
    page = write(content, tmp_path)
    assert "hlora report" in page.text
    summary_table(content)


@pytest.mark.slow
def test_report_renders_when_any_single_part_is_missing(full, tmp_path, monkeypatch):
    monkeypatch.setattr("hlora.report.run.page.draw", lambda figure: Drawing("<svg></svg>"))  # drawing takes a second
    for part in full:
        write({name: value for name, value in full.items() if name != part}, tmp_path)
    for part in full["importance"]:
        content = copy.deepcopy(full)
        del content["importance"][part]
        write(content, tmp_path)


def test_report_renders_numbers_that_are_not_finite_and_half_surrogates(full, tmp_path):
    full["arms"]["hlora"] = evaluation(math.inf, answer_nll=math.nan, acc=math.nan)
    add_forgetting(full["arms"]["hlora"], full["arms"]["base"])
    full["arms"]["hlora"]["samples"][0]["answer"] = "half \ud83d of a pair"
    full["importance"]["layer_weights"]["model.layers.0.self_attn.q_proj"] = math.nan
    full["importance"]["clamped_share"] = math.nan
    full["seconds"]["tune"] = math.nan
    text = write(full, tmp_path).text
    assert "no longer finite" in text
    assert "half ? of a pair" in text


def test_rows_left_out_are_listed_by_file_with_row_and_reason_and_without_any_there_is_no_section(full, tmp_path):
    page = write(full, tmp_path)
    assert "Rows left out" in page.text and "2 of 300 rows: 1 wrong label" in page.text
    assert "RowReason 17wrong label: 7 18<script>" in page.text
    del full["provenance"]["data"]["domain"]["unusable"]
    assert "Rows left out" not in write(full, tmp_path).text


def test_samples_show_the_answers_of_each_arm_in_one_row(tmp_path):
    content = results(hlora=evaluation(3.0))
    content["arms"]["base"]["samples"] = [{"prompt": "P", "expected": "E", "answer": "before"}]
    content["arms"]["hlora"]["samples"] = [{"prompt": "P", "expected": "E", "answer": "after"}]
    assert "P E before after".replace(" ", "") in write(content, tmp_path).text.replace(" ", "")
