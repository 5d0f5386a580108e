"""Pages of docs/results say what the cells beside them say."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from conftest import REPOSITORY

from hlora.config.reading import load_comparison

RESULTS = REPOSITORY / "docs" / "results"


@pytest.mark.parametrize(
    ("name", "task", "seeds"),
    [
        ("compare-importance-smollm2", "qasc", [0]),
        ("compare-importance-smollm2", "qasc", [0, 1, 2]),
        ("compare-importance-accuracy", "piqa", [0]),
        ("compare-importance-accuracy", "piqa", [0, 1, 2]),
        ("compare-importance-accuracy", "medmcqa", [0]),
        ("compare-importance-accuracy", "medmcqa", [0, 1, 2]),
    ],
)
def test_every_cell_is_in_the_page_as_it_was_measured(
    name: str, task: str, seeds: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    found = spec_from_file_location("equal_learning", REPOSITORY / "benchmarks" / "equal_learning.py")
    assert found and found.loader
    script = module_from_spec(found)
    found.loader.exec_module(script)
    config = load_comparison(REPOSITORY / "configs" / f"{name}.yaml", [])
    script.every_strength(script.read(config, RESULTS / name / "cells", task, seeds))
    rows = re.findall(r"^\|.*", capsys.readouterr().out, re.MULTILINE)[2:]
    page = (RESULTS / name / "README.md").read_text(encoding="utf-8")
    assert len(rows) > 10
    assert [row for row in rows if row not in page] == []
