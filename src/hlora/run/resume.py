"""An interrupted run resumes from the phases it had finished, which unfinished.json records."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

from hlora.evaluation.evaluate import add_forgetting
from hlora.importance.artefact import Importance
from hlora.parallel.fsdp import shard
from hlora.parallel.group import is_main, on_main, raise_on_all, world_size
from hlora.parallel.launch import sharding
from hlora.run.job import Job
from hlora.run.results import measure, starting_results
from hlora.system.errors import first_line
from hlora.system.files import write_json
from hlora.system.redaction import without_secret_fields
from hlora.training.checkpoint import seconds_before
from hlora.training.checkpoint_files import remove_checkpoints

logger = logging.getLogger("hlora")

UNFINISHED = "unfinished.json"  # what a run has finished so far; removed when the run is complete
_UNSEEN = ("report_to", "run_name", "logging_steps")  # training arguments that change no number
OF_MEASURES = ("max_tokens", "stride", "accuracy", "generate", "max_new_tokens", "batch_size")
"""Fields of `evaluation` that change no training."""


@contextmanager
def timed(job: Job, results: dict[str, Any], phase: str) -> Iterator[None]:
    """Time a phase. When it ends, write what is finished so far to disk."""
    before = results["seconds"].get(phase, 0.0)  # of a run that was interrupted between training and measuring
    if not before and job.resumable and is_main():
        before = seconds_before(job.output / "logs" / phase)
    started = time.perf_counter()
    with nullcontext() if job.plan is None else job.plan.during(phase):
        yield
    results["seconds"][phase] = before + time.perf_counter() - started
    if job.resumable:
        with raise_on_all():
            if is_main():
                write_json(job.output / UNFINISHED, {**_made_from(job), "results": results})


def measure_once(
    job: Job, results: dict[str, Any], arm: str, make: Callable[[], Any], importance: Importance | None = None
) -> None:
    """Measure the model that `make` returns, unless this run has already done so.

    importance: where the general phase ended, for the drift from there.
    """
    if arm in results["arms"]:
        return
    model = make()
    logger.info("evaluating: %s", arm)
    with timed(job, results, f"evaluate {arm}"):
        if sharding():
            shard(model)
        results["arms"][arm] = on_main(lambda: measure(job, model, importance), in_step=sharding())
        add_forgetting(results["arms"][arm], results["arms"]["base"])
    job.release(model)


def resumed_results(job: Job, command: str) -> dict[str, Any]:
    """Results of an interrupted run of the same configuration and data, or those that a new run starts with."""
    return on_main(lambda: _unfinished_here(job, command))


def _unfinished_here(job: Job, command: str) -> dict[str, Any]:
    try:
        kept = json.loads((job.output / UNFINISHED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        kept = {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s: %s; restarting", job.output / UNFINISHED, first_line(error))
        kept = {}
    kept = kept if isinstance(kept, dict) else {}  # changed by hand
    mine = _made_from(job)
    another_number = kept.get("processes", mine["processes"]) != mine["processes"]
    if kept.get("made_from") == mine["made_from"] or (another_number and kept.get("by_rows") == mine["by_rows"]):
        logger.info("resuming the run of %s", kept["results"]["provenance"]["started"])
        results = {**kept["results"], "config": job.config.for_a_file(), "command": command}
        if results["config"] != kept["results"]["config"]:
            job.keep_config()
        return results if kept.get("measured_by") == mine["measured_by"] else _unmeasured(results)
    if kept:
        logger.warning("output: the unfinished run in %s had other settings or data; restarting", job.output)
    forget_unfinished(job)
    for of_another_run in ("results.json", "report.html"):
        (job.output / of_another_run).unlink(missing_ok=True)
    job.keep_config()
    results = starting_results(job, job.base, command)
    write_json(job.output / UNFINISHED, {**mine, "results": results})
    return results


def _unmeasured(results: dict[str, Any]) -> dict[str, Any]:
    """The results without measures, where those of another evaluation cannot stand beside new ones."""
    logger.warning("evaluation: other settings than before; what was trained is kept, and measured anew")
    seconds = {phase: each for phase, each in results["seconds"].items() if not phase.startswith("evaluate")}
    return {**{part: each for part, each in results.items() if part != "chain"}, "arms": {}, "seconds": seconds}


def _made_from(job: Job) -> dict[str, Any]:
    """Two digests of everything that determines what a run trains, and the settings that only its measures depend on.

    One digest is of the configuration as written. In the other, batch size × accumulation × processes are replaced by
    the rows of a step: by it, a run resumes in another number of processes. Secrets count in neither.
    """
    config = without_secret_fields(job.config.model_dump(exclude={"output"}))
    measured_by = {name: config["evaluation"].pop(name) for name in OF_MEASURES}
    config["training"] |= {part: seen(config["training"][part]) for part in ("common", "record", "tune")}
    facts: dict[str, Any] = {"config": config, "hlora": version("hlora")}
    facts |= {"general": job.general.facts, "domain": job.domain.facts}
    if job.given is not None and job.config.is_given_importance:  # another one may have come under the same name
        facts["given"] = job.given.document()
    written = _digest(facts)
    training = job.config.training
    facts["config"]["training"] = [
        seen(by_rows_of_a_step(each)) for each in (training.record_arguments(), training.tune_arguments())
    ]
    digests = {"made_from": written, "by_rows": _digest(facts)}
    return {**digests, "processes": world_size(), "measured_by": measured_by}


def seen(arguments: dict[str, Any]) -> dict[str, Any]:
    """Training arguments without those that change no number."""
    return {name: value for name, value in arguments.items() if name not in _UNSEEN}


def by_rows_of_a_step(arguments: dict[str, Any]) -> dict[str, Any]:
    """Training arguments in which the rows of a step replace batch size × accumulation × processes."""
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # Trainer's defaults
    rows = world_size() * math.prod(arguments.get(name, default) for name, default in sizes.items())
    return {name: value for name, value in arguments.items() if name not in sizes} | {"rows_of_a_step": rows}


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def forget_unfinished(job: Job) -> None:
    """Remove what an interrupted run would resume from."""
    if not is_main():
        return
    (job.output / UNFINISHED).unlink(missing_ok=True)
    for phase in (job.output / "logs").glob("*"):
        remove_checkpoints(phase)
