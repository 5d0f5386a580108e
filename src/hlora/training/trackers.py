"""What experiment trackers get in addition to the losses; each phase is a run of its own in them.

`report_to` names the trackers, which Trainer's own integrations serve. Losses and φ reach them in Trainer's log entries
(PenaltyCallback).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

TRACKERS: tuple[type[TrainerCallback], ...] = tuple(INTEGRATION_TO_CALLBACK.values())


def add_callback_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Add a callback before Trainer's trackers, so that they report what the callback adds to a log entry.

    If it has a method `after_trackers(trainer)`, the callback which that returns is added after the trackers.
    """
    # Not trainer.add_callback, which warns of a second recorder: a comparison attaches several to one training.
    trainer.callback_handler.callbacks.insert(0, callback)
    after_trackers = getattr(callback, "after_trackers", None)
    if after_trackers is not None:
        trainer.callback_handler.callbacks.append(after_trackers(trainer))


class LayerCoefficients(TrainerCallback):
    """Sends layer_coefficient/<matrix>, c_l of Eq. 15, to the trackers once, at step 0.

    Sends it to the trackers only: a large model has hundreds, too many for Trainer's log. Must come after the trackers
    in the callback list, because they open their runs in on_train_begin.
    """

    def __init__(self, trainer: Trainer, coefficients: dict[str, float]) -> None:
        self.trainer = trainer
        self.coefficients = coefficients

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:  # resumed: the trackers have them
            return
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TRACKERS):
                logs = {f"layer_coefficient/{name}": value for name, value in self.coefficients.items()}
                callback.on_log(args, state, control, logs=logs, model=kwargs["model"])


@contextmanager
def run_of_its_own() -> Iterator[None]:
    """End every tracker's run that is opened in the block; after an error, as failed. Earlier runs stay open.

    Trainer leaves W&B's run open, and every tracker's run when training fails. The next phase would write into it.
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


def check_logins(names: str | Sequence[str] | None) -> None:
    """Raises ValueError for a tracker that would ask for a login as training begins."""
    if "wandb" in (names or ()) and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if wandb.api.api_key is None:
            raise ValueError("report_to: no W&B login is known here. Run `wandb login`, or set WANDB_MODE=offline")


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
    module = sys.modules.get(name)  # without an import there is no run
    return module is not None and _OPEN[name](module) is not None
