"""The one place that trains: TRL's SFTTrainer with our defaults, progress line and checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hlora.parallel.dtensor import whole
from hlora.parallel.fsdp import device_for
from hlora.parallel.group import first_does, is_first, world
from hlora.system.errors import ConfigError, TrainingError
from hlora.training.checkpoint import Checkpoints
from hlora.training.checkpoint_files import latest_checkpoint
from hlora.training.progress import ProgressLine
from hlora.training.their_errors import their_errors
from hlora.training.trackers import run_of_its_own

if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer

logger = logging.getLogger("hlora")

_QUICK = 10_000  # rows that TRL prepares in a few seconds, not worth its five progress bars


class StopWhenDiverged(TrainerCallback):
    """Ends a training whose adapter is not finite, as no later step can mend that: when the loss that is logged is not
    finite either, before a checkpoint is completed, and before what was trained is handed on.

    A single such loss that a gradient scaler or the recorder leaves out does not end it.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and not math.isfinite(logs.get("loss", 0.0)):
            self._check(state, kwargs["model"], f"the loss is {logs['loss']} and ")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check(state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(state, kwargs["model"])

    def _check(self, state: TrainerState, model: Any, seen: str = "") -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        lost = [name for name, parameter in trained.items() if not whole(parameter.isfinite().all())]
        if lost:
            raise TrainingError(
                f"step {state.global_step}: {seen}{lost[0]} is not finite. Lower training.common.learning_rate, or set "
                "max_grad_norm; in float16 use bfloat16 or float32 instead."
            )


def add_callback_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Add a callback ahead of Trainer's trackers, so that what it adds to a log entry is reported.

    One with a method `after_trackers(trainer)` brings a second callback, which goes behind the trackers.
    """
    # Not trainer.add_callback, which warns of a second recorder: a comparison has several on one training.
    trainer.callback_handler.callbacks.insert(0, callback)
    after_trackers = getattr(callback, "after_trackers", None)
    if after_trackers is not None:
        trainer.callback_handler.callbacks.append(after_trackers(trainer))


def sft_arguments(output: str | Path, arguments: dict[str, Any], seed: int) -> SFTConfig:
    """TRL's SFTConfig with our defaults below `arguments`. Raises ConfigError when TRL refuses a value."""
    from trl import SFTConfig

    defaults: dict[str, Any] = {
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": ["tensorboard"],
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_nan_inf_filter": False,  # it shows the mean of earlier losses where there is none
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        # TRL's own bfd cuts what is longer than a row off its documents, and lays the whole batch out as one row:
        # without flash attention a step takes 1.4 times as long at 8×128 tokens and 2.2 times at 8×512 (CPU).
        "packing_strategy": "wrapped",
    }
    for engine in ("fsdp", "deepspeed"):
        if arguments.get(engine):
            raise ConfigError(
                f"training: {engine} is not asked for here, as evaluation has to know of it too. Shard by `accelerate "
                "launch --use_fsdp --fsdp_version 2` (docs/guides/distributed.md)."
            )
    try:
        return SFTConfig(output_dir=str(output), seed=seed, **{**defaults, **arguments})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: trl.SFTConfig refuses {arguments}: {' '.join(str(error).split())}") from None


def train(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    output: str | Path,
    arguments: dict[str, Any],
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
    trainer_class: type[SFTTrainer] | None = None,
    resumable: bool = False,
) -> list[dict[str, Any]]:
    """One SFTTrainer run; returns its log entries (loss in nats per token by step).

    dataset: rows as TRL reads them (text, prompt/completion or messages). arguments: those of trl.SFTConfig.
    trainer_class: a subclass of trl.SFTTrainer, for another loss. resumable: keep checkpoints in `output`, and go on
    from the last complete one that is there.
    """
    from trl import SFTTrainer

    # Trainer moves the model to an accelerator that it finds, also when model.device asked for the CPU.
    defaults: dict[str, Any] = {"use_cpu": device_for(model).type == "cpu"}
    if world() > 1:
        defaults["ddp_find_unused_parameters"] = False  # LoRA layers are all used; looking for others takes a pass
    if resumable:
        defaults |= {"save_only_model": True, "save_total_limit": 2}  # two: the newest may be cut short
    of, phase = Path(output).resolve().parents[1].name, Path(output).name  # <output>/logs/<phase>
    named = {"run_name": f"{arguments.get('run_name', of)}/{phase}"}  # in trackers, where a phase is a run
    config = sft_arguments(output, {**defaults, **arguments, **named}, seed)
    if not config.push_to_hub:
        config.hub_token = None  # Trainer pickles its arguments into each checkpoint
    trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    if len(dataset) < _QUICK or not is_first():
        disable_progress_bars()
    try:
        trainer_class = trainer_class or SFTTrainer
        with their_errors(model):
            trainer = trainer_class(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    finally:
        enable_progress_bars()
    for parameter, before in trained:
        # TRL rounds the adapter of a quantised base to bfloat16, where small steps of the optimizer are lost.
        if parameter.dtype != before.dtype:
            parameter.data = before.to(parameter.device)
    trainer.remove_callback(PrinterCallback)  # what disable_tqdm puts in its place
    line = ProgressLine(Path(output).name)
    last = [Checkpoints()] if resumable else []
    for callback in (*last, line, StopWhenDiverged(), *callbacks):
        add_callback_first(trainer, callback)
    found = first_does(lambda: _latest(Path(output))) if resumable else None
    if found is not None:
        logger.info("going on from %s", found)
    try:
        with run_of_its_own(), their_errors(model):
            trainer.train(resume_from_checkpoint=found)
    finally:
        line.stop()  # Trainer does not call on_train_end after an error
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "probe_rise" in entry]
    for entry in history:
        entry.pop("num_tokens", None)  # TRL counts anew where a training goes on
    return history


def _latest(output: Path) -> str | None:
    found = latest_checkpoint(output)
    return None if found is None else str(found)
