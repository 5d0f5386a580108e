"""What a grid will take, said before it is computed."""

from __future__ import annotations

from pathlib import Path

from hlora.comparison import compare
from hlora.config import CompareConfig
from hlora.planning import plan, plan_table


def test_the_plan_lists_cells_and_computes_none(comparison_config: CompareConfig) -> None:
    rows = plan(comparison_config)
    assert len(rows) == 1 + 2 + 2 + 3 + 3
    assert all(row["status"] == "missing" and row["seconds"] > 0 for row in rows)
    assert not (Path(comparison_config.output) / "cells").exists()
    assert "11 to compute" in str(plan_table(rows).caption)


def test_the_first_cell_that_needs_a_general_phase_pays_for_it(comparison_config: CompareConfig) -> None:
    comparison_config.training.record["max_steps"] = 1000
    times = {(row["arm"], row["seed"], row["strength"]): row["seconds"] for row in plan(comparison_config)}
    assert times["LoRA(ν+μ)", 0, None] > 10 * times["LoRA(μ)", 0, None]
    assert times["HLoRA", 0, 1] < 2 * times["LoRA(μ)", 0, None]


def test_finished_cells_say_what_the_rest_will_take(comparison_config: CompareConfig, monkeypatch) -> None:
    monkeypatch.setattr("hlora.comparison.write_report", lambda *arguments: None)
    comparison_config.arms = {name: comparison_config.arms[name] for name in ("Base", "LoRA(μ)")}
    cells = compare(comparison_config)["cells"]
    comparison_config.seeds = [0, 1, 2]
    rows = {(row["arm"], row["seed"]): row for row in plan(comparison_config)}
    past = [sum(cell["seconds"].values()) for cell in cells if cell["arm"] == "LoRA(μ)"]
    assert rows["LoRA(μ)", 2]["seconds"] == sum(past) / 2
    assert [row["status"] for row in rows.values()].count("missing") == 1
