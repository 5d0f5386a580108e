"""A phase's trainer, built on a few rows as a run opens: what TRL or Transformers refuse is refused before training."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hlora.parallel.group import world_size
from hlora.training.their_errors import their_errors
from hlora.training.trackers import TRACKERS, check_logins
from hlora.training.train import build_trainer

if TYPE_CHECKING:
    from trl import SFTTrainer

ROWS = 4  # rows that a trial is built on


def build_on_trial(
    model: PeftModel, tokenizer: Any, rows: Dataset, seed: int, arguments: dict[str, Any], *, evaluation: Any = None
) -> None:
    """Build the trainer of a phase with optimizer and learning-rate schedule, and train one step of one row.

    A phase with validation rows evaluates one of them, too, by the metric that is to choose the best checkpoint.

    The step moves the adapter. The base model and the disk stay as they were. Uses random numbers. In several processes
    no step is trained, as a sharded model would stay sharded.

    Args:
        model: The base model with its adapter, as the phase gets it.
        tokenizer: The model's.
        rows: A few of the phase's rows.
        seed: The run's.
        arguments: Those of trl.SFTConfig.
        evaluation: A few of its validation rows, if it has any.

    Raises:
        Exception: Whatever TRL, Transformers or Jinja raise.
    """
    with _without_traces(model), tempfile.TemporaryDirectory() as scratch:
        named: dict[str, Any] = {"output": Path(scratch) / "trial", "arguments": arguments, "seed": seed}
        trainer = build_trainer(model, tokenizer, rows, **named, evaluation=evaluation)
        check_logins(trainer.args.report_to)
        steps = trainer.args.max_steps if trainer.args.max_steps > 0 else 100
        trainer.create_optimizer_and_scheduler(num_training_steps=steps)
        trainer.get_train_dataloader()
        assert isinstance(trainer.train_dataset, Dataset)
        trainer.data_collator([trainer.train_dataset[0]])
        if trainer.args.torch_compile:  # which takes a minute and more: its arguments are tried alone
            torch.compile(model, **trainer.accelerator.state.dynamo_plugin.to_kwargs())
        elif world_size() == 1:
            trainer.args.max_steps = steps
            with their_errors(model):
                _train_one_step(trainer)


def _train_one_step(trainer: SFTTrainer) -> None:
    """Of one row, and evaluate one where the phase does. No tracker sees the step, and nothing is saved."""
    assert isinstance(trainer.train_dataset, Dataset)
    trainer.train_dataset = trainer.train_dataset.select([0])
    args = trainer.args
    args.dataloader_drop_last = args.eval_on_start = False
    args.save_strategy = "no"
    if args.eval_strategy != "no":
        assert isinstance(trainer.eval_dataset, Dataset)
        trainer.eval_dataset = trainer.eval_dataset.select([0])
        args.eval_strategy, args.eval_steps, args.eval_delay = "steps", 1, 0
    for tracker in TRACKERS:
        trainer.remove_callback(tracker)
    trainer.add_callback(_StopAfterOneStep)
    trainer.train()


class _StopAfterOneStep(TrainerCallback):
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = True


@contextmanager
def _without_traces(model: PeftModel) -> Iterator[None]:
    """Restore every field of the base model's modules and configurations: settings, methods, hooks, flags, buffers.

    A flag and what it speaks of belong together, such as Transformers' hooks on the routers of experts and the mark
    that they are there. Tensors that are changed in place stay changed. Warnings are left for the phase itself to show.
    """
    base = model.get_base_model()
    modules = list(base.modules())
    configs = {id(config): config for each in modules if (config := getattr(each, "config", None)) is not None}
    parts = [*modules, *configs.values()]
    if getattr(base, "generation_config", None) is not None:
        parts.append(base.generation_config)
    before = [(part, dict(vars(part)), _tables(part)) for part in parts]
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for part, fields, tables in before:
            vars(part).clear()
            vars(part).update(fields)
            for there, found in tables:
                there.clear()
                there.update(found)


def _tables(part: Any) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """Each dictionary among the fields, such as hooks and buffers, and what is in it."""
    return [(each, dict(each)) for each in vars(part).values() if isinstance(each, dict)]
