"""`hlora compare --dry-run`: the cells of a grid with estimated times. Trains and writes nothing."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, NamedTuple

import torch
from rich.table import Table

from hlora.comparison.cells import Cell
from hlora.comparison.choosing import choose
from hlora.comparison.grid import Grid
from hlora.comparison.shared import shared_key, shared_part
from hlora.config.comparison import CompareConfig
from hlora.evaluation.answers import scoring_passes
from hlora.methods import METHODS
from hlora.model.lora import attach_lora
from hlora.run.job import Job
from hlora.training.train import sft_arguments

_CHARACTERS = 4  # characters in a token, roughly


class Speed(NamedTuple):
    """Seconds on one task, on this machine."""

    step: float
    """One LoRA step."""
    trained_token: float
    """One token in a step."""
    row: float
    """Scoring one row."""
    token: float
    """Scoring one token of a text."""


def plan(config: CompareConfig) -> list[dict[str, Any]]:
    """The grid's cells: arm, task, seed, strength, status and estimated seconds.

    The estimate is the mean time of finished cells of the same arm and task, or else of the same task. Without any, one
    plain LoRA step and one scored batch are timed and multiplied. The first cell that needs a seed's general phase or
    Fisher information is charged for it. Until strengths are chosen, later seeds show each arm's first one.
    """
    grid = Grid.open(config, dry_run=True)
    cells = grid.first_cells()
    known = {cell.key: grid.read(cell) for cell in cells}
    chosen = choose(config, [result for result in known.values() if result])
    cells = list({cell.key: cell for cell in [*cells, *grid.chosen_cells(chosen)]}.values())
    speeds: dict[str, Speed] = {}
    measured: dict[tuple[str, ...], list[float]] = {}
    for cell in cells:
        result = grid.read(cell)
        if result and result["status"] == "done":
            for place in ((cell.arm, cell.task), (cell.task,)):
                measured.setdefault(place, []).append(sum(result["seconds"].values()))
    rows = []
    paid: set[str] = set()
    for cell in cells:
        result = grid.read(cell)
        past = measured.get((cell.arm, cell.task)) or measured.get((cell.task,))
        seconds = statistics.fmean(past) if past else _estimate(grid, cell, speeds, paid)
        shown = {"arm": cell.arm, "task": cell.task, "seed": cell.seed, "strength": cell.strength}
        rows.append({**shown, "status": result["status"] if result else "missing", "seconds": seconds})
    return rows


def plan_table(rows: list[dict[str, Any]]) -> Table:
    """A table of `plan` for the terminal; the caption has the remaining time."""
    left = [row for row in rows if row["status"] == "missing"]
    hours = sum(row["seconds"] for row in left) / 3600
    caption = f"{len(rows)} cells, {len(left)} to compute, about {hours:.1f} h in one process"
    table = Table("arm", "task", "seed", "strength", "status", "about", title="Cells", caption=caption)
    for row in rows:
        names = [row["arm"], row["task"], row["seed"], row["strength"], row["status"]]
        table.add_row(*("–" if name is None else str(name) for name in names), f"{row['seconds']:.0f} s")
    return table


def _estimate(grid: Grid, cell: Cell, speeds: dict[str, Speed], paid: set[str]) -> float:
    """Estimated seconds of a cell, as if it were plain LoRA."""
    if cell.task not in speeds:
        speeds[cell.task] = _speed(grid.job(cell))
    speed, config = speeds[cell.task], cell.config
    arguments = sft_arguments(grid.output, config.training.tune_arguments(), config.seed)
    domain, held_out = grid.domain(config)
    steps: float = arguments.max_steps
    if steps <= 0:
        batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        steps = arguments.num_train_epochs * math.ceil(len(domain.train) / batch)
    if METHODS[config.method].reference:
        steps = 0
    rows = len(domain.test)
    texts = len(grid.general(config).evaluation)
    if grid.validates(cell.seed):
        rows, texts = rows + len(held_out), texts + len(grid.held_out_texts(cell.seed))
    tokens: float = 0
    if shared := shared_part(config):
        key = shared_key(config)
        if key in paid:
            shared = ""
        paid.add(key)
        if shared == "fisher":
            tokens = config.fisher.examples * config.fisher.max_length
        elif shared == "squares":
            tokens = config.importance.sequences * config.importance.sequence_length
        elif shared == "general":
            record = sft_arguments(grid.output, config.training.record_arguments(), config.seed)
            batch = record.per_device_train_batch_size * record.gradient_accumulation_steps
            corpus = record.num_train_epochs * sum(map(len, grid.general(config).train)) / _CHARACTERS
            tokens = record.max_steps * batch * (record.max_length or 0) if record.max_steps > 0 else corpus
    return (
        tokens * speed.trained_token
        + steps * speed.step
        + rows * speed.row
        + texts * config.evaluation.max_tokens * speed.token
    )


def _speed(job: Job) -> Speed:
    arguments = sft_arguments(job.output, job.config.training.tune_arguments(), job.config.seed)
    texts = [f"{_as_text(e.prompt)} {e.answer}" for e in job.domain.train[: arguments.per_device_train_batch_size]]
    batch = job.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=arguments.max_length)
    batch = batch.to(job.base.device)
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    seconds = []
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        model(**batch, logits_to_keep=16).logits.sum().backward()
        step = time.perf_counter() - started
        started = time.perf_counter()
        with torch.no_grad():
            model(**batch)
        seconds = [step, time.perf_counter() - started]
    model.unload()
    step, forward = seconds
    steps = arguments.gradient_accumulation_steps
    tokens = batch["input_ids"].numel()
    few = job.domain.test[: len(texts)]
    passes = scoring_passes(job.tokenizer, few, accuracy=job.config.evaluation.accuracy) / len(few)
    return Speed(step * steps, step / tokens, forward / len(texts) * passes, forward / tokens)


def _as_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
