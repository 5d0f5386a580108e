"""A domain phase that is evaluated while it trains: stopped when the validation loss no longer falls."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("hlora")


class StopWithoutGain(TrainerCallback):
    """Ends training after `patience` evaluations in a row without a lower validation loss.

    It counts in Trainer's log, which a checkpoint holds, so a resumed training ends at the same step. Transformers'
    EarlyStoppingCallback starts counting anew there.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        since_best = len(losses) - 1 - losses.index(min(losses))
        if since_best >= self.patience:
            logger.info(
                "step %d: evaluations in a row without a lower validation loss: %d; stopping",
                state.global_step,
                since_best,
            )
            control.should_training_stop = True
