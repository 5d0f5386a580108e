"""One table of all that tests/faults tried, at the end of the run."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.table import Table

_ROWS: list[tuple[str, int, int, int, float]] = []


@pytest.fixture
def tally() -> Callable[..., None]:
    """tally(what, cases=…, good=…, bad=…): a row of the table. Seconds are those since the test's last row."""
    last = time.perf_counter()

    def add(what: str, cases: int, good: int, bad: int) -> None:
        nonlocal last
        now = time.perf_counter()
        _ROWS.append((what, cases, good, bad, now - last))
        last = now

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _ROWS:
        return
    table = Table("what", title="tests/faults", title_justify="left")
    for heading in ("cases", "as expected", "differences, tracebacks", "seconds"):
        table.add_column(heading, justify="right")
    for what, *counts, seconds in _ROWS:
        table.add_row(what, *map(str, counts), f"{seconds:.1f}")
    shown = io.StringIO()
    Console(file=shown, width=100).print(table)
    terminalreporter.write_line("")
    terminalreporter.write(shown.getvalue())
