"""The one place that trains: TRL's SFTTrainer with our defaults, progress line and checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hlora.parallel.dtensor import full_tensor
from hlora.parallel.fsdp import device_for
from hlora.parallel.group import is_main, on_main, world_size
from hlora.system.errors import ConfigError, TrainingError
from hlora.training.checkpoint import Checkpoints
from hlora.training.checkpoint_files import latest_checkpoint
from hlora.training.interrupt import first_interrupt
from hlora.training.progress import ProgressLine
from hlora.training.their_errors import their_errors
from hlora.training.trackers import add_callback_first, run_of_its_own

if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer

logger = logging.getLogger("hlora")

_UNEVEN = (
    "num_tokens",  # TRL counts from 0 again after a resume
    "eval_num_tokens",
    *(f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")),
)
"""Entries of Trainer's log that differ from run to run, or after a resume."""

_QUICK = 10_000  # rows that TRL prepares in a few seconds, not worth its five progress bars


class StopWhenDiverged(TrainerCallback):
    """Ends a training whose adapter is not finite, since no later step can repair it.

    Checked when a logged loss is not finite, before a checkpoint is completed, and at the end. A loss that is not
    finite does not end the training if a gradient scaler or the recorder skips its step.
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
        lost = [name for name, parameter in trained.items() if not full_tensor(parameter.isfinite().all())]
        if lost:
            raise TrainingError(
                f"step {state.global_step}: {seen}{lost[0]} is not finite. Lower training.common.learning_rate, or set "
                "max_grad_norm; in float16 use bfloat16 or float32 instead."
            )


def sft_arguments(output: str | Path, arguments: dict[str, Any], seed: int) -> SFTConfig:
    """TRL's SFTConfig, with our defaults for what `arguments` does not set. Raises ConfigError if TRL refuses one."""
    from trl import SFTConfig

    defaults: dict[str, Any] = {
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": ["tensorboard"],
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_nan_inf_filter": False,  # replaces a loss that is not finite by the mean of earlier ones
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        # TRL's default, bfd, cuts the end off a document longer than a row, and makes one row of the whole batch:
        # without flash attention a step takes 1.4 times as long at 8×128 tokens and 2.2 times at 8×512 (CPU).
        "packing_strategy": "wrapped",
    }
    try:
        config = SFTConfig(output_dir=str(output), seed=seed, **{**defaults, **arguments})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: trl.SFTConfig refuses {arguments}: {' '.join(str(error).split())}") from error
    # On several GPUs without a launcher, Trainer would use torch.nn.DataParallel, with as many times the rows a step.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def total_steps(output: Path, arguments: dict[str, Any], *, rows: float) -> int:
    """Optimizer steps of a phase with so many rows, for the number of processes of this launch."""
    args = sft_arguments(output, {"use_cpu": not torch.cuda.is_available(), **arguments, "report_to": []}, 0)
    batches = math.ceil(rows / (args.per_device_train_batch_size * world_size()))
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def build_trainer(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    *,
    output: Path,
    arguments: dict[str, Any],
    seed: int,
    evaluation: Dataset | None = None,
    trainer_class: type[SFTTrainer] | None = None,
    resumable: bool = False,
) -> SFTTrainer:
    """The trainer of a phase, without callbacks. Arguments as for `train`.

    Raises:
        ConfigError: SFTConfig refuses an argument.
        Exception: What else TRL and Transformers raise; training.trial tries it out as a run opens.
    """
    from trl import SFTTrainer

    # Trainer moves the model to an accelerator if there is one, even where model.device asks for the CPU.
    defaults: dict[str, Any] = {"use_cpu": device_for(model).type == "cpu"}
    if world_size() > 1:
        defaults["ddp_find_unused_parameters"] = False  # every LoRA layer is used; a search costs one pass a step
    if resumable:
        defaults |= {"save_only_model": True, "save_total_limit": 2}  # two, in case the newest is incomplete
    run_name, phase = output.resolve().parents[1].name, output.name  # <output>/logs/<phase>
    named = {"run_name": f"{arguments.get('run_name', run_name)}/{phase}"}  # each phase is a run in the trackers
    config = sft_arguments(output, {**defaults, **arguments, **named, **_for_token_ids(dataset, arguments)}, seed)
    config.hub_token = None  # Trainer pickles its arguments into each checkpoint
    trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    if len(dataset) < _QUICK or not is_main():
        disable_progress_bars()
    try:
        trainer_class = trainer_class or SFTTrainer
        with their_errors(model):
            trainer = trainer_class(
                model=model, args=config, train_dataset=dataset, eval_dataset=evaluation, processing_class=tokenizer
            )
    finally:
        enable_progress_bars()
    _check_trained(config, dataset, trainer.train_dataset)
    if isinstance(model, PeftModel):  # False, as in run/phases.py: each checkpoint would ask the hub for a config.json
        model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]
    for parameter, before in trained:
        # TRL rounds the adapter of a quantised base to bfloat16, in which small steps of the optimizer are lost.
        if parameter.dtype != before.dtype:
            parameter.data = before.to(parameter.device)
    trainer.remove_callback(PrinterCallback)  # which disable_tqdm adds
    return trainer


