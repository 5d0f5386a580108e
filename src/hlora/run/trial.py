"""Both phases tried out as a job opens: an error of TRL, Transformers or a template names the field that causes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from hlora.config.training import TrainingConfig
from hlora.model.lora import attach_lora
from hlora.parallel.group import world_size
from hlora.system.errors import ConfigError, HloraError
from hlora.system.files import is_io_error
from hlora.system.redaction import MARK, is_secret_name
from hlora.training.checkpoint import random_state, set_random_state
from hlora.training.train import sft_arguments
from hlora.training.trial import ROWS, build_on_trial

if TYPE_CHECKING:
    from hlora.run.job import Job

_CHARACTERS = 5_000  # of a general document; enough for the rows of a trial

Build = Callable[[dict[str, Any]], object]


def check_arguments(training: TrainingConfig, output: Path, device: torch.device) -> None:
    """Build the arguments of each phase, which needs no model.

    Raises:
        ConfigError: As `try_phases`; or Trainer cannot train on the device.
    """
    if device.type == "cuda" and device.index not in (None, current := torch.cuda.current_device()):
        raise ConfigError(
            f"model.device: {device} cannot be trained on, as Trainer takes this process's first GPU, cuda:{current}. "
            f"Set cuda, and choose the GPU by its number: CUDA_VISIBLE_DEVICES={device.index} hlora …"
        )
    on_cpu = device.type == "cpu"
    for phase, arguments in (("record", training.record_arguments()), ("tune", training.tune_arguments())):
        _blaming(training, phase, arguments, lambda given: sft_arguments(output, {"use_cpu": on_cpu, **given}, 0))


def try_phases(job: Job) -> None:
    """Build the trainer of each phase on a few rows, with optimizer and schedule, and train one step of one row.

    Keeps and writes nothing. Random numbers and the base model are afterwards as before.

    In several processes: every process calls it.

    Raises:
        ConfigError: A library refuses a value, with the field and the library's message.
    """
    config = job.config
    _check_batches(job)
    few_rows = replace(job.domain, train=job.domain.train[:ROWS], validation=job.domain.validation[:ROWS])
    evaluation = few_rows.validation_dataset(job.tokenizer)
    phases = [("tune", few_rows.dataset(job.tokenizer), config.training.tune_arguments())]
    if not config.in_one_pass and job.given is None:
        few = replace(job.general, train=[text[:_CHARACTERS] for text in job.general.train[:ROWS]])
        arguments = config.training.record_arguments()
        phases.insert(0, ("record", few.dataset(job.tokenizer, arguments), arguments))
    random = random_state()
    model = attach_lora(job.base, config.lora, config.seed)
    try:
        for phase, rows, arguments in phases:
            build = partial(build_on_trial, model, job.tokenizer, rows, config.seed)
            if phase == "tune":
                build = partial(build, evaluation=evaluation)
            try:
                _blaming(config.training, phase, arguments, build)
            except ConfigError as error:
                targets = config.lora.target_modules
                names = [targets] if isinstance(targets, str) else targets
                if str(error).startswith(f"training.{phase}: ") and any(
                    name.split(".")[-1] in str(error) for name in names
                ):
                    problem = str(error).removeprefix(f"training.{phase}: ")
                    raise ConfigError(f"lora.target_modules: {targets!r} cannot be used here. {problem}") from None
                raise
    finally:
        model.unload()
        set_random_state(random)


def _check_batches(job: Job) -> None:
    """Raises ConfigError if the domain's rows make no whole batch and incomplete batches are dropped."""
    arguments, rows = job.config.training.tune_arguments(), len(job.domain.train)
    batch = world_size() * int(arguments.get("per_device_train_batch_size", 8))
    if arguments.get("dataloader_drop_last") and not arguments.get("packing") and rows < batch:
        part = "tune" if "dataloader_drop_last" in job.config.training.tune else "common"
        raise ConfigError(
            f"training.{part}.dataloader_drop_last: {rows} training rows make no batch of {batch}, so nothing would be "
            "trained. Remove it, or set a smaller per_device_train_batch_size."
        )


def _blaming(training: TrainingConfig, phase: str, arguments: dict[str, Any], build: Build) -> None:
    """Build; an error of a library becomes a ConfigError that names the argument without which there is none."""
    try:
        build(arguments)
    except Exception as error:  # any library's, of any kind
        cause = error.__cause__ if isinstance(error, HloraError) and error.__cause__ else error
        message = f"{' '.join(str(cause).split())[:600]} ({type(cause).__name__})"
        for name in _suspects(training, phase, str(cause)):
            if _is_to_blame(build, arguments, name):
                part = phase if name in getattr(training, phase) else "common"
                value = MARK if is_secret_name(name) else repr(arguments[name])
                raise ConfigError(f"training.{part}.{name}: {value} cannot be used here. {message}") from None
        if is_io_error(error) or (isinstance(error, HloraError) and not isinstance(error, ConfigError)):
            raise
        template = isinstance(cause, TemplateError)
        place = "domain.train: the model's chat template refuses a row" if template else f"training.{phase}"
        raise ConfigError(f"{place}: {message}") from None


def _suspects(training: TrainingConfig, phase: str, message: str) -> Iterator[str]:
    """The arguments that the user has set: those that the message names first, then those whose values it names."""
    given = {**training.common, **getattr(training, phase)}

    def named(words: Iterable[Any]) -> bool:
        return any(isinstance(word, str) and re.search(rf"\b{re.escape(word)}\b", message) for word in words)

    def order(name: str) -> tuple[bool, bool]:
        value = given[name]
        return not named([name]), not named(value if isinstance(value, dict) else [value])

    yield from sorted(given, key=order)


def _is_to_blame(build: Build, arguments: dict[str, Any], name: str) -> bool:
    """Whether the trial succeeds without the argument."""
    if world_size() > 1:  # an error in one process alone would leave the others waiting: the first suspect is blamed
        return True
    try:
        build({key: value for key, value in arguments.items() if key != name})
    except Exception:
        return False
    return True
