"""`hlora compare`: methods × tasks × seeds × strengths, each cell computed once, then tables, figures and a report.

cells/<key>.json   one cell, named by the hash of all that determines it; a run that was killed goes on from here
general/, fisher/, squares/  what several cells share, made once a seed
comparison.json    everything that tables, figures and the report are made from

Several processes may work on one output directory at a time, one for each GPU: a cell is locked while it is computed.
ray_engine.py hands the cells to the workers of a Ray cluster instead, which write the same files.
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from hlora import data, pipeline
from hlora.config import ArmConfig, CellConfig, CompareConfig, GeneralConfig, parse_config
from hlora.distributed import only_alone
from hlora.errors import CannotRun, DataError, HloraError, first_line
from hlora.evaluation import add_forgetting, evaluate
from hlora.files import building, check_directory, make_directory, refuse_links, write_text
from hlora.locks import try_lock
from hlora.methods import METHODS, fisher
from hlora.models import check_lengths, load_base
from hlora.pipeline import Job
from hlora.recording import Busy, digest, importance
from hlora.redaction import redacted, without_secret_fields
from hlora.rivals import ALTERS_BASE
from hlora.tasks import Example
from hlora.trainer import sft_arguments

logger = logging.getLogger("hlora")

_LOSSES = ("step", "loss", "regularisation_loss", "weighted_regularisation_loss", "total_loss")
_BUDGET = ("phi", "probe_rise", "probe_stderr", "budget", "alpha")


@dataclass(frozen=True)
class Cell:
    """One model to tune and measure."""

    arm: str
    task: str
    seed: int | None
    """None for the base model, which has none."""
    strength: float | None
    config: CellConfig
    key: str

    @property
    def name(self) -> str:
        return ", ".join(str(part) for part in (self.arm, self.task, f"seed {self.seed}", self.strength))


def compare(
    config: CompareConfig,
    command: str = "hlora compare",
    retry: bool = False,
    compute: Callable[[Grid, list[Cell], bool], None] | None = None,
) -> dict[str, Any]:
    """Compute what is missing of the grid and write comparison.json, tables, figures and report.html.

    retry: compute failed cells again. compute: what computes cells, Grid.compute in this process by default, or what
    ray_engine.engine gives. Returns what comparison.json holds. A method that cannot run on the model, and one that
    fails, says so in its cell; the rest of the grid goes on.
    """
    only_alone("hlora compare", "Start it once for each GPU: several share one output directory.")
    compute = compute or Grid.compute
    grid = Grid.open(config)
    compute(grid, grid.first_cells(), retry)
    chosen = choose(config, grid.results(grid.first_cells()))
    compute(grid, grid.chosen_cells(chosen), retry)
    return grid.finish(chosen, command)


def summary(comparison: Mapping[str, Any]) -> list[str]:
    """How the grid ended, in a line or more: cells by status, and the reason of each that is not done."""
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


def choose(config: CompareConfig, results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Strength of each arm and task, chosen on the held-out rows and texts of the first seeds.

    Of the strengths that keep `selection.kept_learning` of what unprotected LoRA learned (fall of the answers' NLL
    against the base), the one with the lowest mean loss over the held-out general texts; if none keeps that much, the
    one that learned most. An arm without results yet keeps its first strength.
    """
    measured: dict[tuple[str, str, float | None], list[tuple[float, float]]] = {}
    for result in results:
        if result["status"] == "done" and result["validation"]:
            held_out = result["validation"]
            general = statistics.fmean(text["nll"] for text in held_out["texts"].values())
            place = (result["arm"], result["task"], result["strength"])
            measured.setdefault(place, []).append((held_out["domain"]["answer_nll"], general))
    means = {place: tuple(map(statistics.fmean, zip(*values, strict=True))) for place, values in measured.items()}
    base = next(name for name, arm in config.arms.items() if arm.method == "base")
    chosen: dict[str, dict[str, float | None]] = {}
    for name, arm in config.arms.items():
        chosen[name] = {}
        for task in arm.tasks or config.tasks:
            tried = {s: means[name, task, s] for s in arm.strengths if (name, task, s) in means}
            before, learned = means.get((base, task, None)), means.get((config.unprotected, task, None))
            if not tried or before is None or learned is None:
                chosen[name][task] = arm.strengths[0] if arm.strengths else None
                continue
            allowed = before[0] - config.selection.kept_learning * (before[0] - learned[0])
            enough = {s: general for s, (answers, general) in tried.items() if answers <= allowed}
            scores = enough or {s: answers for s, (answers, _) in tried.items()}
            chosen[name][task] = min(scores, key=scores.__getitem__)
    return chosen


