"""Checkpoints on the disk: which one is complete, and nested state as safetensors and JSON."""

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

_TENSOR = "tensor"  # key of a mapping that stands for a tensor in JSON


def checkpoint_directory(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that Trainer has just written, or goes on from."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in Trainer's output directory. Says which newer ones are not complete, and why.

    One of the last step is left out: Trainer would go on from it with one step more.
    """
    found = sorted(directory.glob("checkpoint-*"), key=lambda path: _number(path.name), reverse=True)
    for checkpoint in found:
        try:
            check_checkpoint(checkpoint)
        except ArtifactError as error:
            logger.warning("%s; an older one is used, or the phase starts again", error)
            continue
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps:
            return checkpoint
    return None


def check_checkpoint(checkpoint: Path) -> None:
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


def remove_checkpoints(directory: Path) -> None:
    """Remove the checkpoints of a phase whose result is kept."""
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def complete_checkpoint(checkpoint: Path) -> None:
    """Take the pickles away, bring all files to the disk, and write the list that says so."""
    files = []
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in PICKLES:
            file.unlink()
        elif file.is_file() and file.name != "complete.json":
            flush(file)
            files.append(file)
    write_json(checkpoint / "complete.json", {"sha256": {file.name: sha256(file) for file in files}})


def save_state(checkpoint: Path, name: str, state: Mapping[str, Any]) -> None:
    """Nested mappings, lists, numbers, text and tensors, as <name>.json and <name>.safetensors in a checkpoint.

    Raises ArtifactError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    document = split_tensors(state, "", tensors)
    save_file(tensors, checkpoint / f"{name}.safetensors")
    write_json(checkpoint / f"{name}.json", document)


def load_state(checkpoint: Path, name: str) -> dict[str, Any]:
    """The inverse of `save_state`. Raises ArtifactError when it is not there or not readable."""
    try:
        document = json.loads((checkpoint / f"{name}.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = join_tensors(document, load_file(checkpoint / f"{name}.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(
            f"{checkpoint}: {name}.json and {name}.safetensors cannot be read ({first_line(error)}). Training goes on "
            "from checkpoints in its output directory that hlora's callbacks took part in; or start it anew."
        ) from None
    return found


def split_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of `value`; mappings as lists of pairs, since their keys may be numbers. Tensors go out."""
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
        f"a checkpoint holds numbers, text and tensors; {place.lstrip('.')} is a {type(value).__name__}. "
        "Train with an optimizer and a schedule that PyTorch or Transformers bring."
    )


def join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split_tensors`; mappings come back as dictionaries, tuples as lists."""
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: join_tensors(each, tensors) for key, each in value["items"]}
    return [join_tensors(each, tensors) for each in value] if isinstance(value, list) else value


def _number(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
