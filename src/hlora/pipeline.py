"""The whole job, read first: record importance on general text, tune on the domain under it, evaluate, report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from hlora.config.run import Baseline, RunConfig
from hlora.importance.artefact import Importance
from hlora.model.adapters import adapted_matrices
from hlora.model.saved_adapter import load_adapter
from hlora.parallel.group import first_does, lock_directory, together
from hlora.parallel.launch import join_launch
from hlora.run.job import Job
from hlora.run.phases import (
    at_general_adapter,
    check_fits,
    lora,
    lora_after_general,
    record_phase,
    save_adapter,
    tune_phase,
)
from hlora.run.results import describe, finish, read_results, starting_results
from hlora.run.resume import forget_unfinished, measure_once, resumed_results, timed
from hlora.system.errors import ArtifactError, DataError


def run(config: RunConfig, command: str = "hlora run") -> dict[str, Any]:
    """Record, tune, evaluate and report; returns what results.json holds.

    The output directory gets config.yaml, importance/, adapter/ (PEFT), results.json, report.html and the
    TensorBoard logs of each phase. A run that was interrupted goes on: from what it had finished, and within a phase
    from its last complete checkpoint.

    Every process of a torchrun or accelerate launch calls it: the phases are divided among them (DDP, FSDP2), the first
    evaluates and writes, and all return the same. They need the output directory in common.

    Raises ConfigError when another process works on the output directory.
    """
    with _opened(config) as job:
        results = resumed_results(job, command)
        measure_once(job, results, "base", lambda: job.base)

        importance = _recorded(job, results)
        if not importance.without_move:
            measure_once(job, results, "after_general", lambda: at_general_adapter(job, importance))

        adapter = _tuned(job, results, importance)
        measure_once(job, results, "hlora", lambda: load_adapter(job.base, adapter))

        for arm in config.baselines:
            measure_once(job, results, arm, partial(_baseline, job, results, arm, importance))
        results = first_does(lambda: finish(job, results))
        first_does(lambda: forget_unfinished(job))
        return results


def record(config: RunConfig) -> Path:
    """The general phase alone; returns the importance directory."""
    with _opened(config) as job:
        results = resumed_results(job, "hlora record")
        _recorded(job, results)
        forget_unfinished(job)
        return job.output / "importance"


def tune(config: RunConfig) -> Path:
    """The domain phase alone, from <output>/importance; returns the directory of the PEFT adapter."""
    importance = Importance.load(Path(config.output) / "importance")
    with _opened(config, importance=importance) as job:
        _tuned(job, resumed_results(job, "hlora tune"), importance)
        forget_unfinished(job)
        return job.output / "adapter"


def evaluate_output(config: RunConfig, command: str = "hlora evaluate") -> dict[str, Any]:
    """Evaluate the base model and <output>/adapter, and write results.json and the report.

    Curves and times of the phases stay as an earlier results.json has them.
    """
    adapter = Path(config.output) / "adapter"
    with _opened(config, resumable=False) as job:
        _check_adapter(job, adapter)
        first_does(job.keep_config)
        results = first_does(lambda: starting_results(job, command))
        with suppress(DataError, KeyError):  # there may be none, or a damaged one, that this one replaces
            earlier = read_results(job.output)
            seconds = {k: v for k, v in earlier["seconds"].items() if not k.startswith("evaluate")}
            results |= {"history": earlier["history"], "seconds": seconds}
        measure_once(job, results, "base", lambda: job.base)
        measure_once(job, results, "hlora", lambda: load_adapter(job.base, adapter))
        if (job.output / "importance").is_dir():
            results["importance"] = describe(Importance.load(job.output / "importance"), config)
        return first_does(lambda: finish(job, results))


@contextmanager
def _opened(config: RunConfig, resumable: bool = True, importance: Importance | None = None) -> Iterator[Job]:
    """The job, its output directory locked by this process, or by the launch that it is one of.

    importance: what a domain phase will be held by. Nothing in the directory is changed until it fits.
    """
    join_launch(config.model.device)
    with lock_directory(Path(config.output)):
        job = Job.open(config, resumable)
        if importance is not None:
            with together():
                check_fits(job, importance)
        yield job


def _recorded(job: Job, results: dict[str, Any]) -> Importance:
    """The general phase's importance; from the disk, where this run had finished the phase before."""
    directory = job.output / "importance"
    if "record" in results["seconds"]:
        return Importance.load(directory)
    with timed(job, results, "record"):
        model, importance, results["history"]["record"] = record_phase(job)
        with together():
            importance.save(directory)
        results["importance"] = describe(importance, job.config)
    job.release(model)
    return importance


def _tuned(job: Job, results: dict[str, Any], importance: Importance) -> Path:
    """Directory of the domain phase's adapter."""
    directory = job.output / "adapter"
    if "tune" not in results["seconds"]:
        with timed(job, results, "tune"):
            model, results["history"]["tune"] = tune_phase(job, importance)
            save_adapter(model, directory)
        job.release(model)
    return directory


def _baseline(job: Job, results: dict[str, Any], arm: Baseline, importance: Importance) -> PeftModel:
    """The domain phase without a penalty, from the base model or from the general adapter."""
    with timed(job, results, arm):
        tuned = lora(job) if arm == "lora" else lora_after_general(job, importance=importance)
        model, results["history"][arm] = tuned
    return model


def _check_adapter(job: Job, directory: Path) -> None:
    """Raises ArtifactError when the adapter is not of the job's rank and base model, now and not after measuring that.

    The importance beside it, if there is one, knows the base model by its weights.
    """
    model = load_adapter(job.base, directory, job.config.lora.rank)
    recorded = job.output / "importance"
    if recorded.is_dir():
        importance = Importance.load(recorded)
        matrices = adapted_matrices(model, unprotected="warn")
        try:
            importance.covering([matrix for matrix in matrices if matrix.name in importance.matrices])
        except ArtifactError as error:
            raise ArtifactError(f"{recorded}: {error}") from None
    model.unload()
