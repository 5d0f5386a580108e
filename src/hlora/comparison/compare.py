"""`hlora compare`: methods × tasks × seeds × strengths, each cell computed once, then tables, figures and a report.

cells/<key>.json   one cell, named by the hash of all that determines it; a killed run resumes from these
general/, fisher/, squares/  what several cells share, made once a seed
comparison.json    everything that tables, figures and the report are made from

Several processes may share one output directory, for example one for each GPU: a cell is locked while it is computed.
ray_engine.py distributes the cells to the workers of a Ray cluster instead, which write the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hlora.comparison.cells import Cell
from hlora.comparison.choosing import choose
from hlora.comparison.grid import Grid
from hlora.config.comparison import CompareConfig
from hlora.evaluation.evaluate import add_forgetting
from hlora.parallel.launch import require_one_process
from hlora.run.results import provenance
from hlora.system.files import atomic_directory, write_json, write_text
from hlora.system.redaction import redacted


def compare(
    config: CompareConfig,
    command: str = "hlora compare",
    *,
    retry: bool = False,
    compute: Callable[[Grid, list[Cell], bool], None] | None = None,
) -> dict[str, Any]:
    """Compute the missing cells of the grid and write comparison.json, tables, figures and report.html.

    If a method cannot run on the model, or fails, its cell records the reason and the grid continues.

    Args:
        config: The comparison.
        command: The command that repeats it, for the report.
        retry: Compute failed cells again.
        compute: Computes cells: by default `Grid.compute` in this process, or what `ray_engine.engine` yields.

    Returns:
        What comparison.json holds.

    In several processes start it once for each, on the same output directory; a torchrun launch is refused.

    Raises:
        ConfigError: A setting is wrong, or the output directory cannot be written.
        DataError: Data, or a finished cell, cannot be read.
    """
    require_one_process("hlora compare", "Start it once for each GPU: several share one output directory.")
    compute = compute or Grid.compute
    grid = Grid.open(config)
    compute(grid, grid.first_cells(), retry)
    chosen = choose(config, grid.results(grid.first_cells()))
    compute(grid, grid.chosen_cells(chosen), retry)
    return finish(grid, chosen, command)


def finish(grid: Grid, chosen: dict[str, dict[str, float | None]], command: str) -> dict[str, Any]:
    """Write comparison.json, tables, figures and report from the cells that exist."""
    config = grid.config
    cells = grid.results([*grid.first_cells(), *grid.chosen_cells(chosen)])
    bases = {cell["task"]: cell for cell in cells if cell["method"] == "base" and cell["status"] == "done"}
    for cell in cells:
        base = bases.get(cell["task"])
        for part in ("test", "validation"):
            if base and cell[part]:
                add_forgetting(cell[part], base[part])
    texts = next((list(cell["test"]["texts"]) for cell in cells if cell["test"]), list(config.evaluation.texts))
    first = {task: grid.cell(next(iter(config.arms)), task, config.seeds[0], None).config for task in config.tasks}
    facts = {task: grid.domain(cell)[0].facts for task, cell in first.items()}
    general = grid.general(next(iter(first.values()))).facts
    comparison = {
        "config": config.model_dump(),
        "command": command,
        "provenance": provenance(grid.base, {"general": general, "domain": facts}),
        "model": config.model.name,
        "arms": list(config.arms),
        "tasks": list(config.tasks),
        "seeds": config.seeds,
        "texts": texts,
        "ours": config.ours,
        "rival": config.rival,
        "unprotected": config.unprotected,
        "ablation": config.ablation,
        "chosen": chosen,
        "cells": cells,
    }
    comparison = write_json(grid.output / "comparison.json", comparison)
    write_report(comparison, grid.output)
    return comparison


def summary(comparison: Mapping[str, Any]) -> list[str]:
    """How the grid ended: one line with the number of cells by status, and one for each reason of a failure."""
    counts: dict[str, int] = {}
    for cell in comparison["cells"]:
        counts[cell["status"]] = counts.get(cell["status"], 0) + 1
    lines = [", ".join(f"{count} cells {status}" for status, count in counts.items())]
    reasons = {
        f"{c['arm']}, {c['task']}: {c['error']}": c["status"] for c in comparison["cells"] if c["status"] != "done"
    }
    lines += [f"{status}: {reason}" for reason, status in reasons.items() if status != "missing"]
    if "failed" in counts:
        lines.append("`hlora compare CONFIG --retry` computes failed cells again.")
    return lines


def write_report(comparison: dict[str, Any], output: Path) -> None:
    """Write tables, figures and report.html next to comparison.json; the cost figure too if cost/cost.json exists."""
    from hlora.report.comparison.figures import all_figures
    from hlora.report.comparison.page import write_comparison_report
    from hlora.report.comparison.table_formats import write_tables
    from hlora.report.comparison.tables import all_tables
    from hlora.report.drawing import draw
    from hlora.report.style import svg_file

    kept = output / "cost" / "cost.json"  # of `hlora cost`
    cost = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
    comparison = redacted(comparison)
    tables, figures = all_tables(comparison), all_figures(comparison, cost)
    drawings = {name: draw(figure) for name, figure in figures.items()}  # once: the page and the files show the same
    with atomic_directory(output / "tables") as fresh_tables, atomic_directory(output / "figures") as fresh_figures:
        write_tables(tables, fresh_tables)
        for name, drawing in drawings.items():
            write_text(fresh_figures / f"{name}.svg", svg_file(drawing.whole))
        write_comparison_report(comparison, tables, drawings, output / "report.html", cost)