def train(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    *,
    output: str | Path,
    arguments: dict[str, Any],
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
    evaluation: Dataset | None = None,
    trainer_class: type[SFTTrainer] | None = None,
    resumable: bool = False,
) -> list[dict[str, Any]]:
    """One phase of training by TRL's SFTTrainer.

    Args:
        model: The base model with its adapter.
        tokenizer: The model's.
        dataset: Rows of `input_ids`, with a `completion_mask` where a part is trained; or rows as TRL reads them.
        output: <output>/logs/<phase>, for checkpoints and TensorBoard.
        arguments: Those of trl.SFTConfig.
        seed: Of data order and dropout.
        callbacks: Added before the trackers, in reverse order.
        evaluation: Rows to evaluate on, when the arguments say.
        trainer_class: A subclass of trl.SFTTrainer, for another loss.
        resumable: Write checkpoints to `output`, also at Ctrl-C, and resume from the last complete one there.

    Returns:
        Trainer's log entries, with the loss in nats per token by step, and eval_loss after an evaluation.
    """
    output = Path(output)
    trainer = build_trainer(
        model,
        tokenizer,
        dataset,
        output=output,
        arguments=arguments,
        seed=seed,
        evaluation=evaluation,
        trainer_class=trainer_class,
        resumable=resumable,
    )
    line = ProgressLine(output.name)
    checkpoints = Checkpoints()
    for callback in (*([checkpoints] if resumable else []), line, StopWhenDiverged(), *callbacks):
        add_callback_first(trainer, callback)
    found = on_main(lambda: _latest(output)) if resumable else None
    if found is not None:
        logger.info("resuming from %s", found)
    try:
        with ExitStack() as around:
            around.enter_context(run_of_its_own())
            around.enter_context(their_errors(model))
            if resumable:
                around.enter_context(first_interrupt(partial(setattr, checkpoints, "interrupted", True)))
            trainer.train(resume_from_checkpoint=found)
    finally:
        line.stop()  # Trainer does not call on_train_end after an error
    steps, total = trainer.state.global_step, trainer.state.max_steps
    if checkpoints.interrupted and steps < total:
        raise KeyboardInterrupt(f"{output.name}, after step {steps:,} of {total:,}, with a checkpoint")
    kept = ("loss", "probe_rise", "eval_loss")
    history = [entry for entry in trainer.state.log_history if any(name in entry for name in kept)]
    return [{name: value for name, value in entry.items() if name not in _UNEVEN} for entry in history]


def _for_token_ids(dataset: Dataset, arguments: dict[str, Any]) -> dict[str, Any]:
    """What TRL must be told of rows that hlora.data made token ids of."""
    if "completion_mask" in dataset.column_names:  # TRL trains the completion alone by default, of rows of text only
        return {"completion_only_loss": True} if arguments.get("completion_only_loss") is None else {}
    return {"packing": False} if dataset.column_names == ["input_ids"] else {}  # general rows are packed already


def _check_trained(args: SFTConfig, dataset: Dataset, made: Any) -> None:
    """Raises TrainingError where the labels of the first rows are not the tokens that are scored, and their end."""
    if "completion_mask" not in dataset.column_names or args.packing or args.shuffle_dataset:
        return
    for row, prepared in zip(dataset.select(range(min(4, len(dataset)))), made, strict=False):
        masks = row["completion_mask"] if args.completion_only_loss else [1] * len(row["input_ids"])
        labels = [token if trained else -100 for token, trained in zip(row["input_ids"], masks, strict=True)]
        if args.max_length is not None and args.truncation_mode == "keep_end":
            labels = labels[-args.max_length :]
        if prepared["labels"] != labels:
            raise TrainingError(
                "TRL trains other tokens than those that are scored: expected the labels "
                f"{labels}, got {prepared['labels']}. Leave out arguments of training.tune that change rows."
            )


def _latest(output: Path) -> str | None:
    found = latest_checkpoint(output)
    return None if found is None else str(found)
