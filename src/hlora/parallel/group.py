"""What the processes of a training must agree on: decisions, errors, and which process goes first.

Tensors travel through the training's own process group (importance/shares.py). Decisions and errors travel through a
second group (gloo), in which a process may wait for a long time without using a device. Without a process group, or in
a group of one, nothing here communicates.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hlora.system import errors, locks
from hlora.system.errors import HloraError

Work = TypeVar("Work")

_PATIENCE = timedelta(days=7)  # the others wait while the first one evaluates; if a process dies, the wait ends at once

_control: dict[Any, Any] = {}  # the gloo group of each default group


def world_size() -> int:
    """Number of processes in the default group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the default group; 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the main process, which writes."""
    return rank() == 0


def peer_died(error: Exception) -> bool:
    """Whether an error says that another process of the group has ended."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def all_gather_text(text: str) -> list[str]:
    """Gather the text of every process, ordered by rank. Every process must call it."""
    if world_size() == 1:
        return [text]
    if dist.group.WORLD not in _control:
        _control[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    group, mine = _control[dist.group.WORLD], torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(mine)]), group=group)
    longest = max(int(length) for length in lengths)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=group)
    return [bytes(t[: int(n)].tolist()).decode() for t, n in zip(texts, lengths, strict=True)]


def broadcast_bool(answer: bool) -> bool:
    """The main process's answer, since rounding can give other processes a different one."""
    return bool(all_gather_text("yes" if answer else "")[0])


@contextmanager
def raise_on_all() -> Iterator[None]:
    """Run the same block in every process. An error in one is raised in all, once all have finished the block.

    Nothing in the block may wait for another process.
    """
    error: Exception | None = None
    try:
        yield
    except (HloraError, OSError) as raised:
        error = raised
    mine = {} if error is None else {"kind": type(error).__name__, "text": str(error)}
    everyone = [json.loads(text) for text in all_gather_text(json.dumps(mine))]
    if error is not None:
        error.__dict__["reported"] = any(everyone[: rank()])  # an earlier process prints it
        raise error
    for number, other in enumerate(everyone):
        if other:
            again = getattr(errors, other["kind"], HloraError)(f"process {number}: {other['text']}")
            again.__dict__["reported"] = True
            raise again


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Hold locks.lock_directory in the main process. A refusal raises ConfigError in every process."""
    with ExitStack() as held:
        with raise_on_all():
            if is_main():
                held.enter_context(locks.lock_directory(directory))
        yield


def on_main(work: Callable[[], Work], in_step: bool = False) -> Work:
    """Do `work` in the main process and return its result in every process. An error is raised in every process.

    Args:
        work: Returns a value that JSON can hold.
        in_step: Every process does the work, as a sharded model needs, and the main process's result counts.
    """
    if world_size() == 1:
        return work()
    result: Any = None
    with raise_on_all():
        if is_main():
            result = work()
        elif in_step:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # one progress display is enough
                work()
    text = all_gather_text(json.dumps(result) if is_main() else "")[0]
    return result if is_main() else json.loads(text)


def main_first(work: Callable[[], Work]) -> Work:
    """Do `work` in every process, in the main one first: it fills a cache that the others read."""
    result: list[Work] = []
    for turn in (True, False):
        with raise_on_all():
            if is_main() is turn:
                result.append(work())
    return result[0]
