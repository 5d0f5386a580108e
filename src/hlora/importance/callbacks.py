"""Recording and penalty as callbacks of Trainer and its subclasses, such as SFTTrainer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerState

from hlora.importance.layer_weights import diverged
from hlora.model.optimizers import check_trained_by, steps_in_backward
from hlora.parallel.group import broadcast_bool
from hlora.system.errors import AdapterError, TrainingError
from hlora.training.checkpoint_files import checkpoint_directory, load_state, resumed_checkpoint, save_state
from hlora.training.clipping import (
    clip_after_callbacks,
    clip_as_before,
    give_back_clipping,
    take_clipping,
    unscale,
    unwrapped_optimizer,
)
from hlora.training.trackers import LayerCoefficients

if TYPE_CHECKING:
    from hlora.importance.penalty import ImportancePenalty
    from hlora.importance.recorder import ImportanceRecorder


class RecordingCallback(TrainerCallback):
    """Records every optimizer step of `train()`. Made by `recorder.callback()`.

    Every checkpoint that Trainer writes holds the recorder's state, which is restored when Trainer resumes from it.

    Args:
        recorder: The recorder of the trained model.
        stop_at_move: Ends the training once `recorder.move()` reaches this share.
    """

    def __init__(self, recorder: ImportanceRecorder, stop_at_move: float | None = None) -> None:
        self.recorder = recorder
        self.stop_at_move = stop_at_move
        self._detach: Any = None
        self._watch: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.n_gpu > 1 and self.recorder.method == "squared_gradients":
            raise AdapterError(
                f"Trainer would copy the model to {args.n_gpu} GPUs (torch.nn.DataParallel), where the recorder cannot "
                "tell rows apart. Launch with torchrun, for DDP. Or use one GPU: CUDA_VISIBLE_DEVICES=0."
            )
        if self._detach is not None:
            self._detach()
            self._watch.end()
        if state.global_step > 0:
            self.recorder.load_state_dict(load_state(resumed_checkpoint(args, state), self._file()))
        self._detach = self.recorder.attach(kwargs["optimizer"])
        self._watch = _Watch(kwargs["optimizer"])
        clip_after_callbacks(args, kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        take_clipping(args)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unscale(kwargs["optimizer"])
        self.recorder.capture_from(kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        give_back_clipping(args)
        self._watch.check_step()
        self.recorder.discard()  # not empty only if a gradient scaler skipped the step
        if self.stop_at_move is not None and broadcast_bool(self.recorder.move() >= self.stop_at_move):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = self.recorder.state_dict()  # in every process, as each holds a part
        if args.should_save:
            save_state(checkpoint_directory(args, state), self._file(), kept)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._detach()
        self._detach = None
        self._watch.end()
        clip_as_before(args, kwargs["optimizer"])

    def _file(self) -> str:
        return f"recording-{self.recorder.kind}"


class PenaltyCallback(TrainerCallback):
    """Adds the gradient of φ·L_reg (Eq. 16) once per optimizer step. Made by `penalty.callback()`.

    Each log entry of Trainer gets regularisation_loss (L_reg), weighted_regularisation_loss (φ·L_reg), total_loss, and
    phi, which is the next step's. The losses are means over the same steps as `loss`, which stays the task loss alone.

    Trainer calls its trackers before a callback in its list, so the trackers miss these columns. `protect` and `train`
    therefore put this callback first, and send the layer coefficients to the trackers.

    Args:
        penalty: The penalty of the trained model.
    """

    def __init__(self, penalty: ImportancePenalty) -> None:
        self.penalty = penalty
        self._begin_log()
        self._watch: Any = None
        self._handle: Any = None

    def after_trackers(self, trainer: Trainer) -> TrainerCallback:
        """A callback that sends the layer coefficients; `add_callback_first` puts it after the trackers."""
        return LayerCoefficients(trainer, self.penalty.coefficients)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._watch is not None:
            self._watch.end()
            self._handle.remove()
        optimizer = unwrapped_optimizer(kwargs["optimizer"])
        check_trained_by(optimizer, self.penalty.matrices)
        self._begin_log()
        self._watch = _Watch(kwargs["optimizer"])
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        clip_after_callbacks(args, optimizer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        take_clipping(args)
        self.penalty.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unscale(kwargs["optimizer"])
        self._step = state.global_step + 1

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        give_back_clipping(args)
        if self._watch is not None:
            self._watch.check_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or self._count == 0:
            return
        value, weighted = float(self._sum) / self._count, self._checked(state) / self._count
        self._begin_log()
        losses = {
            "regularisation_loss": value,
            "weighted_regularisation_loss": weighted,
            "total_loss": logs["loss"] + weighted,
            "phi": self.penalty.phi,
        }
        logs.update(losses)
        state.log_history[-1].update(losses)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._checked(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._watch is not None:
            self._watch.end()
            self._watch = None
            self._handle.remove()
        clip_as_before(args, kwargs["optimizer"])
        self._checked(state)

    def _begin_log(self) -> None:
        self._sum: torch.Tensor | float = 0.0
        self._weighted: torch.Tensor | float = 0.0
        self._count = 0

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        try:
            value = self.penalty.add_gradients_()
        except TrainingError as error:
            raise TrainingError(f"step {self._step}: {error}") from None
        self._sum = self._sum + value
        self._weighted = self._weighted + self.penalty.phi * value  # a budget changes φ from step to step
        self._count += 1

    def _checked(self, state: TrainerState) -> float:
        """Sum of the weighted penalties since the last log. Synchronises with the device, so it is not for every step.

        Raises:
            TrainingError: The sum is not finite.
        """
        weighted = float(self._weighted)
        if not math.isfinite(weighted):
            raise TrainingError(f"step {state.global_step}: {diverged(weighted, self.penalty.phi)}")
        return weighted


class _Watch:
    """Checks that every step of a training passes the optimizer's hooks, by which hlora records and protects."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._seen = optimizer, False
        self._handle = unwrapped_optimizer(optimizer).register_step_pre_hook(self._see)

    def _see(self, *call: Any) -> None:
        self._seen = True

    def check_step(self) -> None:
        """Call after each step. Raises AdapterError if no hook saw it, unless a gradient scaler skipped it."""
        if not self._seen and not getattr(self._optimizer, "step_was_skipped", False):
            raise AdapterError(steps_in_backward(type(unwrapped_optimizer(self._optimizer)).__name__))
        self._seen = False

    def end(self) -> None:
        self._handle.remove()
