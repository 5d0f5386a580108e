"""What the cells of a comparison share: the general phase of each seed, with its recorded importance.

recording.json           settings and data that determine it, losses, seconds
adapter.safetensors      the general adapter's factors of each matrix, with adapter.json
<kind>.safetensors       state of one recorder: factored, float32 or squares; all record the same training

Squared gradients and Fisher information at the base model need no general phase. They are kept as an Importance.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from hlora.config.comparison import CellConfig
from hlora.config.sections import ImportanceConfig
from hlora.importance.artefact import Importance
from hlora.importance.squared_gradients import fisher_information
from hlora.methods import METHODS
from hlora.model.adapters import adapted_matrices
from hlora.model.lora import attach_lora
from hlora.run.job import Job
from hlora.run.phases import recorder_for, squared_gradients
from hlora.system.digest import digest
from hlora.system.files import atomic_directory, write_json
from hlora.system.locks import try_lock
from hlora.system.redaction import without_secret_fields
from hlora.training.checkpoint_files import load_state, save_state
from hlora.training.train import train

logger = logging.getLogger("hlora")

Part = Literal["", "general", "squares", "fisher"]


class Busy(Exception):
    """Another process is making what this one needs."""


def shared_part(config: CellConfig) -> Part:
    """The part that a cell needs and shares with other cells; empty for none."""
    needs = METHODS[config.method].needs
    if needs is None or needs == "fisher":
        return needs or ""
    return "squares" if config.in_one_pass else "general"


def shared_importance(job: Job) -> Importance | None:
    """What the job's method needs: recorded importance, Fisher information or nothing.

    Raises:
        Busy: Another process is making it. So do the functions below.
    """
    assert isinstance(job.config, CellConfig)
    part = shared_part(job.config)
    return None if not part else fisher(job) if part == "fisher" else importance(job)


def importance(job: Job) -> Importance:
    """The importance of the job's general text, by the job's method and encoding. Source: Eq. 13."""
    config = job.config
    if config.in_one_pass:
        return _squared_gradients(job)
    directory = general_phase(job)
    model = attach_lora(job.base, config.lora, config.seed)
    recorder = recorder_for(model, config.importance, config.seed)
    recorder.load_state_dict(load_state(directory, recorder.kind))
    factors = load_state(directory, "adapter")
    with torch.no_grad():
        for matrix in recorder.matrices:
            matrix.A.copy_(factors[f"{matrix.name}.A"])
            matrix.B.copy_(factors[f"{matrix.name}.B"])
    found = recorder.consolidate(config.importance.xi, job.general.facts)
    model.unload()
    return found


def general_phase(job: Job) -> Path:
    """The directory of the job's general phase, which is trained if the directory does not exist."""
    config = job.config
    kinds = sorted({_kind(each): each for each in (*job.recorded, config.importance)}.items())

    def record(directory: Path) -> None:
        model = attach_lora(job.base, config.lora, config.seed)
        recorders = {kind: recorder_for(model, each, config.seed) for kind, each in kinds}
        logs = job.output / "logs" / f"general phase, seed {config.seed}"
        callbacks = [recorder.callback(config.importance.stop_at_move) for recorder in recorders.values()]
        started = time.perf_counter()
        dataset = job.general.dataset(job.tokenizer, training)
        history = train(
            model, job.tokenizer, dataset, output=logs, arguments=training, seed=config.seed, callbacks=callbacks
        )
        seconds = time.perf_counter() - started
        factors: dict[str, torch.Tensor] = {}
        for matrix in adapted_matrices(model, unprotected=config.importance.unprotected):
            factors |= {f"{matrix.name}.A": matrix.A.detach(), f"{matrix.name}.B": matrix.B.detach()}
        save_state(directory, "adapter", factors)
        for kind, recorder in recorders.items():
            save_state(directory, kind, recorder.state_dict())
        facts = {"made_from": made_from, "history": history, "seconds": seconds}
        write_json(directory / "recording.json", facts, indent=1)
        model.unload()

    training = config.training.record_arguments()
    made_from = {
        **config.model_dump(include={"model", "lora", "seed"}),
        "kinds": [kind for kind, _ in kinds],
        "training": without_secret_fields(training),
        "stop_at_move": config.importance.stop_at_move,
        "text": job.general.facts,
    }
    states = ["adapter", *(kind for kind, _ in kinds)]
    return cached_directory(job, "general", made_from, make=record, files=_pairs(*states))


def _kind(options: ImportanceConfig) -> str:
    """The name of a recorder's state files, equal to `ImportanceRecorder.kind`."""
    return options.encoding if options.method == "path_integral" else "squares"


def _squared_gradients(job: Job) -> Importance:
    config = job.config

    def record(directory: Path) -> None:
        model = attach_lora(job.base, config.lora, config.seed)
        squared_gradients(job, model).save(directory)
        model.unload()

    made_from = {**config.model_dump(include={"model", "lora", "importance", "seed"}), "text": job.general.facts}
    return Importance.load(cached_directory(job, "squares", made_from, make=record, files=_pairs("importance")))


def fisher(job: Job) -> Importance:
    """The Fisher information of the job's base model on its general text."""
    config = job.config
    assert isinstance(config, CellConfig)
    options = config.fisher

    def measure(directory: Path) -> None:
        model = attach_lora(job.base, config.lora, config.seed)
        information = fisher_information(
            model,
            job.tokenizer,
            job.general.train,
            examples=options.examples,
            max_length=options.max_length,
            seed=config.seed,
            batch_size=options.batch_size,
        )
        information.save(directory)
        model.unload()

    made_from = {**config.model_dump(include={"model", "lora", "fisher", "seed"}), "text": job.general.facts}
    return Importance.load(cached_directory(job, "fisher", made_from, make=measure, files=_pairs("importance")))


def _pairs(*names: str) -> list[str]:
    return [f"{name}{suffix}" for name in names for suffix in (".json", ".safetensors")]


def cached_directory(
    job: Job, name: str, made_from: Mapping[str, Any], *, make: Callable[[Path], None], files: Sequence[str]
) -> Path:
    """A directory that is made once for each set of settings and data, and kept in the output directory.

    Args:
        job: Names the output directory.
        name: The folder in it.
        made_from: Everything that determines the content; its digest names the directory.
        make: Fills the directory if it does not exist, or one of its files is missing or cut short.
        files: What it holds.
    """
    directory = job.output / name / digest(made_from)
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not _is_whole(directory, files):
        with try_lock(directory.with_name(f"{directory.name}.lock")) as mine:
            if not mine:
                raise Busy(directory)
            if not _is_whole(directory, files):
                if directory.is_dir():
                    logger.warning("%s: files are missing or damaged; made again", directory)
                with atomic_directory(directory, locked=True) as fresh:
                    make(fresh)
    return directory


def _is_whole(directory: Path, files: Sequence[str]) -> bool:
    """Whether each file is there and not cut short, by the sizes in its header."""
    try:
        for path in (directory / file for file in files):
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                with safe_open(path, framework="pt"):
                    pass
    except (OSError, ValueError, RecursionError, SafetensorError):
        return False
    return True


def shared_key(config: CellConfig) -> str:
    """A digest of the settings that determine the shared part; equal for cells that share it."""
    shared = shared_part(config)
    made_from = {"shared": shared, **config.model_dump(include={"seed", "model", "lora", "general", "evaluation"})}
    if shared == "general":
        made_from |= {"training": config.training.record_arguments(), "stop_at_move": config.importance.stop_at_move}
    else:
        made_from |= config.model_dump(include={"fisher" if shared == "fisher" else "importance"})
    return digest(made_from)
