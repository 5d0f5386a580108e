"""What each arm lets through at equal learning, from a comparison's cells, as the tables of docs/results.

    python benchmarks/equal_learning.py CONFIG CELLS TASK [--seeds 0 1 2] [--share 0.98]

CONFIG is the comparison's YAML. CELLS is a folder with its cells, whatever machine or version they are from, such as
docs/results/compare-importance-smollm2/cells. No model is loaded and no cell computed. A strength counts where every
seed has it. SHARE, of the unprotected arm's improvement over Base, sets the answer NLL at which arms are compared.
Brackets: 95 %, by bootstrap over seeds, questions and blocks of text.
"""

from __future__ import annotations

import json
import math
import statistics
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from typing import Any

from hlora.config.comparison import CompareConfig
from hlora.config.reading import load_comparison
from hlora.report.comparison.cells import base_arm, untuned
from hlora.report.comparison.equal_domain import (
    Quantity,
    equal_domain,
    equal_domain_ratio,
    equal_domain_rise,
    equal_domain_target,
)
from hlora.report.comparison.rise_table import rise_table
from hlora.report.comparison.table_numbers import NONE, with_bounds
from hlora.report.format import decimals
from hlora.system.errors import DataError, HloraError

Comparison = dict[str, Any]  # what hlora.report reads; see hlora/comparison/compare.py
Strength = float | None


def read(config: CompareConfig, folder: Path, task: str, seeds: list[int]) -> Comparison:
    """The finished cells of a task, at the strengths that every seed has."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    mine = [cell for cell in found if cell["status"] == "done" and cell["task"] == task and cell["arm"] in config.arms]
    mine = [cell for cell in mine if cell["seed"] in seeds or (_is_base(cell) and cell["config"]["seed"] == seeds[0])]
    count = Counter((cell["arm"], cell["strength"]) for cell in mine)
    cells = [cell for cell in mine if _is_base(cell) or count[cell["arm"], cell["strength"]] == len(seeds)]
    measured = {cell["arm"] for cell in cells}
    for arm in (base_arm({"cells": cells}), config.unprotected, config.ours):
        if arm not in measured:
            of_seeds = ", ".join(map(str, seeds))
            raise DataError(
                f"{folder}: expected cells of {arm} on {task} with each of the seeds {of_seeds}; there are none."
            )
    return {
        "model": config.model.name,
        "arms": [arm for arm in config.arms if arm in measured],
        "tasks": [task],
        "seeds": seeds,
        "texts": list(cells[0]["test"]["texts"]),
        "ours": config.ours,
        "unprotected": config.unprotected,
        "chosen": {cell["arm"]: {task: cell["strength"]} for cell in cells},  # any: no table here shows a chosen one
        "cells": cells,
    }


def _is_base(cell: Comparison) -> bool:
    return cell["seed"] is None  # the same whatever the seed; measured once for each first seed of a configuration


def at_equal_learning(comparison: Comparison, target: float) -> None:
    """Drift from the end of the general phase with its ratio to ours; drift from the base model and rise over it."""
    (task,), texts, ours, base = comparison["tasks"], comparison["texts"], comparison["ours"], base_arm(comparison)
    tuned = [arm for arm in comparison["arms"] if arm not in untuned(comparison)]

    def drift(arm: str, quantity: Quantity) -> list[str]:
        found = [equal_domain(comparison, arm, task, text, target, quantity=quantity) for text in texts]
        return [with_bounds(each, NONE, 4) for each in found]

    def times_ours(arm: str) -> list[str]:
        place = [(comparison, arm, ours, task, text, target) for text in texts]
        return [with_bounds(equal_domain_ratio(*each, quantity="kl_from_general")[0], NONE, 1) for each in place]

    def rise(arm: str) -> list[str]:
        place = [(comparison, arm, base, task, text, target) for text in texts]
        return [with_bounds(equal_domain_rise(*each)[0], NONE, 4, sign=True) for each in place]

    rows = [
        [arm, *drift(arm, "kl_from_general"), *(["1"] * len(texts) if arm == ours else times_ours(arm))]
        for arm in tuned
    ]
    print("\n### Drift from the end of the general phase, and how many times ours\n")
    table(["importance", *texts, *(f"× {text}" for text in texts)], [row for row in rows if set(row[1:]) != {NONE}])
    print("\n### Drift from the base model, and rise over it\n")
    named = [f"{what}: {text}" for what in ("Drift", "Rise") for text in texts]
    table(["method", *named], [[arm, *drift(arm, "kl_from_base"), *rise(arm)] for arm in tuned])


def every_strength(comparison: Comparison) -> None:
    """Means over seeds. Beside accuracy: the difference from the unprotected arm's ± 2 standard errors."""
    texts, base = comparison["texts"], base_arm(comparison)
    by_row: dict[tuple[str, Strength], list[Comparison]] = {}
    for cell in comparison["cells"]:
        by_row.setdefault((cell["arm"], cell["strength"]), []).append(cell["test"])
    plain = by_row[comparison["unprotected"], None]
    scored = all("acc_each" in test["domain"] for test in plain)

    def mean(tests: list[Comparison], quantity: Quantity, text: str) -> float:
        return statistics.fmean(test["texts"][text].get(quantity, math.nan) for test in tests)

    def row(arm: str, strength: Strength, tests: list[Comparison]) -> list[str]:
        drifts = [mean(tests, quantity, text) for quantity in ("kl_from_general", "kl_from_base") for text in texts]
        rises = [mean(tests, "nll", text) - mean(by_row[base, None], "nll", text) for text in texts]
        return [
            arm,
            "" if strength is None else f"{strength:g}",
            str(len(tests)),
            f"{statistics.fmean(test['domain']['answer_nll'] for test in tests):.2f}",
            *([accuracy(tests, plain)] if scored else []),
            *(decimals(each, 4) for each in drifts),
            *(NONE if arm == base else decimals(each, 4, sign=True) for each in rises),
        ]

    order = sorted(by_row, key=lambda each: (comparison["arms"].index(each[0]), each[1] or 0))
    named = [f"{what}: {text}" for what in ("General", "Base", "Rise") for text in texts]
    print("\n### Every strength\n")
    table(
        ["method", "strength", "seeds", "NLL", *(["accuracy"] if scored else []), *named],
        [row(*each, by_row[each]) for each in order],
    )


