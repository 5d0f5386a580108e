"""A grid of cells, its model, its data and its directory: which cells there are, and computing them."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from hlora.comparison.cells import NOT_COMPUTED, Cell, cell_config, names_of
from hlora.comparison.run_cell import HeldOut, run_cell
from hlora.comparison.shared import Busy
from hlora.config.comparison import ArmConfig, CellConfig, CompareConfig
from hlora.config.sections import GeneralConfig
from hlora.data.domain import DomainRows, TokenLimits, domain_rows, hold_out
from hlora.data.example import Example
from hlora.data.general import GeneralText, general_text, hold_out_documents, measured_text, without_lines_of
from hlora.methods import METHODS
from hlora.model.base import load_base, pick_device
from hlora.run.data_check import check_data
from hlora.run.job import Job
from hlora.run.kept_predictions import KeptPredictions
from hlora.run.lengths import fit_lengths
from hlora.run.trial import check_arguments, try_phases
from hlora.system.digest import digest, without_empty
from hlora.system.errors import CannotRun, ConfigError, DataError, HloraError, first_line
from hlora.system.files import check_directory, make_directory, refuse_links, write_json, write_text
from hlora.system.locks import try_lock
from hlora.system.redaction import redacted, without_secret_fields

logger = logging.getLogger("hlora")

_version = cache(version)  # read for each key anew, the keys of 438 cells took 3.5 s; so 0.9 s


@dataclass
class Grid:
    """A comparison, its model and its directory."""

    config: CompareConfig
    output: Path
    base: Any
    tokenizer: Any
    base_is_spoilt: bool = False
    """A method has changed the model's weights, or failed while it could change them."""
    dry_run: bool = False
    """Nothing is written."""
    predictions: KeptPredictions = field(default_factory=KeptPredictions)
    """Of the base model, and of the last general phase."""
    _read: dict[str, Any] = field(default_factory=dict)
    """Data and held-out parts by the digest of their settings."""

    @classmethod
    def open(cls, config: CompareConfig, dry_run: bool = False) -> Grid:
        """Load the model, read the data, and check what can be checked before hours of training.

        Args:
            config: The comparison.
            dry_run: Write nothing. By default the output directory is made, with the configuration in it.

        Raises:
            ConfigError: A setting of the comparison, or of the arm that is named, is wrong.
            DataError: Data cannot be read.
        """
        output = Path(config.output)
        if dry_run:
            check_directory(output)
        else:
            make_directory(output)
            refuse_links(output)
        for name in config.arms:  # before the model is loaded
            cell_config(config, name, next(iter(config.tasks)), config.seeds[0], None)
        check_arguments(config.training, output, pick_device(config.model.device))
        check_data(config)
        base, tokenizer = load_base(config.model)
        grid = cls(fit_lengths(config, base), output, base, tokenizer, dry_run=dry_run)
        cells = grid.first_cells()  # a wrong arm or row is reported now
        grid.try_phases(cells)
        if not dry_run:
            shown = redacted(config.model_dump())
            write_text(output / "config.yaml", yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
        return grid

    def try_phases(self, cells: Iterable[Cell]) -> None:
        """Build the trainers of every arm on a few rows (see run/trial.py).

        Raises:
            ConfigError: A trainer cannot be built; names the arm.
        """
        tried = set()
        for cell in cells:
            settings = digest(cell.config.model_dump(include={"training", "lora", "importance"}))
            if settings not in tried:
                tried.add(settings)
                try:
                    try_phases(self.job(cell))
                except ConfigError as error:
                    raise ConfigError(f"arms.{cell.arm}: {error}") from None

    def first_cells(self) -> list[Cell]:
        """Every strength of every arm on the first seeds."""
        return [
            self.cell(arm, task, seed, strength)
            for seed in self.config.seeds[: self.config.selection.seeds]
            for task in self.config.tasks
            for arm, settings in self._arms_of(task, seed)
            for strength in (settings.strengths or (None,))
        ]

    def chosen_cells(self, chosen: Mapping[str, Mapping[str, float | None]]) -> list[Cell]:
        """The chosen strength of every arm on every seed."""
        return [
            self.cell(arm, task, seed, chosen[arm][task])
            for seed in self.config.seeds
            for task in self.config.tasks
            for arm, _ in self._arms_of(task, seed)
        ]

    def _arms_of(self, task: str, seed: int) -> Iterator[tuple[str, ArmConfig]]:
        """The arms that run on a task with a seed; the base has no seed and runs with the first."""
        for name, arm in self.config.arms.items():
            seeds = self.config.seeds[:1] if arm.method == "base" else arm.seeds or self.config.seeds
            if task in (arm.tasks or self.config.tasks) and seed in seeds:
                yield name, arm

    def cell(self, arm: str, task: str, seed: int | None, strength: float | None) -> Cell:
        """One cell of the grid, with the key of what determines it."""
        config = cell_config(self.config, arm, task, seed, strength)
        made_from = {
            **without_empty(without_secret_fields(config.model_dump(exclude={"output", "baselines"}))),
            "general_data": self.general(config).facts,
            "domain_data": self.domain(config)[0].facts,
            "chosen_on": digest(self.held_out_texts(seed)) if self.validates(seed) else None,
            "versions": {name: _version(name) for name in ("hlora", "torch", "transformers", "peft", "trl")},
        }
        return Cell(arm, task, None if config.method == "base" else seed, strength, config, digest(made_from))

    def general(self, config: CellConfig) -> GeneralText:
        """General text of a cell, without the text that its strength is chosen on."""
        key = digest(config.model_dump(include={"general", "evaluation", "seed"}))
        if key not in self._read:
            found = self._general_text(config.general, config.seed)
            if config.general == self.config.general:
                self._read[key], _ = hold_out_documents(found)
            else:
                self._read[key] = without_lines_of(found, self.held_out_texts(config.seed).values())
        return self._read[key]

    def held_out_texts(self, seed: int | None) -> dict[str, str]:
        """Texts that strengths are chosen on, by name.

        They are the last tenth of the comparison's own general documents, and the texts of `selection`.
        """
        seed = self.config.seeds[0] if seed is None else seed
        key = f"held out, seed {seed}"
        if key not in self._read:
            _, documents = hold_out_documents(self._general_text(self.config.general, seed))
            others, column = self.config.selection.texts.items(), self.config.general.column
            held_out = {"general (held out)": documents, **{n: measured_text(path, column) for n, path in others}}
            self._read[key] = {name: "\n\n".join(parts) for name, parts in held_out.items()}
        return self._read[key]

    def _general_text(self, general: GeneralConfig, seed: int) -> GeneralText:
        key = digest({"general": general.model_dump(), "seed": seed})
        if key not in self._read:
            settings = (general, self.config.evaluation, self.base, self.tokenizer, seed, self.output)
            self._read[key] = general_text(*settings, keep=not self.dry_run)
        return self._read[key]

    def domain(self, config: CellConfig) -> tuple[DomainRows, list[Example]]:
        """Domain rows of a cell, and the rows held out of them to choose its strength on."""
        limits = TokenLimits.of(self.base, self.tokenizer, config.training.tune_arguments())
        rows = (config.domain.model_dump(), config.evaluation.max_rows, config.seed, config.held_out_rows)
        key = digest({"domain": rows, "limits": (limits.context, limits.kept, limits.keeps_end, limits.packed)})
        if key not in self._read:
            found = domain_rows(config.domain, config.evaluation.max_rows, config.seed, limits)
            self._read[key] = hold_out(found, config.held_out_rows, config.seed, self.tokenizer)
        return self._read[key]

    def validates(self, seed: int | None) -> bool:
        """Whether cells of this seed are also measured on the held-out data. None is the base model's seed."""
        return seed is None or seed in self.config.seeds[: self.config.selection.seeds]

    def _held_out(self, cell: Cell) -> HeldOut | None:
        """Texts and rows that the cell's strength is chosen on, if cells of this seed are measured on them."""
        return (self.held_out_texts(cell.seed), self.domain(cell.config)[1]) if self.validates(cell.seed) else None

    def to_compute(self, cells: Iterable[Cell], retry: bool) -> list[tuple[Cell, bool]]:
        """The missing cells, each once, and with `retry` the failed ones, which are marked True."""
        found = {cell.key: (cell, self.read(cell)) for cell in cells}
        return [
            (cell, known is not None)
            for cell, known in found.values()
            if known is None or (retry and known["status"] == "failed")
        ]

    def compute(self, cells: list[Cell], retry: bool = False) -> None:
        """Compute the missing cells, last those that another process holds locked.

        Args:
            cells: Cells of this grid.
            retry: Compute failed cells again.
        """
        started = time.perf_counter()
        todo = self.to_compute(cells, retry)
        total, done, pause = len(todo), 0, 1
        while todo:
            left = []
            for cell, again in todo:
                if not self.attempt(cell, again):
                    left.append((cell, again))
                    continue
                done += 1
                log_progress(done, total, started)
            # Every cell waits for another process. Asking takes a second of CPU a cell, which that process needs.
            pause = min(2 * pause, 32) if len(left) == len(todo) else 1
            if pause > 1:
                time.sleep(pause)
            todo = left

    def attempt(self, cell: Cell, again: bool) -> bool:
        """Compute a cell. Returns False while another process holds the lock of the cell, or of a part it needs."""
        path = self._path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        with try_lock(path.with_name(f"{path.name}.lock")) as mine:
            if not mine:
                return False
            if path.exists() and not again:
                return True  # another process has computed it
            logger.info("%s", cell.name)
            try:
                result = run_cell(self.job(cell), cell.strength, self._held_out(cell))
            except Busy:
                return False
            except CannotRun as error:
                result = {"status": "cannot", "error": str(error)}
            except Exception as error:  # of any library: recorded in its cell, and the grid continues
                text = str(error) if isinstance(error, HloraError) else first_line(error)
                logger.error("%s failed: %s", cell.name, text)
                result = {"status": "failed", "error": text, "traceback": traceback.format_exc()}
            self.base_is_spoilt |= result["status"] != "done" or METHODS[cell.config.method].alters_base
            write_json(path, {**names_of(cell), **NOT_COMPUTED, **result})
            return True

    def job(self, cell: Cell) -> Job:
        """The job of a cell. Its general phase records every kind of importance that an arm of the grid needs."""
        if self.base_is_spoilt:
            self.base = None
            self.base, self.tokenizer = load_base(self.config.model)
            self.base_is_spoilt = False
        recorded = {}
        for name, arm in self.config.arms.items():
            if METHODS[arm.method].needs in ("importance", "general"):
                task = (arm.tasks or list(self.config.tasks))[0]
                asked = self.cell(name, task, cell.config.seed, None).config
                if not asked.in_one_pass:
                    recorded[asked.importance.method, asked.importance.encoding] = asked.importance
        config = cell.config.model_copy(deep=True)
        name = config.training.tune_arguments().get("run_name", self.output.name)
        config.training.tune["run_name"] = f"{name}/{cell.name}"  # in trackers
        job = Job(
            config, self.base, self.tokenizer, self.output, tuple(recorded.values()), predictions=self.predictions
        )
        job.general = self.general(cell.config)
        job.domain = self.domain(cell.config)[0]
        return job

    def _path(self, cell: Cell) -> Path:
        return self.output / "cells" / f"{cell.key}.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell under its present names; None if the cell is missing."""
        try:
            kept = json.loads(self._path(cell).read_text(encoding="utf-8"))
            if not isinstance(kept, dict) or "status" not in kept:
                raise ValueError("expected an object with a status")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"{self._path(cell)}: not readable ({error}). Delete it to compute the cell again."
            ) from None
        return {**kept, **names_of(cell)}

    def results(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """The results of the cells, each once; a cell without a result has the status missing.

        Two arms may share a cell that is computed once: both have it.
        """
        return [
            self.read(cell) or {**names_of(cell), **NOT_COMPUTED}
            for cell in {(cell.arm, cell.task, cell.seed, cell.strength): cell for cell in cells}.values()
        ]


def log_progress(done: int, total: int, started: float) -> None:
    """Log how many cells are done and how long the rest will take. started: from time.perf_counter()."""
    minutes = (time.perf_counter() - started) / done * (total - done) / 60
    logger.info("cell %d of %d done, about %.0f min left", done, total, minutes)
