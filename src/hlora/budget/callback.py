"""The budget inside Trainer: when to probe, steer and land."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hlora.system.errors import ConfigError
from hlora.training.interrupt import is_interrupted

if TYPE_CHECKING:
    from hlora.budget.budget import ForgettingBudget


class BudgetCallback(TrainerCallback, ExportableState):
    """Runs a ForgettingBudget inside Trainer. Made by `budget.callback()`.

    The log entry after a probe has probe_step, probe_rise, probe_stderr and budget. When training ends, the rise is
    measured and the adapter is landed; checkpoints hold the adapter before the landing.

    The state is saved in a checkpoint's trainer_state.json, and read from there when training resumes.
    `restore_callback_states_from_checkpoint` must stay off (Trainer's default): it would replace the callback.
    """

    def __init__(self, budget: ForgettingBudget | None = None) -> None:
        if budget is None:  # Trainer's from_state
            raise ConfigError(
                "training: a forgetting budget resumes by itself; leave restore_callback_states_from_checkpoint off"
            )
        self.budget = budget
        self._probed: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"kept": self.budget.state()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved: Any = state.stateful_callbacks  # by class name; Transformers' annotation is that of its constructor
        kept = saved.get(type(self).__name__)
        if state.global_step > 0 and kept is not None:
            self.budget.load_state(kept["attributes"]["kept"])
        else:
            saved.setdefault(type(self).__name__, self.state())  # a checkpoint without a budget
            self.budget.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._probed = self.budget.after_step(state.global_step, state.max_steps) or self._probed

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._probed is None:
            return
        said, self._probed = _for_log(self._probed), None
        logs.update(said)
        state.log_history[-1].update(said)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if is_interrupted(control):  # the resumed training lands the adapter, which can take many probes
            return
        entry = self.budget.finish(state.global_step)
        said = {"step": state.global_step, "phi": entry["phi"], "alpha": entry["alpha"], **_for_log(entry)}
        state.log_history.append(said)


def _for_log(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "probe_step": entry["step"],
        "probe_rise": entry["rise"],
        "probe_stderr": entry["stderr"],
        "budget": entry["budget"],
    }
