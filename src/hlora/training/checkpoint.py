"""Checkpoints of a training phase. On a CPU a resumed phase equals an uninterrupted one, bit by bit.

Trainer's own checkpoints contain pickles (optimizer.pt, scheduler.pt, rng_state.pth, training_args.bin). With
`save_only_model` it writes the adapter, trainer_state.json and the last of these. hlora adds to each checkpoint-N:

    resume.safetensors, resume.json              optimizer, learning-rate schedule, gradient scaler, random numbers
                                                 (of each process)
    recording-<kind>.safetensors, … .json        a recorder's state, which RecordingCallback adds under any Trainer
    complete.json                                SHA-256 of every file, written last: without it, it is incomplete

Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hlora.parallel.dtensor import distribute_like, full_tensor
from hlora.parallel.group import all_gather_text, is_main, raise_on_all, rank
from hlora.training.checkpoint_files import (
    checkpoint_directory,
    complete_checkpoint,
    join_tensors,
    latest_checkpoint,
    load_state,
    save_state,
    split_tensors,
)
from hlora.training.interrupt import stop_interrupted

_EVERY = 300.0  # seconds between checkpoints


class Checkpoints(TrainerCallback):
    """Saves a checkpoint every five minutes and after an interrupt, and restores one when Trainer resumes.

    Must be the last callback, since it completes the checkpoint.

    In several processes: the main process's clock counts, and the main process writes. A phase can resume with another
    number of processes; an added process takes the main process's random numbers.
    """

    def __init__(self) -> None:
        self.interrupted = False  # ends the training after the present step
        self._saved = self._began = 0.0
        self._spent = 0.0  # seconds of training before the checkpoint that it resumed from
        self._epoch: dict[str, Any] = {}  # random numbers at the start of the epoch, which order its batches
        self._epoch_number = -1
        self._resumed: dict[str, Any] | None = None  # until its random numbers are restored

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved = self._began = time.monotonic()
        if state.global_step == 0:
            return
        kept = load_state(checkpoint_directory(args, state), "resume")
        self._spent = kept.get("seconds", 0.0)
        _load_into(kwargs["optimizer"], kept["optimizer"])
        kwargs["lr_scheduler"].load_state_dict(kept["schedule"])
        if kept["scaler"]:
            kwargs["optimizer"].scaler.load_state_dict(kept["scaler"])
        others = kept.get("others", [])
        self._resumed = kept | (others[rank() - 1] if 0 < rank() <= len(others) else {})

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        number = int(state.epoch or 0)
        if self._resumed is not None and self._resumed["epoch_number"] == number:
            set_random_state(self._resumed["epoch"])  # orders the batches as before; on_step_begin sets the others
        elif self._resumed is not None:  # the checkpoint was the last of its epoch
            set_random_state(self._resumed["random"])
            self._resumed = None
        self._epoch, self._epoch_number = random_state(), number

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._resumed is not None:
            set_random_state(self._resumed["random"])
            self._resumed = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ends = state.global_step >= state.max_steps or control.should_training_stop
        if ends:
            return
        due = time.monotonic() - self._saved >= _EVERY
        asked = all_gather_text("interrupted" if self.interrupted else "due" if due else "")
        if "interrupted" in asked:  # of any process: each gets the signal in its own time
            self.interrupted = True
            stop_interrupted(control)
        control.should_save = control.should_save or self.interrupted or asked[0] == "due"

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        state_now = {
            "optimizer": _gathered(kwargs["optimizer"].state_dict()),
            "schedule": kwargs["lr_scheduler"].state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "epoch_number": self._epoch_number,
            "seconds": self._spent + time.monotonic() - self._began,
        }
        first, *others = [
            _from_text(text) for text in all_gather_text(_to_text({"random": random_state(), "epoch": self._epoch}))
        ]
        with raise_on_all():
            if is_main():
                save_state(
                    checkpoint_directory(args, state),
                    "resume",
                    state_now | first | ({"others": others} if others else {}),
                )
                complete_checkpoint(checkpoint_directory(args, state))
        self._saved = time.monotonic()


def seconds_before(directory: Path) -> float:
    """Seconds that a phase has trained up to the checkpoint that it will resume from; 0 without one."""
    checkpoint = latest_checkpoint(directory)
    return 0.0 if checkpoint is None else float(load_state(checkpoint, "resume").get("seconds", 0.0))


def _gathered(value: Any) -> Any:
    """An optimizer's state in full, where FSDP2 has sharded it. Every process calls it."""
    if isinstance(value, Mapping):
        return {key: _gathered(each) for key, each in value.items()}
    return full_tensor(value) if isinstance(value, Tensor) else value


def _load_into(optimizer: Any, kept: dict[str, Any]) -> None:
    """`load_state_dict`, with the optimizer's sums distributed as their parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, sums in kept["state"].items():
        of = parameters[number]
        kept["state"][number] = {
            name: distribute_like(of, each.to(of.device))
            if isinstance(each, Tensor) and each.shape == of.shape
            else each
            for name, each in sums.items()
        }
    optimizer.load_state_dict(kept)


def random_state() -> dict[str, Any]:
    """State of the random number generators of Python, NumPy, PyTorch and this process's GPU, if it uses one."""
    name, keys, *rest = np.random.get_state(legacy=True)
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    python = random.getstate()
    return {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": devices,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


def _to_text(state: Mapping[str, Any]) -> str:
    tensors: dict[str, Tensor] = {}
    document = split_tensors(state, "", tensors)
    numbers = {name: [str(t.dtype).removeprefix("torch."), t.tolist()] for name, t in tensors.items()}
    return json.dumps([document, numbers])


def _from_text(text: str) -> dict[str, Any]:
    document, numbers = json.loads(text)
    found: dict[str, Any] = join_tensors(
        document, {n: torch.tensor(v, dtype=getattr(torch, d)) for n, (d, v) in numbers.items()}
    )
    return found
