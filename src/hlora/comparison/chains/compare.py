"""Computes the chains of a comparison, each once, and writes their table.

cells/<method>-<order>-<seed>.json   the answer NLL of every question of every domain, and the forgetting of general
                                     text, for the base model and after each domain
seed-<seed>/importance/              of the general phase, which HLoRA and its uniform form share
chains.md                            the table
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from hlora.comparison.chains.methods import Models
from hlora.comparison.chains.table import chains_table
from hlora.config.chains import ChainComparison
from hlora.evaluation.evaluate import add_forgetting, evaluate
from hlora.methods import CHAINS
from hlora.parallel.group import lock_directory
from hlora.parallel.launch import require_one_process
from hlora.run.chain import steps_of
from hlora.run.job import Job
from hlora.run.lengths import fit_lengths
from hlora.run.results import provenance
from hlora.run.reuse import differences
from hlora.system.errors import ConfigError, DataError
from hlora.system.files import make_directory, write_json, write_text
from hlora.system.redaction import redacted

logger = logging.getLogger("hlora")

Key = tuple[int, tuple[str, ...], str]
"""Seed, names of the domains in their order, and method."""


def compare_chains(config: ChainComparison) -> str:
    """Compute the missing cells, then write and return the table.

    Raises:
        ConfigError: A setting is wrong, or a finished cell has other settings.
        DataError: Data, or a finished cell, cannot be read.
    """
    require_one_process("hlora compare", "Start it once for each GPU, with seeds and an output of its own.")
    with lock_directory(Path(config.output)):
        cells = {key: _finished(config, *key) for key in _keys(config)}
        missing = [key for key, cell in cells.items() if cell is None]
        if missing:
            chains = _Chains(config)
            for cell in filter(None, cells.values()):
                chains.check_data(cell)
            for number, key in enumerate(missing, 1):
                cells[key] = found = chains.compute(*key)
                logger.info("%s: %.0f s; chain %d of %d", _name(*key), found["seconds"], number, len(missing))
        table = chains_table([cell for cell in cells.values() if cell])
        write_text(Path(config.output) / "chains.md", table + "\n")
    return table


def _keys(config: ChainComparison) -> list[Key]:
    """Every chain. Adapters of one domain each know no order, so they are trained once."""
    orders = _orders(config)
    return [
        (seed, order, method)
        for seed in config.seeds
        for order in orders
        for method in config.methods
        if method != "one_each" or order == orders[0]
    ]


def _orders(config: ChainComparison) -> list[tuple[str, ...]]:
    given = tuple(str(domain.name) for domain in config.domains)
    return [given, given[::-1]] if config.orders == "both" else [given]


def _name(seed: int, order: tuple[str, ...], method: str) -> str:
    return f"{method}-{'-'.join(order)}-{seed}"


def _finished(config: ChainComparison, seed: int, order: tuple[str, ...], method: str) -> dict[str, Any] | None:
    """A cell that is there. Raises ConfigError where it has other settings."""
    path = Path(config.output) / "cells" / f"{_name(seed, order, method)}.json"
    if not path.is_file():
        return None
    try:
        cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kept, _, _ = cell["config"], cell["chain"], cell["provenance"]["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"expected a finished chain; {type(error).__name__}"
        raise DataError(f"{path}: {problem}. Delete it, and run again.") from None
    now = _shown(config)
    differ = differences({k: v for k, v in kept.items() if k in now}, {k: v for k, v in now.items() if k in kept})
    if differ:
        raise ConfigError(f"output: {path} has other settings: {', '.join(differ[:6])}. Name another output.")
    return cell


def _shown(config: ChainComparison) -> dict[str, Any]:
    """The settings as a cell keeps them, without what its name says and what changes no number."""
    shown = redacted(config.model_dump(exclude={"output", "seed", "seeds", "methods", "orders", "domain"}))
    found: dict[str, Any] = json.loads(json.dumps(shown))
    return found


class _Chains:
    """The base model and the measures of it, which all chains share."""

    def __init__(self, config: ChainComparison) -> None:
        self.config = config
        first, *_ = steps_of(config)
        self.opened = Job.open(first.model_copy(update={"output": config.output}))
        self.base: dict[str, Any] = {}
        self.jobs = {seed: self._jobs(seed) for seed in config.seeds}  # an unusable row is reported now

    def _jobs(self, seed: int) -> dict[str, Job]:
        """A job for each domain, by name. All share the model and the general text."""
        found: dict[str, Job] = {}
        output = Path(self.config.output) / f"seed-{seed}"
        make_directory(output)
        for step in steps_of(self.config):
            fitted = fit_lengths(step.model_copy(update={"seed": seed, "after": None}), self.opened.base)
            job = Job(fitted, self.opened.base, self.opened.tokenizer, output)
            found[Path(step.output).name] = job
            job.general = next(iter(found.values())).general
            job.domain  # noqa: B018
        return found

    def facts(self, seed: int) -> dict[str, dict[str, Any]]:
        """What is known of the data, by domain, and of the general text."""
        jobs = self.jobs[seed]
        return {name: job.domain.facts for name, job in jobs.items()} | {
            "general": next(iter(jobs.values())).general.facts
        }

    def check_data(self, cell: dict[str, Any]) -> None:
        """Raises ConfigError if a finished chain has learned other data than those here."""
        now = self.facts(cell["seed"])
        for name, facts in cell["provenance"]["data"].items():
            for part, digest in facts.items():
                if "sha256" in part and now[name].get(part) != digest:
                    raise ConfigError(f"output: {self.config.output} has chains of other data: {name}. Name another.")

    def compute(self, seed: int, order: tuple[str, ...], method: str) -> dict[str, Any]:
        """Train and measure one chain, and write its cell."""
        jobs = {name: self.jobs[seed][name] for name in order}
        self.base = self.base or _measure(jobs, self.opened.base, {})
        started = time.perf_counter()
        chain = self._measured(CHAINS[method].function()(list(jobs.values())), jobs)
        cell = {"method": method, "seed": seed, "seconds": time.perf_counter() - started, "chain": chain}
        cell |= {"config": _shown(self.config), "provenance": provenance(self.opened.base, self.facts(seed))}
        path = Path(self.config.output) / "cells" / f"{_name(seed, order, method)}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, cell)
        return cell

    def _measured(self, models: Models, jobs: dict[str, Job]) -> dict[str, Any]:
        """The chain as results.json of a run has it: measures of every domain and of general text after each step."""
        names, base = list(jobs), self.base
        chain: dict[str, Any] = {"domains": names, "base": base["domains"], "after": {}, "forgetting": {}, "texts": {}}
        chain["before"] = {names[0]: base["domains"][names[0]]}
        for number, (name, model) in enumerate(zip(names, models, strict=True)):
            found = _measure(jobs, model, base)
            chain["after"][name] = found["domains"]
            chain["forgetting"][name], chain["texts"][name] = found["forgetting"], found["texts"]
            if number + 1 < len(names):
                chain["before"][names[number + 1]] = found["domains"][names[number + 1]]
        return chain


def _measure(jobs: dict[str, Job], model: Any, base: dict[str, Any]) -> dict[str, Any]:
    """Measures of every domain, by name, and of the general texts, with their forgetting where there is a base."""
    found: dict[str, Any] = {"domains": {}}
    for number, (name, job) in enumerate(jobs.items()):
        texts = {} if number else job.general.evaluation
        measured = evaluate(model, job.tokenizer, texts, job.domain, job.config.evaluation)
        found["domains"][name] = measured["domain"]
        if number == 0:
            found["texts"] = measured["texts"]
    if base:
        add_forgetting(found, base)
    return found
