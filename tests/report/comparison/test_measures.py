"""What arms are compared by."""

from __future__ import annotations

import numpy as np
import pytest
from made_comparison import SMALL, make_comparison

from hlora.report.comparison.cells import cells_of
from hlora.report.comparison.measures import measures, sample_of, t_tests
from hlora.report.comparison.significance import holm, welch
from hlora.report.comparison.tables import t_test_table


def test_the_table_shows_the_tests_that_the_figure_shows():
    comparison = make_comparison(SMALL, ["piqa", "qasc"])
    table = t_test_table(comparison)
    place = table.columns.index("p, Holm")
    shown = [row[place].text for row in table.rows]
    tests = t_tests(comparison)
    assert [("<0.001" if test.p_holm < 0.001 else f"{test.p_holm:.3f}") for test in tests] == shown
    assert [test.p_holm for test in tests] == holm([test.welch.p for test in tests])
    assert len(tests) == 6


def test_a_sample_has_the_values_over_seeds_and_the_questions_means():
    comparison = make_comparison(SMALL, ["piqa"])
    perplexity, *_, accuracy = measures(comparison)
    cells = [cell["test"] for cell in cells_of(comparison, "HLoRA", "piqa")]
    found = sample_of(comparison, "HLoRA", "piqa", accuracy)
    assert found.seeds == [100 * cell["domain"]["acc"] for cell in cells] and found.share == 100
    np.testing.assert_allclose(found.parts, 100 * np.mean([cell["domain"]["acc_each"] for cell in cells], axis=0))
    # A perplexity moves with the loss of a block by itself times that loss, to first order.
    found = sample_of(comparison, "HLoRA", "piqa", perplexity)
    text = [cell["texts"]["wikitext"] for cell in cells]
    expected = np.mean([np.multiply(each["perplexity"], each["nll_each"]) for each in text], axis=0)
    np.testing.assert_allclose(found.parts, expected)
    assert sample_of(comparison, "Base", "piqa", accuracy).seedless


def test_cells_scored_on_different_questions_are_not_tested():
    comparison = make_comparison(SMALL, ["piqa"])
    *_, accuracy = measures(comparison)
    cells_of(comparison, "HLoRA", "piqa")[0]["test"]["domain"]["acc_each"].pop()
    ours, theirs = (sample_of(comparison, arm, "piqa", accuracy) for arm in ("HLoRA", "EWC-LoRA"))
    assert ours.parts is None
    assert welch(ours, theirs).p == pytest.approx(float("nan"), nan_ok=True)
