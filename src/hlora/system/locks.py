"""Locks, so that one process at a time works on an output directory or a cell of a comparison.

The lock is the operating system's, by filelock: flock on Unix, LockFileEx on Windows. It is released when its
process ends for any reason. A network file system must support locks: NFS does from Linux 2.6.12 on, unless mounted
with nolock. On a file system without locks, filelock warns and falls back to a marker file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hlora.system.errors import ConfigError
from hlora.system.files import make_directory, refuse_links, remove_leftovers, write_text


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Lock a file, which is created if missing. Yields False at once if another process or thread holds the lock.

    Raises:
        OSError: The file is a symbolic link.
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
    """Lock an output directory, which is created if missing, and clear away leftovers of an interrupted process.

    Raises:
        ConfigError: Another process holds the lock (named, with its start), or the directory cannot be written. Or, at
            the end, the directory is no longer the one that was locked, as after a lost mount.
    """
    make_directory(directory)
    refuse_links(directory)
    lock, owner = directory / ".lock", directory / ".lock.owner"  # on Windows others cannot read a locked file
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
            remove_leftovers(directory / left.name[1:].rsplit(".", 2)[0], locked=True)
        write_text(owner, f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        locked = lock.stat()
        yield
        # If the directory vanished, Trainer or TensorBoard has created another in its place.
        try:
            same = os.path.samestat(locked, lock.lstat())
        except OSError:
            same = False
        if not same:
            raise ConfigError(
                f"output: {directory} was taken away while this ran, as after a lost mount. What is there now may be "
                "incomplete. Bring it back and start the same command again, which resumes from what it holds."
            )
