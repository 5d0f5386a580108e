"""Outputs are whole or absent: written beside their place, flushed to the disk, renamed into it."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hlora.errors import ConfigError


def make_directory(directory: Path) -> None:
    """Make a directory for output. Raises ConfigError when it cannot be made or written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(None, "no permission")
    except OSError as error:
        raise ConfigError(
            f"output: {directory} cannot be written ({error.strerror}). Name another directory."
        ) from None


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep a directory to this process. The operating system frees it when the process ends, however that may be.

    Raises ConfigError that names the process which has it, and since when; or that it cannot be written.
    """
    make_directory(directory)
    with (directory / ".lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"output: {directory} is in use by {lock.read().strip() or 'another process'}. "
                "Wait until it has ended, stop it, or name another directory."
            ) from None
        for left in (*directory.glob(".*.old"), *directory.glob(".*.tmp")):
            clear(directory / left.name[1:].rsplit(".", 2)[0], locked=True)
        lock.truncate(0)
        lock.write(f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        yield


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    building = beside(path, "tmp")
    try:
        with building.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def beside(path: Path, kind: str) -> Path:
    """A name beside `path` that no other process, of this machine or another, and no other thread has.

    kind: tmp for what will take its place, old for what had it.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}-{_machine()}.{kind}")


@contextmanager
def building(directory: Path, locked: bool = False) -> Iterator[Path]:
    """A fresh directory to fill; it takes the place of `directory` when the block ends without an exception.

    What an interrupted process left of the same directory is cleared away (`locked`: see clear).
    """
    clear(directory, locked)
    fresh = beside(directory, "tmp")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                flush(file)
        previous = beside(directory, "old")
        if directory.exists():
            directory.rename(previous)
        try:
            fresh.rename(directory)
        except BaseException:
            if previous.exists():
                previous.rename(directory)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def clear(path: Path, locked: bool = False) -> None:
    """Remove what an interrupted `building` or `write_text` left beside `path`, and put back what it had moved away.

    What a living process of this machine is about to finish stays. Of another machine's process nobody here knows
    whether it lives: what it left goes only if the caller has the lock of `path` (locked), so no other works on it.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        owner, kind = left.name.rsplit(".", 2)[1:]
        pid, _, rest = owner.partition("-")
        if kind not in ("old", "tmp") or not pid.isdecimal():
            continue
        here = rest.partition("-")[2] == _machine()
        if (here and int(pid) != os.getpid() and _lives(int(pid))) or not (here or locked):
            continue
        if kind == "old" and not path.exists():
            left.rename(path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _machine() -> str:
    return socket.gethostname().replace(".", "_")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
