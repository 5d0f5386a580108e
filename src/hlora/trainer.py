"""Recording and penalty inside Trainer and SFTTrainer; `protect`, the two-line way in; the one place that trains.

Trainer clips gradients before its first callback event, yet ω needs them unclipped and the penalty's gradient
has to be clipped with the rest. So a callback takes the clipping over: it sets `max_grad_norm` to 0 for the run
and clips by the same limit in the optimizer's own pre-step hook. Order of one step:

    backward … → a gradient scaler unscales → recorder captures → penalty adds its gradient → clip → optimizer steps
    → recorder integrates
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from torch.optim import Optimizer
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hlora import checkpoint, distributed
from hlora.adapters import adapted_matrices, check_trained_by
from hlora.errors import AdapterError, ConfigError, TrainingError
from hlora.importance import Importance
from hlora.penalty import ImportancePenalty, diverged
from hlora.progress import ProgressLine
from hlora.recorder import ImportanceRecorder
from hlora.trackers import LayerCoefficients, run_of_its_own

if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer

logger = logging.getLogger("hlora")

_QUICK = 10_000  # rows that TRL prepares in a few seconds, not worth its five progress bars


class RecordingCallback(TrainerCallback):
    """Feeds every optimizer step of `train()` to a recorder. Made by `recorder.callback()`.

    What the recorder knows is part of every checkpoint that Trainer writes, and restored when it goes on from one in
    its output directory.
    """

    def __init__(self, recorder: ImportanceRecorder, stop_at_move: float | None = None) -> None:
        self.recorder = recorder
        self.stop_at_move = stop_at_move
        self._detach: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._detach is not None:
            self._detach()
        if state.global_step > 0:
            self.recorder.load_state_dict(checkpoint.load_state(checkpoint.of(args, state), self._file()))
        self._detach = self.recorder.attach(kwargs["optimizer"])
        _clip_after_callbacks(args, kwargs["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _unscale(kwargs["optimizer"])
        self.recorder.capture_from(kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recorder.discard()  # left over only when a gradient scaler skipped the step
        if self.stop_at_move is not None and distributed.first_says(self.recorder.move() >= self.stop_at_move):
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kept = self.recorder.state_dict()  # by every process, each of which has a part
        if args.should_save:
            checkpoint.save_state(checkpoint.of(args, state), self._file(), kept)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()
        self._detach = None
        _clip_as_before(args, kwargs["optimizer"])

    def _file(self) -> str:
        return f"recording-{self.recorder.encoding}"


class PenaltyCallback(TrainerCallback):
    """Adds the gradient of φ·L_reg (Eq. 16) once per optimizer step. Made by `penalty.callback()`.

    Each log entry of Trainer gets regularisation_loss (L_reg), weighted_regularisation_loss (φ·L_reg) and
    total_loss, means over the same steps as `loss`, which stays the task's, and phi, the next step's. Trackers that run
    before this callback (all of them, by Trainer's order) see them only if it was put first, as `protect` and `train`
    do; those also tell trackers the layer coefficients.
    """

    def __init__(self, penalty: ImportancePenalty) -> None:
        self.penalty = penalty
        self._handle: Any = None
        self._sum: torch.Tensor | float = 0.0
        self._weighted: torch.Tensor | float = 0.0
        self._count = 0
        self._step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
        optimizer = _unwrapped(kwargs["optimizer"])
        check_trained_by(optimizer, self.penalty.matrices)
        self._sum, self._weighted, self._count = 0.0, 0.0, 0
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        _clip_after_callbacks(args, optimizer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.penalty.begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _unscale(kwargs["optimizer"])
        self._step = state.global_step + 1

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        try:
            value = self.penalty.add_gradients_()
        except TrainingError as error:
            raise TrainingError(f"step {self._step}: {error}") from None
        self._sum = self._sum + value
        self._weighted = self._weighted + self.penalty.phi * value  # a budget changes φ from step to step
        self._count += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._count == 0:
            return
        value, weighted = float(self._sum) / self._count, self._checked(state) / self._count
        self._sum, self._weighted, self._count = 0.0, 0.0, 0
        losses = {
            "regularisation_loss": value,
            "weighted_regularisation_loss": weighted,
            "total_loss": logs["loss"] + weighted,
            "phi": self.penalty.phi,
        }
        logs.update(losses)
        state.log_history[-1].update(losses)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._checked(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handle.remove()
        self._handle = None
        _clip_as_before(args, kwargs["optimizer"])
        self._checked(state)

    def _checked(self, state: TrainerState) -> float:
        """Sum of the weighted penalties since the last log. Waits for the device, so not at each step."""
        weighted = float(self._weighted)
        if not math.isfinite(weighted):
            raise TrainingError(f"step {state.global_step}: {diverged(weighted, self.penalty.phi)}")
        return weighted


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
        lost = [name for name, parameter in trained.items() if not distributed.whole(parameter.isfinite().all())]
        if lost:
            raise TrainingError(
                f"step {state.global_step}: {seen}{lost[0]} is not finite. Lower training.common.learning_rate, or set "
                "max_grad_norm; in float16 use bfloat16 or float32 instead."
            )


def protect(
    trainer: Trainer,
    importance: Importance | str | Path,
    phi: float,
    layer_weights: str = "softmax",
    phi_scale: str = "relative",
    group: str = "matrix",
    adapter_name: str | None = None,
    anchor: str = "general",
) -> ImportancePenalty:
    """Protect what `importance` covers while `trainer` trains: the two-line way in for an existing script.

    importance: an Importance, a directory or a hub repository. With the anchor "general" an untouched adapter (all B
    zero) is first set to θ^ν, the general adapter in the artefact, where the paper starts the domain task; any other is
    left as it is, and so is any with the anchor "base". The rest are arguments of ImportancePenalty, which is returned.

    Raises AdapterError when the trainer's model has no LoRA, ArtifactError when the importance does not fit it.
    """
    if not isinstance(importance, Importance):
        importance = Importance.load(importance)
    model = trainer.model
    if model is None:
        raise AdapterError("the trainer has no model yet; build it with model=, not model_init=")
    untouched = all(
        not distributed.whole(matrix.B).any() for matrix in adapted_matrices(model, adapter_name, unprotected="warn")
    )
    if untouched and anchor == "general":
        importance.load_adapter_into(model, adapter_name)
        logger.info("the adapter was untouched; it starts from the general adapter of the importance")
    penalty = ImportancePenalty(model, importance, phi, layer_weights, phi_scale, group, adapter_name, anchor)
    add_callback_first(trainer, penalty.callback())
    return penalty


def add_callback_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Add a callback ahead of Trainer's trackers, so that what it adds to a log entry is reported."""
    # Not trainer.add_callback, which warns of a second recorder: a comparison has several on one training.
    trainer.callback_handler.callbacks.insert(0, callback)
    if isinstance(callback, PenaltyCallback):
        trainer.callback_handler.callbacks.append(LayerCoefficients(trainer, callback.penalty.coefficients))


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
    defaults: dict[str, Any] = {"use_cpu": distributed.device_for(model).type == "cpu"}
    if distributed.world() > 1:
        defaults["ddp_find_unused_parameters"] = False  # LoRA layers are all used; looking for others takes a pass
    if resumable:
        defaults |= {"save_only_model": True, "save_total_limit": 2}  # two: the newest may be cut short
    of, phase = Path(output).resolve().parents[1].name, Path(output).name  # <output>/logs/<phase>
    named = {"run_name": f"{arguments.get('run_name', of)}/{phase}"}  # in trackers, where a phase is a run
    config = sft_arguments(output, {**defaults, **arguments, **named}, seed)
    if not config.push_to_hub:
        config.hub_token = None  # Trainer pickles its arguments into each checkpoint
    trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    if len(dataset) < _QUICK or not distributed.is_first():
        disable_progress_bars()
    try:
        trainer_class = trainer_class or SFTTrainer
        trainer = trainer_class(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    finally:
        enable_progress_bars()
    for parameter, before in trained:
        # TRL rounds the adapter of a quantised base to bfloat16, where small steps of the optimizer are lost.
        if parameter.dtype != before.dtype:
            parameter.data = before.to(parameter.device)
    trainer.remove_callback(PrinterCallback)  # what disable_tqdm puts in its place
    line = ProgressLine(Path(output).name)
    last = [checkpoint.Checkpoints()] if resumable else []
    for callback in (*last, line, StopWhenDiverged(), *callbacks):
        add_callback_first(trainer, callback)
    found = distributed.first_does(lambda: _latest(Path(output))) if resumable else None
    if found is not None:
        logger.info("going on from %s", found)
    try:
        with run_of_its_own():
            trainer.train(resume_from_checkpoint=found)
    finally:
        line.stop()  # Trainer does not call on_train_end after an error
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "probe_rise" in entry]
    for entry in history:
        entry.pop("num_tokens", None)  # TRL counts anew where a training goes on
    return history


def _latest(output: Path) -> str | None:
    found = checkpoint.latest(output)
    return None if found is None else str(found)


def _clip_after_callbacks(args: TrainingArguments, optimizer: Any) -> None:
    """Take the clipping over from Trainer, into a pre-step hook that runs after all hooks registered so far.

    Called by each callback in turn: the hook moves to the end. The limit stays with `args`, which an interrupted
    run leaves at 0 and a next trainer may be built from.
    """
    optimizer = _unwrapped(optimizer)
    limit = args.max_grad_norm or getattr(args, "_hlora_max_grad_norm", 0.0)
    _remove_clip(optimizer)

    def clip(optimizer: Optimizer, hook_args: Any, hook_kwargs: Any) -> None:
        if limit > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, limit)

    optimizer._hlora_clip = optimizer.register_step_pre_hook(clip)
    args._hlora_max_grad_norm = limit  # type: ignore[attr-defined]
    args.max_grad_norm = 0.0


def _clip_as_before(args: TrainingArguments, optimizer: Any) -> None:
    _remove_clip(_unwrapped(optimizer))
    if hasattr(args, "_hlora_max_grad_norm"):
        args.max_grad_norm = args._hlora_max_grad_norm
        del args._hlora_max_grad_norm


def _remove_clip(optimizer: Any) -> None:
    if hasattr(optimizer, "_hlora_clip"):
        optimizer._hlora_clip.remove()
        del optimizer._hlora_clip


def _unscale(optimizer: Any) -> None:
    """Divide a gradient scaler's factor out of the gradients, as Trainer's own clipping would have done before."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None:
        with suppress(RuntimeError):  # another callback, or Trainer, has done it in this step
            scaler.unscale_(_unwrapped(optimizer))


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer that Accelerate wraps, whose hooks run in the real step."""
    return getattr(optimizer, "optimizer", optimizer)
