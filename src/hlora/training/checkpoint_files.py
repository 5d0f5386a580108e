"""Checkpoints on disk: which one is complete, and nested state as safetensors and JSON."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from hlora.system.errors import ArtifactError, first_line
from hlora.system.files import PICKLES, flush, sha256, write_json

logger = logging.getLogger("hlora")

_TENSOR = "tensor"  # key of the mapping that represents a tensor in JSON


def checkpoint_directory(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that Trainer has just written, or resumes from."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def resumed_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that Trainer resumes from, which is where a callback finds its own files.

    Trainer does not tell callbacks its path. So the checkpoint is looked for in `output_dir`.

    Raises:
        ArtifactError: Trainer resumes from a checkpoint elsewhere.
    """
    checkpoint = checkpoint_directory(args, state)
    try:
        there = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
    except (OSError, ValueError, TypeError):
        there = None
    if there is None or json.dumps(there) != json.dumps(state.log_history):
        raise ArtifactError(
            f"{checkpoint}: training resumes from step {state.global_step} of a checkpoint that is not this one. "
            f"Copy its directory to {checkpoint}, and resume from there."
        )
    return checkpoint


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in Trainer's output directory. Logs why newer ones are not usable.

    A checkpoint of the last step is skipped, since Trainer would resume from it with one more step.
    """
    found = sorted(directory.glob("checkpoint-*"), key=lambda path: _number(path.name), reverse=True)
    for checkpoint in found:
        try:
            check_checkpoint(checkpoint)
        except ArtifactError as error:
            logger.warning("%s; resuming from an older one, or from the start of the phase", error)
            continue
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps:
            return checkpoint
    return None


def check_checkpoint(checkpoint: Path) -> None:
    """Raises ArtifactError if a checkpoint is incomplete or damaged, or has a pickle, which Trainer would read."""
    try:
        sums = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["sha256"]
        for name, expected in sums.items():
            if sha256(checkpoint / Path(name).name) != expected:
                raise ArtifactError(f"{checkpoint}: {name} is damaged")
        for file in checkpoint.rglob("*"):
            if file.suffix in PICKLES:
                raise ArtifactError(f"{checkpoint}: contains {file.name}, a pickle, which hlora does not write")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{checkpoint}: incomplete ({type(error).__name__}: {error})") from None


def remove_checkpoints(directory: Path) -> None:
    """Remove the checkpoints of a phase whose result is saved."""
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def complete_checkpoint(checkpoint: Path) -> None:
    """Remove the pickles, flush all files to disk, and write the list of their sums."""
    files = []
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in PICKLES:
            file.unlink()
        elif file.is_file() and file.name != "complete.json":
            flush(file)
            files.append(file)
    write_json(checkpoint / "complete.json", {"sha256": {file.name: sha256(file) for file in files}})


def save_state(checkpoint: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write nested mappings, lists, numbers, text and tensors as <name>.json and <name>.safetensors.

    Raises:
        ArtifactError: The state contains anything else.
    """
    tensors: dict[str, Tensor] = {}
    document = split_tensors(state, "", tensors)
    save_file(tensors, checkpoint / f"{name}.safetensors")
    write_json(checkpoint / f"{name}.json", document)


def load_state(checkpoint: Path, name: str) -> dict[str, Any]:
    """The inverse of `save_state`. Raises ArtifactError if the files are missing or not readable."""
    try:
        document = json.loads((checkpoint / f"{name}.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = join_tensors(document, load_file(checkpoint / f"{name}.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(
            f"{checkpoint}: {name}.json and {name}.safetensors cannot be read ({first_line(error)}). Training "
            "resumes only from checkpoints that were written with hlora's callbacks. Resume from another, or restart."
        ) from None
    return found


def split_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """`value` for JSON: tensors move to `tensors`, and mappings become lists of pairs, as keys may be numbers."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: place}
    if isinstance(value, Mapping):
        return {"items": [[key, split_tensors(each, f"{place}.{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [split_tensors(each, f"{place}.{number}", tensors) for number, each in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ArtifactError(
        f"a checkpoint can hold numbers, text and tensors; {place.lstrip('.')} is a {type(value).__name__}. "
        "Use an optimizer and a schedule of PyTorch or Transformers."
    )


def join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split_tensors`. Mappings become dictionaries, tuples become lists."""
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: join_tensors(each, tensors) for key, each in value["items"]}
    return [join_tensors(each, tensors) for each in value] if isinstance(value, list) else value


def _number(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
