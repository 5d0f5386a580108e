"""The progress line of a training phase, instead of Trainer's dictionaries."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hlora.system.progress import Line, clock, current_phase, line

logger = logging.getLogger("hlora")


class ProgressLine(TrainerCallback):
    """Shows steps, the latest losses and the time left while a phase trains, and one line in the log when it ends.

    Args:
        phase: Name of the phase, shown if the run has not named it.
    """

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self._losses = self._validation = ""
        self._shown = ExitStack()
        self._line: Line | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._started, self._from = time.monotonic(), state.global_step
            what = "step" if current_phase() else f"{self.phase}: step"
            self._line = self._shown.enter_context(line(what, state.max_steps, state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._line is not None:
            self._line.update(state.global_step, self._losses + self._validation)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "eval_loss" in logs:
            self._validation = f", validation {float(logs['eval_loss']):.3f}"
        if logs and "loss" in logs:
            self._losses = f"loss {float(logs['loss']):.3f}"
            if "weighted_regularisation_loss" in logs:
                self._losses += f" + penalty {float(logs['weighted_regularisation_loss']):.3f}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._line is not None:
            self.stop()
            spent = clock(time.monotonic() - self._started)
            losses = f", {self._losses}{self._validation}" if self._losses else ""
            done = state.global_step - self._from
            steps = f"{done:,} {'more ' * (self._from > 0)}step{'s' * (done != 1)}"
            logger.info("%s: %s in %s%s", self.phase, steps, spent, losses)

    def stop(self) -> None:
        """Release the terminal. Can be called more than once."""
        self._shown.close()
        self._line = None
