"""The whole job; read it first: record importance on general text, tune on the domain under it, evaluate, report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from hlora.config.run import RunConfig
from hlora.importance.artefact import Importance
from hlora.methods import BEFORE
from hlora.parallel.group import lock_directory, on_main, raise_on_all
from hlora.parallel.launch import join_launch
from hlora.run.chain import check_following, earlier_runs, measure_earlier, rows_again, steps_of
from hlora.run.job import Job
from hlora.run.phases import at_general_adapter, check_fits
from hlora.run.plan import plan_of
from hlora.run.results import describe, finish, read_results, starting_results
from hlora.run.resume import forget_unfinished, measure_once, resumed_results
from hlora.run.reuse import already_done, given_importance, with_other_arms
from hlora.run.steps import baseline, check_adapter, recorded, recorded_before, tuned
from hlora.system.errors import ConfigError, DataError


def run(config: RunConfig, command: str = "hlora run", overwrite: bool = False) -> dict[str, Any]:
    """Record, tune, evaluate and report.

    The output directory gets config.yaml, importance/, adapter/ (PEFT), results.json, report.html and the TensorBoard
    logs of each phase. An interrupted run resumes after its last finished step, and within a phase from its last
    complete checkpoint. A finished run is not repeated. Recording is skipped if `importance.use` names an importance,
    or the output directory holds this run's. Each of several `domains` is a run in <output>/<name>.

    Args:
        config: The settings.
        command: The command that repeats the run, for the report.
        overwrite: Replace a finished run. An importance that was recorded with the same settings is kept.

    Returns:
        What results.json holds; of several domains, that of the last.

    In several processes every one of a torchrun or accelerate launch calls it. They share the work of each phase (DDP,
    FSDP2) and need a common output directory. The main one evaluates and writes, and all return the same.

    Raises:
        ConfigError: Another process works on the output directory, or it holds a finished run with other settings.
    """
    steps = steps_of(config)
    for number, step in enumerate(steps, 1):
        results = _run(step, steps[number:], command, overwrite)
    return results


def _run(config: RunConfig, following: Sequence[RunConfig], command: str, overwrite: bool) -> dict[str, Any]:
    """One domain. The runs of later domains are checked before it trains."""
    with _locked(config):
        if already_done(config, "results.json", overwrite):
            results = on_main(lambda: read_results(Path(config.output)))
            return {**results, "config": {**results.get("config", {}), "output": config.output}}  # perhaps moved since
        earlier = earlier_runs(config)
        job = _open(config, given_importance(config))
        sets = rows_again(job, earlier)
        check_following(job, following, overwrite)
        here = recorded_before(job, overwrite)
        results = resumed_results(job, command)
        job.plan = plan_of(job, results, recorded=here is not None)
        measure_once(job, results, "base", lambda: job.base)

        importance = recorded(job, results, here)
        if not importance.without_move:
            start = "after_general" if config.after is None else BEFORE
            measure_once(job, results, start, lambda: at_general_adapter(job, importance))

        adapter = tuned(job, results, importance)
        measure_once(job, results, "hlora", lambda: job.with_adapter(adapter), importance)

        measure_earlier(job, results, earlier, sets)

        for arm in config.baselines:
            measure_once(job, results, arm, partial(baseline, job, results, arm, importance), importance)
        results = on_main(lambda: finish(job, results))
        on_main(lambda: forget_unfinished(job))
        return results


def record(config: RunConfig, overwrite: bool = False) -> Path:
    """Run the general phase only, unless its importance exists; returns the importance directory."""
    _check_single(config)
    if config.is_given_importance:
        field = "after" if config.after else "importance.use"
        raise ConfigError(f"{field}: {config.after or config.importance.use} is recorded already. Leave {field} out.")
    with _locked(config):
        job = _open(config)
        if recorded_before(job, overwrite) is None:
            results = resumed_results(job, "hlora record")
            recorded(job, results, None)
            forget_unfinished(job)
        return job.output / "importance"


def tune(config: RunConfig, overwrite: bool = False) -> Path:
    """Run the domain phase only, under `importance.use` or <output>/importance; returns the adapter directory."""
    _check_single(config)
    importance = given_importance(config) or Importance.load(Path(config.output) / "importance")
    with _locked(config):
        adapter = Path(config.output) / "adapter"
        if not already_done(config, "adapter", overwrite):
            job = _open(config, importance)
            tuned(job, resumed_results(job, "hlora tune"), importance)
            forget_unfinished(job)
        return adapter


def evaluate_output(config: RunConfig, command: str = "hlora evaluate") -> dict[str, Any]:
    """Evaluate the base model and <output>/adapter, and write results.json and the report.

    Curves and times of the phases are taken from an earlier results.json, and the measures of baselines where settings
    and data are still theirs. A run after another is also measured before its domain phase and on the earlier domains.
    """
    _check_single(config)
    adapter = Path(config.output) / "adapter"
    with _locked(config):
        earlier = earlier_runs(config)
        job = _open(config, given_importance(config), resumable=False)
        sets = rows_again(job, earlier)
        check_adapter(job, adapter)
        results = on_main(partial(starting_results, job, job.base, command))
        kept: dict[str, Any] = {"arms": {}}
        with suppress(DataError, KeyError, AttributeError):  # it may be missing or damaged; this one replaces it
            kept = read_results(job.output)
            seconds = {k: v for k, v in kept["seconds"].items() if not k.startswith("evaluate")}
            results |= {"history": kept["history"], "seconds": seconds}
        measure_once(job, results, "base", lambda: job.base)
        importance = job.given
        if importance is not None and earlier:
            measure_once(job, results, BEFORE, partial(at_general_adapter, job, importance))
        if importance is None and (job.output / "importance").is_dir():
            importance = Importance.load(job.output / "importance")
        measure_once(job, results, "hlora", lambda: job.with_adapter(adapter), importance)
        measure_earlier(job, results, earlier, sets)
        if importance is not None:
            results["importance"] = describe(importance, config)
        results = on_main(lambda: with_other_arms(results, kept, job.config))
        on_main(job.keep_config)  # not earlier: after Ctrl-C, config.yaml must still be that of results.json
        return on_main(lambda: finish(job, results))


def _check_single(config: RunConfig) -> None:
    """Raises ConfigError for a chain."""
    if config.domains:
        place = Path(config.output) / str(config.domains[-1].name) / "config.yaml"
        raise ConfigError(f"domains: only `hlora run` and `hlora check` take several. Use one run's own file: {place}.")


@contextmanager
def _locked(config: RunConfig) -> Iterator[None]:
    """Lock the output directory, for this process or for its launch."""
    join_launch(config.model.device)
    with lock_directory(Path(config.output)):
        yield


def _open(config: RunConfig, given: Importance | None = None, resumable: bool = True) -> Job:
    """Open the job with the importance that it is given. Changes nothing on disk until every check has passed."""
    job = Job.open(config, resumable, given)
    if given is not None:
        with raise_on_all():
            check_fits(job, given)
    return job