def cell_config(common: CompareConfig, arm: str, task: str, seed: int | None, strength: float | None) -> CellConfig:
    """Settings of one cell: the comparison's, with what its arm changes. Raises ConfigError that names the arm."""
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
    return parse_config(described, f"arms.{arm}", changes, CellConfig)


@dataclass
class Grid:
    """A comparison, its model and its directory."""

    config: CompareConfig
    output: Path
    base: Any
    tokenizer: Any
    base_is_spoilt: bool = False
    """A method has changed the model's weights, or failed while they were in its hands."""
    dry_run: bool = False
    """Nothing is written."""
    _read: dict[str, Any] = field(default_factory=dict)
    """Data and held-out parts by the digest of their settings."""

    @classmethod
    def open(cls, config: CompareConfig, dry_run: bool = False) -> Grid:
        """Check what can be checked before hours of training, load the model, read the data.

        dry_run: write nothing. Else make the output directory and keep the configuration in it.
        """
        output = Path(config.output)
        if dry_run:
            check_directory(output)
        else:
            make_directory(output)
            refuse_links(output)
        for name in config.arms:  # before the model is there
            cell_config(config, name, next(iter(config.tasks)), config.seeds[0], None)
        for arguments in (config.training.of_record(), config.training.of_tune()):
            sft_arguments(output, arguments, config.seeds[0])
        base, tokenizer = load_base(config.model)
        check_lengths(base, pipeline.lengths(config))
        grid = cls(config, output, base, tokenizer, dry_run=dry_run)
        grid.first_cells()  # a wrong arm or row is reported now
        if not dry_run:
            shown = redacted(config.model_dump())
            write_text(output / "config.yaml", yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
        return grid

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
            **without_secret_fields(config.model_dump(exclude={"output", "baselines"})),
            "general_data": self.general(config).facts,
            "domain_data": self.domain(config)[0].facts,
            "chosen_on": digest(self.held_out_texts(seed)) if self.validates(seed) else None,
            "versions": {name: version(name) for name in ("hlora", "torch", "transformers", "peft", "trl")},
        }
        return Cell(arm, task, None if config.method == "base" else seed, strength, config, digest(made_from))

    def general(self, config: CellConfig) -> data.GeneralText:
        """General text of a cell without what strengths are chosen on."""
        key = digest(config.model_dump(include={"general", "evaluation", "seed"}))
        if key not in self._read:
            found = self._general_text(config.general, config.seed)
            if config.general == self.config.general:
                self._read[key], _ = data.hold_out_documents(found)
            else:
                self._read[key] = data.without_lines_of(found, self.held_out_texts(config.seed).values())
        return self._read[key]

    def held_out_texts(self, seed: int | None) -> dict[str, str]:
        """What strengths of every arm are chosen on: the last tenth of the comparison's own general documents, and the
        texts of `selection`."""
        seed = self.config.seeds[0] if seed is None else seed
        key = f"held out, seed {seed}"
        if key not in self._read:
            _, documents = data.hold_out_documents(self._general_text(self.config.general, seed))
            others = self.config.selection.texts.items()
            held_out = {"general (held out)": documents, **{n: data.measured_text(path) for n, path in others}}
            self._read[key] = {name: "\n\n".join(parts) for name, parts in held_out.items()}
        return self._read[key]

    def _general_text(self, general: GeneralConfig, seed: int) -> data.GeneralText:
        key = digest({"general": general.model_dump(), "seed": seed})
        if key not in self._read:
            settings = (general, self.config.evaluation, self.base, self.tokenizer, seed, self.output)
            self._read[key] = data.general_text(*settings, keep=not self.dry_run)
        return self._read[key]

    def domain(self, config: CellConfig) -> tuple[data.DomainRows, list[Example]]:
        """Domain rows without those that strengths are chosen on, and those."""
        space = data.Space.of(self.base, self.tokenizer, config.training.of_tune())
        rows = (config.domain.model_dump(), config.evaluation.max_rows, config.seed, config.held_out_rows)
        key = digest({"domain": rows, "space": (space.context, space.cut, space.trained)})
        if key not in self._read:
            found = data.domain_rows(config.domain, config.evaluation.max_rows, config.seed, space)
            self._read[key] = data.hold_out(found, config.held_out_rows, config.seed)
        return self._read[key]

    def validates(self, seed: int | None) -> bool:
        """Whether cells of this seed are measured on what strengths are chosen on; None is the base's."""
        return seed is None or seed in self.config.seeds[: self.config.selection.seeds]

    def to_compute(self, cells: Iterable[Cell], retry: bool) -> list[tuple[Cell, bool]]:
        """The cells that are not there, each once, and with `retry` the failed ones; and whether it is such a one."""
        found = {cell.key: (cell, self.read(cell)) for cell in cells}
        return [
            (cell, known is not None)
            for cell, known in found.values()
            if known is None or (retry and known["status"] == "failed")
        ]

    def compute(self, cells: list[Cell], retry: bool = False) -> None:
        """Compute the cells that are not there, leaving those that another process has locked to the end."""
        started = time.perf_counter()
        todo = self.to_compute(cells, retry)
        total, done = len(todo), 0
        while todo:
            left = []
            for cell, again in todo:
                if not self.attempt(cell, again):
                    left.append((cell, again))
                    continue
                done += 1
                log_progress(done, total, started)
            if len(left) == len(todo):
                time.sleep(2)
            todo = left

    def attempt(self, cell: Cell, again: bool) -> bool:
        """Whether the cell is there now; False while another process has it, or something that it needs."""
        path = self._path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        with try_lock(path.with_name(f"{path.name}.lock")) as mine:
            if not mine:
                return False
            if path.exists() and not again:
                return True  # another process made it meanwhile
            logger.info("%s", cell.name)
            try:
                result = self._measure(cell)
            except Busy:
                return False
            except CannotRun as error:
                result = {"status": "cannot", "error": str(error)}
            except Exception as error:  # of any library: it is one cell's, and said there
                text = str(error) if isinstance(error, HloraError) else first_line(error)
                logger.error("%s failed: %s", cell.name, text)
                result = {"status": "failed", "error": text, "traceback": traceback.format_exc()}
            self.base_is_spoilt |= result["status"] != "done" or cell.config.method in ALTERS_BASE
            write_text(path, json.dumps(redacted({**_names(cell), **_NOTHING, **result}), ensure_ascii=False))
            return True

    def _measure(self, cell: Cell) -> dict[str, Any]:
        job = self.job(cell)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        importance_used = None
        if cell.config.method == "hlora":
            importance_used = pipeline.describe(importance(job), cell.config)
        elif cell.config.method == "ewc":
            importance_used = fisher(job).describe()
        shared = time.perf_counter() - started
        started = time.perf_counter()
        model, history = METHODS[cell.config.method](job, cell.strength)
        train = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        started = time.perf_counter()
        test = evaluate(model, self.tokenizer, job.general.evaluation, job.domain, cell.config.evaluation)
        test.pop("samples")
        validation = None
        if self.validates(cell.seed):
            validation = self._validation(cell, model)
        if model is not job.base:
            model.unload()
        del model
        gc.collect()
        return {
            "status": "done",
            "test": test,
            "validation": validation,
            "history": [{key: entry[key] for key in (*_LOSSES, *_BUDGET) if key in entry} for entry in history],
            "importance": importance_used,
            "seconds": {"importance": shared, "train": train, "evaluate": time.perf_counter() - started},
            "peak_memory_bytes": peak,
        }

    def _validation(self, cell: Cell, model: Any) -> dict[str, Any]:
        held_out = data.DomainRows([], self.domain(cell.config)[1], [])
        settings = cell.config.evaluation.model_copy(update={"accuracy": False, "generate": 0})
        found = evaluate(model, self.tokenizer, self.held_out_texts(cell.seed), held_out, settings)
        return {"texts": found["texts"], "domain": found["domain"]}

    def job(self, cell: Cell) -> Job:
        """What the cell's method works on. Its general phase records what any arm of the grid needs."""
        if self.base_is_spoilt:
            self.base = None
            self.base, self.tokenizer = load_base(self.config.model)
            self.base_is_spoilt = False
        recorded = {}
        for name, arm in self.config.arms.items():
            if arm.method in ("hlora", "l2"):
                task = (arm.tasks or list(self.config.tasks))[0]
                kind = self.cell(name, task, cell.config.seed, None).config.importance
                if kind.method == "path_integral":
                    recorded[kind.encoding] = kind
        config = cell.config.model_copy(deep=True)
        name = config.training.of_tune().get("run_name", self.output.name)
        config.training.tune["run_name"] = f"{name}/{cell.name}"  # in trackers
        job = Job(config, self.base, self.tokenizer, self.output, tuple(recorded.values()))
        job.general = self.general(cell.config)
        job.domain = self.domain(cell.config)[0]
        return job

    def _path(self, cell: Cell) -> Path:
        return self.output / "cells" / f"{cell.key}.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell, under the names that the configuration gives now; None when it is not there."""
        try:
            kept = json.loads(self._path(cell).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._path(cell)}: not readable ({error}). Delete it to compute the cell again."
            ) from None
        return {**kept, **_names(cell)}

    def results(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """What is known of the cells, each once; one that is not there has the status missing."""
        return [self.read(cell) or {**_names(cell), **_NOTHING} for cell in {cell.key: cell for cell in cells}.values()]

    def finish(self, chosen: dict[str, dict[str, float | None]], command: str) -> dict[str, Any]:
        """Write comparison.json, tables, figures and report from the cells that are there."""
        config = self.config
        cells = self.results([*self.first_cells(), *self.chosen_cells(chosen)])
        bases = {cell["task"]: cell for cell in cells if cell["method"] == "base" and cell["status"] == "done"}
        for cell in cells:
            base = bases.get(cell["task"])
            for part in ("test", "validation"):
                if base and cell[part]:
                    add_forgetting(cell[part], base[part])
        texts = next((list(cell["test"]["texts"]) for cell in cells if cell["test"]), list(config.evaluation.texts))
        first = {task: self.cell(next(iter(config.arms)), task, config.seeds[0], None).config for task in config.tasks}
        facts = {task: self.domain(cell)[0].facts for task, cell in first.items()}
        general = self.general(next(iter(first.values()))).facts
        comparison = {
            "config": config.model_dump(),
            "command": command,
            "provenance": pipeline.provenance(self.base, {"general": general, "domain": facts}),
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
        comparison = redacted(comparison)
        write_text(self.output / "comparison.json", json.dumps(comparison, ensure_ascii=False))
        write_report(comparison, self.output)
        return comparison


def log_progress(done: int, total: int, started: float) -> None:
    """Say how many cells are done and how long the rest takes. started: of time.perf_counter()."""
    minutes = (time.perf_counter() - started) / done * (total - done) / 60
    logger.info("cell %d of %d done, about %.0f min left", done, total, minutes)


_NOTHING: dict[str, Any] = {
    "status": "missing",
    "error": None,
    "test": None,
    "validation": None,
    "history": [],
    "importance": None,
    "seconds": {},
    "peak_memory_bytes": None,
}


def _names(cell: Cell) -> dict[str, Any]:
    return {
        "key": cell.key,
        "arm": cell.arm,
        "method": cell.config.method,
        "task": cell.task,
        "seed": cell.seed,
        "strength": cell.strength,
        "config": cell.config.model_dump(),
    }


def write_report(comparison: dict[str, Any], output: Path) -> None:
    """Tables, figures and report.html beside comparison.json, and the cost figure where there is a cost/cost.json."""
    from hlora.comparison_figures import all_figures
    from hlora.figures import save
    from hlora.report.comparison import write_comparison_report
    from hlora.table_formats import write_tables
    from hlora.tables import all_tables

    kept = output / "cost" / "cost.json"  # of `hlora cost`
    cost = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
    comparison = redacted(comparison)
    tables, figures = all_tables(comparison), all_figures(comparison, cost)
    with building(output / "tables") as fresh_tables, building(output / "figures") as fresh_figures:
        write_tables(tables, fresh_tables)
        for name, figure in figures.items():
            save(figure, fresh_figures / name)
        write_comparison_report(comparison, tables, figures, output / "report.html", cost)
