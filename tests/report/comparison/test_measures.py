"""What arms are compared by."""

from __future__ import annotations

from made_comparison import SMALL, make_comparison

from hlora.report.comparison.measures import t_tests
from hlora.report.comparison.significance import holm, welch
from hlora.report.comparison.tables import t_test_table


def test_t_tests_are_those_of_the_table():
    comparison = make_comparison(SMALL, ["piqa", "qasc"])
    table = t_test_table(comparison)
    place = table.columns.index("p, Holm")
    shown = [row[place].text for row in table.rows]
    tests = t_tests(comparison)
    assert [("<0.001" if test.p_holm < 0.001 else f"{test.p_holm:.3f}") for test in tests] == shown
    assert [test.p_holm for test in tests] == holm([welch(test.ours, test.theirs).p for test in tests])
    assert len(tests) == 6
