"""What a grid will take, said before it is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hlora.comparison.compare import compare
from hlora.comparison.planning import plan, plan_table
from hlora.config.comparison import CompareConfig
from hlora.system.errors import ConfigError
from hlora.system.files import sha256


def test_the_plan_lists_cells_and_computes_none(comparison_config: CompareConfig) -> None:
    rows = plan(comparison_config)
    assert len(rows) == 1 + 2 + 2 + 3 + 3
    assert all(row["status"] == "missing" and row["seconds"] > 0 for row in rows)
    assert "11 to compute" in str(plan_table(rows).caption)


def test_the_first_cell_that_needs_a_general_phase_pays_for_it(comparison_config: CompareConfig) -> None:
    comparison_config.training.record["max_steps"] = 1000
    times = {(row["arm"], row["seed"], row["strength"]): row["seconds"] for row in plan(comparison_config)}
    assert times["LoRA(ν+μ)", 0, None] > 10 * times["LoRA(μ)", 0, None]
    assert times["HLoRA", 0, 1] < 2 * times["LoRA(μ)", 0, None]


@pytest.mark.slow
def test_finished_cells_say_what_the_rest_will_take(comparison_config: CompareConfig, monkeypatch) -> None:
    monkeypatch.setattr("hlora.comparison.compare.write_report", lambda *arguments: None)
    comparison_config.arms = {name: comparison_config.arms[name] for name in ("Base", "LoRA(μ)")}
    cells = compare(comparison_config)["cells"]
    comparison_config.seeds = [0, 1, 2]
    rows = {(row["arm"], row["seed"]): row for row in plan(comparison_config)}
    past = [sum(cell["seconds"].values()) for cell in cells if cell["arm"] == "LoRA(μ)"]
    assert rows["LoRA(μ)", 2]["seconds"] == sum(past) / 2
    assert [row["status"] for row in rows.values()].count("missing") == 1


def everything_in(directory: Path) -> dict[str, str]:
    """Paths, and the SHA-256 of files."""
    return {str(path): sha256(path) if path.is_file() else "" for path in directory.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("source", ["files", "model"])
def test_a_plan_writes_nothing_and_reads_finished_cells(
    comparison_config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: bool, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hlora.comparison.compare.write_report", lambda *arguments: None)
    general = comparison_config.general
    general.source, general.samples, general.sample_tokens = source, 40, 8  # type: ignore[assignment]
    comparison_config.arms = {"Base": comparison_config.arms["Base"]}
    if computed:
        compare(comparison_config)
    before = everything_in(tmp_path)
    (row,) = plan(comparison_config)
    assert row["status"] == ("done" if computed else "missing")
    assert everything_in(tmp_path) == before
    assert Path(comparison_config.output).exists() is computed


def test_a_plan_refuses_an_output_that_is_a_file_or_too_long(comparison_config: CompareConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "grid", tmp_path / ("x" * 5000)):
        comparison_config.output = str(output)
        with pytest.raises(ConfigError, match=r"^output: .* cannot be used \(.*\)\. Name another directory"):
            plan(comparison_config)
