"""`hlora check`: what a run will train on and what it will take. It writes to temporary directories alone."""

from __future__ import annotations

import io
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback

from hlora.before.cost import PhaseCost, measured_evaluation, measured_phase, now, peak_memory
from hlora.before.rows import TrainedRow, trained_row
from hlora.config.run import RunConfig
from hlora.importance.artefact import Importance
from hlora.model.lora import attach_lora
from hlora.run.chain import earlier_runs, rows_again
from hlora.run.job import Job
from hlora.run.phases import check_fits, domain_recorder, protected, recorder_for, save_adapter, squared_gradients
from hlora.run.reuse import given_importance, is_finished
from hlora.system.errors import ConfigError
from hlora.system.files import check_directory, refuse_links

SHOWN = 3  # rows
_ROWS = 2_000  # that are tokenised to count tokens; of more, evenly spaced ones
_CHARACTERS = 1_000_000  # of general text that are tokenised to count tokens
_SAMPLES = 4  # that the check has the model write where it writes the general text


@dataclass
class Check:
    """What `hlora check` found."""

    job: Job
    output: Path
    """The configured one, which is not touched."""
    opened: float
    """Seconds of loading the model and the data."""
    shown: list[TrainedRow] = field(default_factory=list)
    tokens: int = 0
    """Of all training rows."""
    trained: int = 0
    """Those of them that are trained."""
    validation_tokens: int = 0
    """Of all validation rows."""
    general_tokens: int = 0
    general_rows: int = 0
    counted: bool = True
    """False: tokens are scaled from a sample."""
    costs: list[PhaseCost] = field(default_factory=list)
    disk: int = 0
    """Bytes that a finished run leaves, about."""
    checkpoints: int = 0
    """Bytes more while it trains, about."""
    free: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of the whole run, loading included."""
        return self.opened + sum(cost.seconds for cost in self.costs)


@contextmanager
def checked(config: RunConfig) -> Iterator[Check]:
    """The data of a run, and an estimate of its time, memory and disk. Writes nothing to the output directory.

    Every check of a run is made. Yields inside a temporary directory, which is removed afterwards.

    Raises:
        ConfigError: A field is wrong, as in a run.
        DataError: A file cannot be used, as in a run.
    """
    check_directory(Path(config.output))
    refuse_links(Path(config.output))
    notes = _notes(config)
    given = given_importance(config)
    earlier = earlier_runs(config)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hlora-check-") as scratch:
        general = config.general.model_copy(
            update={
                "mixture": [_few_samples(part) for part in config.general.mixture],
                **({"samples": _SAMPLES} if _is_written(config.general) else {}),
            }
        )
        place = Path(scratch) / "output"
        job = Job.open(config.model_copy(update={"output": str(place), "general": general}), given=given)
        if given is not None:
            check_fits(job, given)
        rows_again(job, earlier)
        found = Check(job, Path(config.output), time.perf_counter() - started, notes=notes)
        rows = _count(found)
        importance = _measure(found, rows, len(earlier))
        _measure_disk(found, importance)
        yield found


def _notes(config: RunConfig) -> list[str]:
    notes = []
    try:
        if is_finished(config, "results.json", overwrite=False):
            notes.append(f"{config.output} is finished with these settings: a run would show its results.")
    except ConfigError as error:
        notes.append(f"a run would be refused: {error}")
    if any(_is_written(part) for part in [config.general, *config.general.mixture]):
        notes.append(f"the model writes general text itself: {_SAMPLES} samples here, which are counted but not timed.")
    if config.penalty.budget is not None:
        notes.append("the probes of the forgetting budget are not timed.")
    if config.domain.validation is not None:
        notes.append("evaluations on the validation rows, while the domain phase trains, are not timed.")
    return notes


def _is_written(part: Any) -> bool:
    return part.source == "model" and not getattr(part, "mixture", [])


def _few_samples(part: Any) -> Any:
    return part.model_copy(update={"samples": _SAMPLES}) if _is_written(part) else part


def _count(found: Check) -> tuple[Dataset, Dataset]:
    """Count tokens; returns the general and the domain rows that they were counted on."""
    job, arguments = found.job, found.job.config.training.tune_arguments()
    examples, held_out = job.domain.train, job.domain.validation
    step = math.ceil(len(examples) / _ROWS)
    rows = [trained_row(job.tokenizer, example, arguments) for example in examples[::step]]
    validated = [trained_row(job.tokenizer, example, arguments) for example in held_out[::step]]
    found.validation_tokens = round(sum(len(row.ids) for row in validated) * len(held_out) / max(1, len(validated)))
    found.shown = [trained_row(job.tokenizer, example, arguments) for example in examples[:SHOWN]]
    scale = len(examples) / len(rows)
    found.tokens = round(scale * sum(len(row.ids) for row in rows))
    found.trained = round(scale * sum(sum(row.mask) for row in rows))
    domain = Dataset.from_list([{"input_ids": row.ids, "completion_mask": row.mask} for row in rows])

    documents, size = [], 0
    for document in job.general.train:
        documents.append(document)
        size += len(document)
        if size >= _CHARACTERS:
            break
    sample = type(job.general)(documents, job.general.evaluation)
    general = sample.dataset(job.tokenizer, job.config.training.record_arguments())
    scale = sum(map(len, job.general.train)) / max(1, size)
    found.general_tokens = round(scale * sum(map(len, general["input_ids"])))
    found.general_rows = round(scale * len(general))
    found.counted = step == 1 and len(documents) == len(job.general.train)
    return general, domain


def _measure(found: Check, rows: tuple[Dataset, Dataset], earlier: int) -> Importance | None:
    """Time each phase on one step; returns the importance, where a step could be recorded."""
    job, config = found.job, found.job.config
    importance = job.given
    if importance is None:
        importance = _measured_recording(found, rows[0])
    arguments, total = config.training.tune_arguments(), len(job.domain.train)
    callbacks: list[TrainerCallback] = []
    if importance is None:
        model = attach_lora(job.base, config.lora, config.seed)
        found.notes.append("no step could be recorded here, so the domain phase was timed without its penalty.")
    else:
        model, penalty = protected(job, importance, config.penalty.phi, config.penalty.layer_weights)
        recorder = domain_recorder(job, model, importance)
        callbacks = [each.callback() for each in (recorder, penalty) if each is not None]
    cost = measured_phase(job, model, "tune", rows=rows[1], total_rows=total, arguments=arguments, callbacks=callbacks)
    found.costs.append(cost)
    found.costs += [PhaseCost(arm, cost.count, cost.each) for arm in config.baselines]
    start = importance is None or not importance.without_move
    if not math.isnan(cost.each):
        with redirect_stdout(io.StringIO()):  # its progress bars
            found.costs.append(measured_evaluation(job, model, 2 + start + len(config.baselines) + 2 * earlier))
    adapter = save_adapter(job, model, job.output / "adapter")
    found.disk += _bytes(adapter)
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    found.checkpoints = 2 * 3 * weights  # two of them, each with the two moments of AdamW
    job.release(model)
    return importance


def _measured_recording(found: Check, rows: Dataset) -> Importance | None:
    """Time the general phase on one step, or on two sequences; returns what was recorded."""
    job, config = found.job, found.job.config
    model: PeftModel = attach_lora(job.base, config.lora, config.seed)
    try:
        if config.in_one_pass:
            sequences = config.importance.sequences
            job.config.importance.sequences = min(2, sequences)
            started = now()
            importance = squared_gradients(job, model)
            each = (now() - started) / config.importance.sequences
            job.config.importance.sequences = sequences
            found.costs.append(PhaseCost("record", sequences, each, peak_memory(model)))
            return importance
        recorder = recorder_for(model, config.importance, config.seed)
        cost = measured_phase(
            job,
            model,
            "record",
            rows=rows,
            total_rows=found.general_rows,
            arguments=config.training.record_arguments(),
            callbacks=[recorder.callback()],
        )
        found.costs.append(cost)
        return recorder.consolidate(config.importance.xi, job.general.facts) if recorder.steps else None
    finally:
        job.release(model)


def _measure_disk(found: Check, importance: Importance | None) -> None:
    if importance is not None:
        importance.save(found.job.output / "importance")
        written = _bytes(found.job.output / "importance")
        copies = (not found.job.config.is_given_importance) + (found.job.config.penalty.anchor == "general")
        found.disk += copies * written
        found.checkpoints += 2 * written
    place = found.output.resolve()
    while not place.exists():
        place = place.parent
    found.free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        found.notes.append(f"output: a run cannot write to {place}. Name another output.")


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
