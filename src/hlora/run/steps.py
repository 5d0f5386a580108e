"""The steps of a run that train: each is done once, and a resumed run takes what it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from hlora.config.run import Baseline
from hlora.importance.artefact import Importance
from hlora.model.adapters import adapted_matrices
from hlora.parallel.group import raise_on_all
from hlora.run.inputs import CONTINUED
from hlora.run.job import Job
from hlora.run.phases import check_fits, lora, lora_after_general, record_phase, save_adapter, tune_phase
from hlora.run.results import describe
from hlora.run.resume import timed
from hlora.run.reuse import importance_here
from hlora.system.errors import ArtifactError


def recorded_before(job: Job, overwrite: bool) -> Importance | None:
    """The importance that the configuration names, or this run's if the output directory holds it."""
    if job.given is not None:
        return job.given
    with raise_on_all():
        here = importance_here(job, overwrite)
        if here is not None:
            check_fits(job, here)
    return here


def recorded(job: Job, results: dict[str, Any], here: Importance | None) -> Importance:
    """The importance of this run: `here`, or recorded by the general phase."""
    if here is not None:
        results["importance"] = results["importance"] or describe(here, job.config)
        return here
    with timed(job, results, "record"):  # saves its curve first: a resumed run takes a saved importance as finished
        model, importance, results["history"]["record"] = record_phase(job)
        results["importance"] = describe(importance, job.config)
    with raise_on_all():
        importance.save(job.output / "importance")
    job.release(model)
    return importance


def tuned(job: Job, results: dict[str, Any], importance: Importance) -> Path:
    """Directory of the domain phase's adapter."""
    directory = job.output / "adapter"
    if "tune" not in results["seconds"]:
        with timed(job, results, "tune"):
            model, results["history"]["tune"], total = tune_phase(job, importance)
            save_adapter(job, model, directory)
            if total is not None:
                with raise_on_all():
                    total.save(job.output / CONTINUED)
        job.release(model)
    return directory


def baseline(job: Job, results: dict[str, Any], arm: Baseline, importance: Importance) -> PeftModel:
    """The domain phase without a penalty, from the base model or from the general adapter."""
    with timed(job, results, arm):
        found = lora(job) if arm == "lora" else lora_after_general(job, importance=importance)
        model, results["history"][arm] = found
    return model


def check_adapter(job: Job, directory: Path) -> None:
    """Raises ArtifactError if the adapter has not the job's rank and base model, before that model is measured.

    An importance in the output directory recognises the base model by its weights.
    """
    model = job.with_adapter(directory, job.config.lora.rank)
    recorded = job.output / "importance"
    if recorded.is_dir():
        importance = Importance.load(recorded)
        matrices = adapted_matrices(model, unprotected="warn")
        try:
            importance.covering([matrix for matrix in matrices if matrix.name in importance.matrices])
        except ArtifactError as error:
            raise ArtifactError(f"{recorded}: {error}") from None
    job.release(model)