def accuracy(tests: list[Comparison], plain: list[Comparison]) -> str:
    """Paired by question, each question's mean over seeds; a dash where not every seed was scored."""
    if not all("acc_each" in test["domain"] for test in tests):
        return NONE
    mine, others = (
        [statistics.fmean(each) for each in zip(*(test["domain"]["acc_each"] for test in group), strict=True)]
        for group in (tests, plain)
    )
    share = f"{statistics.fmean(mine):.3f}"
    if tests is plain:
        return share
    apart = [a - b for a, b in zip(mine, others, strict=True)]
    error = statistics.stdev(apart) / math.sqrt(len(apart))
    return f"{share} ({decimals(statistics.fmean(apart), 3, sign=True)} ± {2 * error:.3f})"


def table(columns: list[str], rows: list[list[str]]) -> None:
    for line in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("cells", type=Path)
    parser.add_argument("task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--share", type=float, default=0.98)
    asked = parser.parse_args()
    try:
        compared = read(load_comparison(asked.config, []), asked.cells, asked.task, asked.seeds)
    except HloraError as error:
        parser.error(str(error))
    nll = equal_domain_target(compared, asked.task, asked.share)
    print(f"## {asked.task}, seeds {', '.join(map(str, asked.seeds))}: answer NLL {nll:.2f} ({100 * asked.share:g} %)")
    at_equal_learning(compared, nll)
    every_strength(compared)
    print(f"\n{rise_table(compared, asked.share).markdown()}")
