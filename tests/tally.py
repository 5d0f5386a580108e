"""One table of all that tests/faults tried, at the end of the run; in conftest.py, which each process reads first."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.table import Table


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """tally(what, cases=…, good=…, bad=…): a row of the table. Seconds are those since the test's last row."""
    last = time.perf_counter()

    def add(what: str, cases: int, good: int, bad: int) -> None:
        nonlocal last
        now = time.perf_counter()
        # Properties of a test's report come from the process that ran it to the one that prints.
        request.node.user_properties.append(("tally", (what, cases, good, bad, now - last)))
        last = now

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for found in terminalreporter.stats.values() for r in found if getattr(r, "when", None) == "call"]
    rows = [value for report in reports for name, value in report.user_properties if name == "tally"]
    if not rows:
        return
    table = Table("what", title="tests/faults", title_justify="left")
    for heading in ("cases", "as expected", "differences, tracebacks", "seconds"):
        table.add_column(heading, justify="right")
    for what, *counts, seconds in rows:
        table.add_row(what, *map(str, counts), f"{seconds:.1f}")
    shown = io.StringIO()
    Console(file=shown, width=100).print(table)
    terminalreporter.write_line("")
    terminalreporter.write(shown.getvalue())
