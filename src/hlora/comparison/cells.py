"""One cell of a grid: a model to tune and measure, and the settings of its run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hlora.config.comparison import NOT_VALIDATED, CellConfig, CompareConfig
from hlora.config.reading import parse_config
from hlora.system.errors import ConfigError


@dataclass(frozen=True)
class Cell:
    """One model to tune and measure."""

    arm: str
    task: str
    seed: int | None
    """None for the base model."""
    strength: float | None
    config: CellConfig
    key: str

    @property
    def name(self) -> str:
        seed = None if self.seed is None else f"seed {self.seed}"
        return ", ".join(str(part) for part in (self.arm, self.task, seed, self.strength) if part is not None)


def cell_config(common: CompareConfig, arm: str, task: str, seed: int | None, strength: float | None) -> CellConfig:
    """Settings of one cell: the comparison's, with its arm's changes. Raises ConfigError, naming the arm."""
    settings = common.arms[arm]
    shared = ("model", "lora", "general", "importance", "penalty", "fisher", "evaluation")
    described = {
        "output": common.output,
        "seed": seed,
        **{name: getattr(common, name).model_dump() for name in shared},
        "training": {**common.training.model_dump(), "common": {"report_to": [], **common.training.common}},
        "domain": common.tasks[task].model_dump(),
        "method": settings.method,
        "strength": strength,
        "held_out_rows": common.selection.rows,
    }
    changes = [f"{path}={json.dumps(value)}" for path, value in settings.settings.items()]
    found = parse_config(described, f"arms.{arm}", changes, CellConfig)
    if found.domain.validation is not None:
        raise ConfigError(f"arms.{arm}: domain.validation: {NOT_VALIDATED}")
    return found


NOT_COMPUTED: dict[str, Any] = {
    "status": "missing",
    "error": None,
    "test": None,
    "validation": None,
    "history": [],
    "importance": None,
    "seconds": {},
    "peak_memory_bytes": None,
}
"""The entry in comparison.json of a cell that was not measured."""


def names_of(cell: Cell) -> dict[str, Any]:
    """The identity and settings of a cell in comparison.json."""
    return {
        "key": cell.key,
        "arm": cell.arm,
        "method": cell.config.method,
        "task": cell.task,
        "seed": cell.seed,
        "strength": cell.strength,
        "config": cell.config.model_dump(),
    }
