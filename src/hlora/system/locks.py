"""One process at a time works on an output directory, or on one cell of a comparison.

The lock is the operating system's, by filelock: flock on Unix, LockFileEx on Windows. It ends with its process, however
that ends. A network file system has to pass locks on: NFS does from Linux 2.6.12 on, unless mounted with nolock. Where
a file system has none, filelock warns and falls back to a file that marks the holder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hlora.system.errors import ConfigError
from hlora.system.files import clear, make_directory, refuse_links, write_text


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Lock a file, made if it is not there. False at once when another process or thread holds the lock.

    Raises OSError where the file is a symbolic link.
    """
    try:
        held = FileLock(path).acquire(blocking=False)
    except Timeout:
        yield False
        return
    with held:
        yield True


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Lock an output directory, made if it is not there, and clear away what an interrupted process left in it.

    Raises ConfigError that names the process which holds the lock, and since when; or that the directory cannot be
    written; or, at the end, that it is no longer the one which was locked, as when a mount is lost.
    """
    make_directory(directory)
    refuse_links(directory)
    lock, owner = directory / ".lock", directory / ".lock.owner"  # Windows lets no other process read a locked file
    with try_lock(lock) as mine:
        if not mine:
            holder = ""
            with suppress(OSError):
                holder = owner.read_text(encoding="utf-8", errors="replace").strip()
            raise ConfigError(
                f"output: {directory} is in use by {holder or 'another process'}. "
                "Wait until it has ended, stop it, or name another directory."
            )
        for left in (*directory.glob(".*.old"), *directory.glob(".*.tmp")):
            clear(directory / left.name[1:].rsplit(".", 2)[0], locked=True)
        write_text(owner, f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        locked = lock.stat()
        yield
        # What makes directories that are missing, Trainer and TensorBoard too, has begun another in its place.
        try:
            same = os.path.samestat(locked, lock.lstat())
        except OSError:
            same = False
        if not same:
            raise ConfigError(
                f"output: {directory} was taken away while this ran, as when a mount is lost; what is there now may "
                "not be whole. Bring it back and start the same command again, which goes on from what it holds."
            )
