"""Forgetting while a model trains, measured whenever Trainer evaluates."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hlora.budget.probes import Rise, TextProbe
from hlora.parallel.fsdp import is_sharded, reshard
from hlora.parallel.group import on_main


class ForgettingWatch(TrainerCallback):
    """Puts the rise of the loss on general text into each log entry of an evaluation: probe_rise and probe_stderr.

    Args:
        probe: What measures the rise. Every evaluation reads the same tokens.

    In several processes the first measures, or all of them a sharded model.
    """

    def __init__(self, probe: TextProbe) -> None:
        self.probe = probe

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "eval_loss" not in logs:
            return
        probe = self.probe
        rise = Rise(**on_main(lambda: asdict(probe.measure(probe.tokens)), is_sharded(probe.model)))
        reshard(probe.model)
        measured = {"probe_step": state.global_step, "probe_rise": rise.nats, "probe_stderr": rise.stderr}
        logs.update(measured)
        state.log_history[-1].update(measured)
