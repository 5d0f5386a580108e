"""The files that a run was made from, as they were: by these a later command sees whether one has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hlora.config.data_files import named_files
from hlora.config.run import RunConfig
from hlora.system.files import sha256
from hlora.system.redaction import redact_text

KEPT = "inputs.json"
"""In an output directory: size, time and digest of each file, by field and name."""
CONTINUED = "importance-after"
"""In an output directory: the importance of the general text and of every domain so far, anchored at the adapter."""

Inputs = dict[str, dict[str, dict[str, Any]]]

_WEIGHTS = (".safetensors", ".gguf")
_BLOCK, _STRIDE = 2**16, 2**22  # bytes


def inputs_of(config: RunConfig) -> Inputs:
    """Size, time of change and digest of each local file that a configuration names, by field and name."""
    return {
        field: {name: {**_size_and_time(path), "sha256": _digest(path)} for name, path in files.items()}
        for field, files in _files(config).items()
    }


def changed_since(output: Path, config: RunConfig) -> list[str]:
    """The fields whose files are not those that the run in `output` was made from. Moved and copied ones are.

    A run of an earlier version kept no record; of it, files that are newer than its config.yaml count as changed.
    """
    kept = _kept(output)
    if kept is None:
        made = (output / "config.yaml").stat().st_mtime
        files = _files(config).items()
        return [field for field, found in files if any(path.stat().st_mtime > made for path in found.values())]
    return [
        field
        for field, found in _files(config).items()
        if found.keys() != kept.get(field, {}).keys()
        or any(_differs(kept[field][name], path) for name, path in found.items())
    ]


def has_record(output: Path, field: str) -> bool:
    """Whether the run in `output` kept a record of the files that a field named."""
    return field in (_kept(output) or {})


def _kept(output: Path) -> Inputs | None:
    """The record in an output directory; None for one of an earlier version, or a damaged one."""
    try:
        kept = json.loads((output / KEPT).read_text(encoding="utf-8"))
        return {field: {name: dict(facts) for name, facts in files.items()} for field, files in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _files(config: RunConfig) -> dict[str, dict[str, Path]]:
    """Files by field and name: a path as it is written, or a place within the directory that the field names."""
    named = [(field, Path(path)) for field, path in named_files(config)]
    if config.importance.use is not None:  # its importance.json has the digests of its other files
        named.append(("importance.use", Path(config.importance.use, "importance.json")))
    if config.after is not None:
        named.append(("after", Path(config.after, CONTINUED, "importance.json")))
    found: dict[str, dict[str, Path]] = {}
    for field, path in named:
        inside = {str(each.relative_to(path)): each for each in _inside(field, path)}
        files = {str(path): path} if path.is_file() else inside
        if files:  # what is missing is reported by its field where it is read
            found.setdefault(field, {}).update({redact_text(name): each for name, each in files.items()})
    return found


def _inside(field: str, directory: Path) -> Iterator[Path]:
    """The files in a directory, without hidden ones. A model is read from its top alone, and may have runs in it."""
    for path in sorted(directory.glob("*") if field == "model.name" else directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.is_file() and not hidden:
            yield path


def _differs(kept: dict[str, Any], path: Path) -> bool:
    now = _size_and_time(path)
    if all(kept.get(name) == value for name, value in now.items()):
        return False
    return kept.get("size") != now["size"] or kept.get("sha256") != _digest(path)


def _size_and_time(path: Path) -> dict[str, int]:
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _digest(path: Path) -> str:
    """SHA-256 of a file; of weights, of 64 KB in each 4 MB.

    Reading the 140 GB of a 70B model whole would delay each run by minutes. Training a model changes most of its
    matrices, and each of 4 MB has a part that is read.
    """
    if path.suffix not in _WEIGHTS:
        return sha256(path)
    found = hashlib.sha256()
    with path.open("rb") as stream:
        for start in range(0, os.fstat(stream.fileno()).st_size, _STRIDE):
            stream.seek(start)
            found.update(stream.read(_BLOCK))
    return found.hexdigest()
