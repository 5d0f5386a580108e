"""Times a training, and chosen calls inside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Elapsed(NamedTuple):
    """Seconds of wall-clock time, and of this process's processor time."""

    wall: float
    cpu: float

    def __add__(self, other: Elapsed) -> Elapsed:  # type: ignore[override]
        return Elapsed(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Elapsed) -> Elapsed:
        return Elapsed(self.wall - other.wall, self.cpu - other.cpu)


class Clock(TrainerCallback):
    """Times `train()`, without its preparations, and the timed calls inside it."""

    def __init__(self) -> None:
        self.training = self.recording = Elapsed(0.0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = now()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = now() - self._started

    def inside(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A timed version of a call."""

        def timed(*arguments: Any, **options: Any) -> Any:
            started = now()
            result = call(*arguments, **options)
            self.recording = self.recording + (now() - started)
            return result

        return timed


def now() -> Elapsed:
    """The clocks, read once the accelerator has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return Elapsed(time.perf_counter(), time.process_time())
