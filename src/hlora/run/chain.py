"""Domain after domain: what each run of a chain knows of those before it, and what has become of their domains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hlora.config.domains import RunDomain
from hlora.config.reading import parse_config
from hlora.config.run import RunConfig
from hlora.config.sections import ImportanceConfig
from hlora.data.domain import DomainRows, TokenLimits
from hlora.data.validation import rows_of_run
from hlora.evaluation.evaluate import evaluate
from hlora.methods import BEFORE
from hlora.parallel.fsdp import shard
from hlora.parallel.group import on_main, raise_on_all
from hlora.parallel.launch import sharding
from hlora.run.job import Job
from hlora.run.results import read_results, runs_inside
from hlora.run.resume import UNFINISHED, timed
from hlora.system.errors import ConfigError, DataError

logger = logging.getLogger("hlora")

EARLIER = "evaluate earlier domains"
"""The phase that scores the tuned model on the domains before this one."""


def steps_of(config: RunConfig) -> list[RunConfig]:
    """The runs that `domains` stands for, each after the one before it; of a single domain, the configuration itself.

    Method and encoding of the importance are those of the first.
    """
    if not config.domains:
        return [config]
    found: list[RunConfig] = []
    after, importance = config.after, config.importance
    for domain in config.domains:
        single = RunDomain(**domain.model_dump(exclude={"name"}))
        changes: dict[str, Any] = {"output": str(Path(config.output, str(domain.name))), "after": after}
        changes |= {"domain": single, "domains": [], "importance": importance}
        found.append(config.model_copy(deep=True, update=changes))
        after = found[-1].output
        importance = ImportanceConfig(xi=importance.xi, unprotected=importance.unprotected)
    return found


def check_following(job: Job, following: Sequence[RunConfig], overwrite: bool) -> None:
    """Check the later domains of a chain before this one is tuned.

    Raises:
        ConfigError: a later one is finished, so its adapter does not come from this one.
        DataError: a file of a later one cannot be used.
    """
    with raise_on_all():
        for step in following:
            if (Path(step.output) / "results.json").is_file() and not overwrite:
                raise ConfigError(
                    f"output: {step.output} is finished, but {job.config.output}, which comes before it, is not. Name "
                    "another output, or replace what is there: --overwrite."
                )
            rows_of(job, step)


def rows_of(job: Job, config: RunConfig) -> DomainRows:
    """The domain of another run of the chain."""
    return rows_of_run(config, TokenLimits.of(job.base, job.tokenizer, config.training.tune_arguments()))


class Earlier(NamedTuple):
    """A finished run of the chain."""

    name: str
    config: RunConfig
    results: dict[str, Any]


def earlier_runs(config: RunConfig) -> list[Earlier]:
    """The runs that `config` comes after, the first one first. Empty without `after`.

    Raises:
        ConfigError: one of them is not finished, or the chain goes in a circle.
    """
    found: list[Earlier] = []
    after, seen = config.after, {Path(config.output).resolve()}
    while after is not None:
        place = Path(after)
        if place.resolve() in seen:
            raise ConfigError(f"after: {after} comes after this run itself. Name another output.")
        seen.add(place.resolve())
        if (place / UNFINISHED).exists() or not (place / "results.json").is_file():
            instead = runs_inside(place) or "Finish it first with `hlora run`."
            raise ConfigError(f"after: {after} is not a finished run. {instead}")
        results = read_results(place)
        before: RunConfig = parse_config(dict(results.get("config") or {}), f"{after}/results.json")
        found.insert(0, Earlier(_name(after, found), before, results))
        after = before.after
    return found


def rows_again(job: Job, earlier: list[Earlier]) -> dict[str, DomainRows]:
    """The domains before this one, by name.

    Raises:
        DataError: the test rows of one are not those that were scored then.
    """
    with raise_on_all():
        return {each.name: _rows_again(job, each) for each in earlier}


def measure_earlier(job: Job, results: dict[str, Any], earlier: list[Earlier], sets: dict[str, DomainRows]) -> None:
    """Score the tuned model on the domains before this one, and put the chain so far into `results`.

    sets: what `rows_again` returned.
    """
    if not earlier or "chain" in results:
        return
    model = job.with_adapter(job.output / "adapter")
    with timed(job, results, EARLIER):
        if sharding():
            shard(model)
        measured = {}
        for name, rows in sets.items():
            logger.info("evaluating: %s", name)
            measured[name] = on_main(partial(_domain_measures, job, model, rows), in_step=sharding())
        results["chain"] = _extended(_chain_of(earlier), _name(job.config.output, earlier), results["arms"], measured)
    job.release(model)


def _domain_measures(job: Job, model: Any, rows: DomainRows) -> dict[str, Any]:
    settings = job.config.evaluation.model_copy(update={"generate": 0})
    domain: dict[str, Any] = evaluate(model, job.tokenizer, {}, rows, settings)["domain"]
    return domain


def _rows_again(job: Job, earlier: Earlier) -> DomainRows:
    config = earlier.config
    rows = rows_of(job, config)
    then = earlier.results["provenance"]["data"]["domain"]["test_sha256"]
    if rows.facts["test_sha256"] != then:
        raise DataError(
            f"{config.domain.test}: not the test rows that {config.output} was evaluated on, so what was forgotten "
            "of them cannot be measured. Bring them back, or evaluate that run again."
        )
    return rows


def _chain_of(earlier: list[Earlier]) -> dict[str, Any]:
    """The chain up to the last of the earlier runs: that run's own, or of a first run its arms."""
    *_, last = earlier
    if "chain" in last.results:
        found: dict[str, Any] = last.results["chain"]
        return found
    empty: dict[str, Any] = {"domains": [], "base": {}, "before": {}, "after": {}, "forgetting": {}}
    return _extended(empty, last.name, last.results["arms"], {})


def _extended(chain: dict[str, Any], name: str, arms: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The chain with one domain more, from the arms of its run and the measures of the earlier domains after it."""
    before = arms.get(BEFORE) or arms.get("after_general") or {}
    return {
        "domains": [*chain["domains"], name],
        "base": {**chain["base"], name: arms["base"]["domain"]},
        "before": {**chain["before"], name: before.get("domain") or {}},
        "after": {**chain["after"], name: {**earlier, name: arms["hlora"]["domain"]}},
        "forgetting": {**chain["forgetting"], name: arms["hlora"].get("forgetting") or {}},
    }


def _name(output: str, others: list[Earlier]) -> str:
    """The directory's own name; its whole path where another run of the chain has that name."""
    name = Path(output).name
    return output if any(each.name == name for each in others) else name
