"""One progress line for each training phase, with time left and losses, instead of Trainer's dictionaries."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressLine(TrainerCallback):
    """Shows steps done, time elapsed and left, and the latest losses. Without a terminal: one line at the end."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._validation = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._progress.start()
            self._task = self._progress.add_task(self.phase, total=state.max_steps, losses="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._task is not None and logs and "eval_loss" in logs:
            self._validation = f", validation {float(logs['eval_loss']):.3f}"
        if self._task is not None and logs and "loss" in logs:
            losses = f"loss {float(logs['loss']):.3f}"
            if "weighted_regularisation_loss" in logs:
                losses += f" + penalty {float(logs['weighted_regularisation_loss']):.3f}"
            self._progress.update(self._task, losses=losses + self._validation)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Release the terminal. Can be called more than once."""
        if self._task is not None:
            self._progress.stop()
            self._task = None
