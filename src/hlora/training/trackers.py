"""What experiment trackers get beside the losses, and an end of their runs with the phase.

Which trackers: whatever `report_to` names, through Trainer's own integrations. The losses and φ reach them as part of
Trainer's log entries (PenaltyCallback).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

_TRACKERS: tuple[type[TrainerCallback], ...] = tuple(INTEGRATION_TO_CALLBACK.values())


class LayerCoefficients(TrainerCallback):
    """Tells the trackers layer_coefficient/<matrix>, c_l of Eq. 15, once at step 0.

    To them alone: in Trainer's log a large model has hundreds. Behind the trackers among the callbacks, since they
    open their runs as training begins.
    """

    def __init__(self, trainer: Trainer, coefficients: dict[str, float]) -> None:
        self.trainer = trainer
        self.coefficients = coefficients

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:  # resumed: they have them
            return
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, _TRACKERS):
                logs = {f"layer_coefficient/{name}": value for name, value in self.coefficients.items()}
                callback.on_log(args, state, control, logs=logs, model=kwargs["model"])


@contextmanager
def run_of_its_own() -> Iterator[None]:
    """A tracker's run that is opened inside ends with the block, as failed after an error; one open before stays.

    Trainer leaves W&B's open, and all others when training fails: the next phase would write into it.
    """
    before = {name for name in _OPEN if _is_open(name)}
    failed = True
    try:
        yield
        failed = False
    finally:
        for name in set(_OPEN) - before:
            if _is_open(name):
                _CLOSE[name](sys.modules[name], failed)


_OPEN: dict[str, Callable[[Any], Any]] = {
    "wandb": lambda wandb: wandb.run,
    "mlflow": lambda mlflow: mlflow.active_run(),
    "trackio": lambda trackio: trackio.context_vars.current_run.get(),
}
_CLOSE: dict[str, Callable[[Any, bool], Any]] = {
    "wandb": lambda wandb, failed: wandb.finish(exit_code=int(failed)),
    "mlflow": lambda mlflow, failed: mlflow.end_run("FAILED" if failed else "FINISHED"),
    "trackio": lambda trackio, failed: trackio.finish(),
}


def _is_open(name: str) -> bool:
    module = sys.modules.get(name)  # one that nobody has imported has no run
    return module is not None and _OPEN[name](module) is not None
