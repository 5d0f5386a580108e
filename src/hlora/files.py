"""Outputs are whole or absent: written beside their place, flushed to the disk, renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with building.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


@contextmanager
def building(directory: Path) -> Iterator[Path]:
    """A fresh directory to fill; it takes the place of `directory` when the block ends without an exception."""
    fresh = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        previous = directory.with_name(f".{directory.name}.{os.getpid()}.old")
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
