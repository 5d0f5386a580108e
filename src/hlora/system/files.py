"""Atomic writes: an output is written next to its place, flushed to the disk, and renamed into place."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from hlora.system.errors import ConfigError
from hlora.system.redaction import redacted

ROW_FILES = (".jsonl", ".json", ".parquet", ".csv")
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
"""How a file with one of these suffixes is compressed."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Suffixes of files that PyTorch and others unpickle."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def kind_of_file(path: str) -> str:
    """The file's suffix, before .gz or .zst."""
    name = Path(path)
    return name.with_suffix("").suffix if name.suffix in PACKINGS else name.suffix


def make_directory(directory: Path) -> None:
    """Make a directory for output. Raises ConfigError if it cannot be made or written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(None, "no permission")
    except OSError as error:
        raise ConfigError(
            f"output: {directory} cannot be written ({error.strerror}). Name another directory."
        ) from None


def check_directory(directory: Path) -> None:
    """Raises ConfigError if an output path, or a parent of it, is no directory or one without permission.

    Writes nothing.
    """
    try:
        there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(None, f"{there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(None, f"no permission to write in {there}")
    except OSError as error:
        raise ConfigError(f"output: {directory} cannot be used ({error.strerror}). Name another directory.") from None


def refuse_links(directory: Path) -> None:
    """Raises ConfigError for a symbolic link in an output directory that a write or removal would follow.

    The directory itself may be a link. A linked file or artefact in it is replaced, and the link's target stays.
    """
    for path in (directory / ".lock", directory / "logs", *directory.glob("logs/*"), *directory.glob("logs/*/*")):
        if path.is_symlink():
            raise ConfigError(
                f"output: {path} is a link to {path.readlink()}, and what is written there would be too. Remove the "
                "link, or name another directory."
            )


def is_io_error(error: BaseException) -> bool:
    """Whether an error means that a file could not be read or written.

    Libraries raise their own: safetensors an error type, tokenizers a bare Exception with "(os error 28)", torch.save a
    RuntimeError of its stream writer.
    """
    if isinstance(error, OSError | SafetensorError):
        return True
    return bool(re.search(r"\(os error \d+\)|PytorchStreamWriter|inline_container", str(error)))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    partial = temporary_name(path, "tmp")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, indent: int | None = None) -> Any:
    """Write a value as JSON atomically, with secrets redacted; returns the value as written."""
    written = redacted(value)
    write_text(path, json.dumps(written, indent=indent))
    return written


def how_to_convert(directory: Path) -> str:
    """A hint with a leading space if a directory holds pickled weights, else an empty text."""
    found = (path.name for path in directory.glob("*") if path.suffix in PICKLES)
    pickles = sorted(name for name in found if not name.startswith(("training_args", "optimizer", "scheduler", "rng")))
    if not pickles:
        return ""
    code = (
        "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in "
        f"torch.load('{pickles[0]}', weights_only=True).items()}}, '{Path(pickles[0]).stem}.safetensors')"
    )
    return f' {pickles[0]} is a pickle, which can hold code and is not read. If you trust it: python -c "{code}"'


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is what Git writes in place of a large one, until `git lfs pull` fetches it."""
    with path.open("rb") as stream:
        return stream.read(len(_LFS_POINTER)) == _LFS_POINTER


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as stream:  # Windows flushes only what is open for writing
        os.fsync(stream.fileno())


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def temporary_name(path: Path, kind: str) -> Path:
    """A temporary name next to `path` that is unique to this process, machine and call.

    Args:
        path: The final place.
        kind: tmp for a new version, old for the one that it replaces.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}-{_machine()}.{kind}")


@contextmanager
def atomic_directory(directory: Path, locked: bool = False) -> Iterator[Path]:
    """Yield a fresh directory to fill. It replaces `directory` when the block ends without an exception.

    Clears away leftovers of an interrupted process first.

    Args:
        directory: The final place.
        locked: See `remove_leftovers`.
    """
    remove_leftovers(directory, locked)
    fresh = temporary_name(directory, "tmp")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                flush(file)
        previous = temporary_name(directory, "old")
        if directory.exists():
            directory.rename(previous)
        try:
            fresh.rename(directory)
        except BaseException:
            if previous.exists():
                previous.rename(directory)
            raise
        _remove(previous)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def remove_leftovers(path: Path, locked: bool = False) -> None:
    """Remove leftovers of an interrupted write of `path`, and restore the version that it had moved away.

    Leftovers of a live process on this machine are kept. Whether a process on another machine is alive cannot be known
    here, so its leftovers are removed only under a lock.

    Args:
        path: The final place.
        locked: The caller holds the lock of `path`, so no other process works on it.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        owner, kind = left.name.rsplit(".", 2)[1:]
        pid, _, rest = owner.partition("-")
        if kind not in ("old", "tmp") or not pid.isdecimal():
            continue
        here = rest.partition("-")[2] == _machine()
        if (here and int(pid) != os.getpid() and psutil.pid_exists(int(pid))) or not (here or locked):
            continue
        if kind == "old" and not path.exists():
            left.rename(path)
        else:
            _remove(left)


def _remove(path: Path) -> None:
    """Remove a file, a directory or a link; a link's target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _machine() -> str:
    return socket.gethostname().replace(".", "_")
