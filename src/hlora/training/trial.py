"""A phase's trainer, built on a few rows as a run opens: what TRL or Transformers refuse is refused before training."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel

from hlora.training.trackers import check_logins
from hlora.training.train import build_trainer

ROWS = 4  # rows that a trial is built on


def build_on_trial(
    model: PeftModel, tokenizer: Any, rows: Dataset, seed: int, arguments: dict[str, Any], *, evaluation: Any = None
) -> None:
    """Build the trainer of a phase, its optimizer, learning-rate schedule and data loader, and collate a row.

    Trains nothing, and leaves the model's settings and the disk as they were. Uses random numbers.

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


@contextmanager
def _without_traces(model: PeftModel) -> Iterator[None]:
    """Restore what building a trainer changes on the base model: its forward and its settings.

    Warnings are left for the phase itself to show.
    """
    base = model.get_base_model()
    parts = [part for part in (base, base.config, getattr(base, "generation_config", None)) if part is not None]
    before, level = [dict(vars(part)) for part in parts], logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for part, fields in zip(parts, before, strict=True):
            vars(part).clear()
            vars(part).update(fields)
