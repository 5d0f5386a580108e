"""Checkpoints of a training phase, to go on from as if nothing had happened: bit by bit on a CPU.

Trainer's own hold pickles (optimizer.pt, scheduler.pt, rng_state.pth, training_args.bin). With `save_only_model` it
leaves all but the last out and writes the adapter and trainer_state.json. Added to each checkpoint-N are

    resume.safetensors, resume.json              optimizer, learning-rate schedule, gradient scaler, random numbers
                                                 (of each process)
    recording-<kind>.safetensors, … .json        what a recorder knows; RecordingCallback adds them in any Trainer
    complete.json                                SHA-256 of every file, last: a directory without it is not complete

Nothing of it is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hlora.distributed import exchange, is_first, rank, together
from hlora.dtensor import laid_out_like, whole
from hlora.errors import ArtifactError, first_line
from hlora.files import PICKLES, flush, sha256, write_text

logger = logging.getLogger("hlora")

_EVERY = 300.0  # seconds between checkpoints
_TENSOR = "tensor"  # key of a mapping that stands for a tensor in JSON


class Checkpoints(TrainerCallback):
    """Saves a checkpoint every five minutes, and restores one when Trainer resumes.

    In a group of processes the first one's clock counts, and it writes. Any number of them may go on: one that was not
    there before takes the first one's random numbers.

    Has to be the last callback, since it completes the checkpoint.
    """

    def __init__(self) -> None:
        self._saved = 0.0
        self._epoch: dict[str, Any] = {}  # random numbers where the epoch began: they order its batches
        self._epoch_number = -1
        self._resumed: dict[str, Any] | None = None  # until its random numbers are restored

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved = time.monotonic()
        if state.global_step == 0:
            return
        kept = load_state(of(args, state), "resume")
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
            set_random_state(self._resumed["epoch"])  # orders the batches as before; the rest is set at the first step
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
        if not ends and exchange("due" if time.monotonic() - self._saved >= _EVERY else "")[0]:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        state_now = {
            "optimizer": _gathered(kwargs["optimizer"].state_dict()),
            "schedule": kwargs["lr_scheduler"].state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "epoch_number": self._epoch_number,
        }
        first, *others = [
            _from_text(text) for text in exchange(_to_text({"random": random_state(), "epoch": self._epoch}))
        ]
        with together():
            if is_first():
                save_state(of(args, state), "resume", state_now | first | ({"others": others} if others else {}))
                complete(of(args, state))
        self._saved = time.monotonic()


def of(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that Trainer has just written, or goes on from."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint in Trainer's output directory. Says which newer ones are not complete, and why.

    One of the last step is left out: Trainer would go on from it with one step more.
    """
    found = sorted(directory.glob("checkpoint-*"), key=lambda path: _number(path.name), reverse=True)
    for checkpoint in found:
        try:
            check(checkpoint)
        except ArtifactError as error:
            logger.warning("%s; an older one is used, or the phase starts again", error)
            continue
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps:
            return checkpoint
    return None


def check(checkpoint: Path) -> None:
    """Raises ArtifactError that names what a checkpoint lacks, what is damaged, or a pickle for Trainer to read."""
    try:
        sums = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["sha256"]
        for name, expected in sums.items():
            if sha256(checkpoint / Path(name).name) != expected:
                raise ArtifactError(f"{checkpoint}: {name} is damaged")
        for file in checkpoint.rglob("*"):
            if file.suffix in PICKLES:
                raise ArtifactError(f"{checkpoint}: holds {file.name}, a pickle, as none of hlora's does")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{checkpoint}: not complete ({type(error).__name__}: {error})") from None


def remove(directory: Path) -> None:
    """Remove the checkpoints of a phase whose result is kept."""
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def complete(checkpoint: Path) -> None:
    """Take the pickles away, bring all files to the disk, and write the list that says so."""
    files = []
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in PICKLES:
            file.unlink()
        elif file.is_file() and file.name != "complete.json":
            flush(file)
            files.append(file)
    write_text(checkpoint / "complete.json", json.dumps({"sha256": {file.name: sha256(file) for file in files}}))


def save_state(checkpoint: Path, name: str, state: Mapping[str, Any]) -> None:
    """Nested mappings, lists, numbers, text and tensors, as <name>.json and <name>.safetensors in a checkpoint.

    Raises ArtifactError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    document = _split(state, "", tensors)
    save_file(tensors, checkpoint / f"{name}.safetensors")
    write_text(checkpoint / f"{name}.json", json.dumps(document))


def load_state(checkpoint: Path, name: str) -> dict[str, Any]:
    """The inverse of `save_state`. Raises ArtifactError when it is not there or not readable."""
    try:
        document = json.loads((checkpoint / f"{name}.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = _join(document, load_file(checkpoint / f"{name}.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(
            f"{checkpoint}: {name}.json and {name}.safetensors cannot be read ({first_line(error)}). Training goes on "
            "from checkpoints in its output directory that hlora's callbacks took part in; or start it anew."
        ) from None
    return found


def _gathered(value: Any) -> Any:
    """An optimizer's state with what FSDP2 has sharded brought together; every process calls it."""
    if isinstance(value, Mapping):
        return {key: _gathered(each) for key, each in value.items()}
    return whole(value) if isinstance(value, Tensor) else value


def _load_into(optimizer: Any, kept: dict[str, Any]) -> None:
    """`load_state_dict`, with the sums of a sharded parameter laid out as it is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, sums in kept["state"].items():
        of = parameters[number]
        kept["state"][number] = {
            name: laid_out_like(of, each.to(of.device)) if isinstance(each, Tensor) and each.shape == of.shape else each
            for name, each in sums.items()
        }
    optimizer.load_state_dict(kept)


def random_state() -> dict[str, Any]:
    """Of Python, NumPy, PyTorch and each of its accelerators."""
    name, keys, *rest = np.random.get_state(legacy=True)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    python = random.getstate()
    return {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": list(devices),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _split(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of `value`; mappings as lists of pairs, since their keys may be numbers. Tensors go out."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: place}
    if isinstance(value, Mapping):
        return {"items": [[key, _split(each, f"{place}.{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [_split(each, f"{place}.{number}", tensors) for number, each in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ArtifactError(
        f"a checkpoint holds numbers, text and tensors; {place.lstrip('.')} is a {type(value).__name__}. "
        "Train with an optimizer and a schedule that PyTorch or Transformers bring."
    )


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _join(each, tensors) for key, each in value["items"]}
    return [_join(each, tensors) for each in value] if isinstance(value, list) else value


def _to_text(state: Mapping[str, Any]) -> str:
    tensors: dict[str, Tensor] = {}
    document = _split(state, "", tensors)
    numbers = {name: [str(t.dtype).removeprefix("torch."), t.tolist()] for name, t in tensors.items()}
    return json.dumps([document, numbers])


def _from_text(text: str) -> dict[str, Any]:
    document, numbers = json.loads(text)
    found: dict[str, Any] = _join(
        document, {n: torch.tensor(v, dtype=getattr(torch, d)) for n, (d, v) in numbers.items()}
    )
    return found


def _number(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
