"""How far the work is: one line that updates on a terminal; elsewhere plain lines in the log, about one a minute.

    phase 4 of 5, tune: step 17 of 60, loss 3.214 + penalty 0.021, 1:20 left, run 5:40

The last time is that of the whole run. Only the outermost line is shown, except while it waits for other work: a
budget's probes can take longer than the training.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

logger = logging.getLogger("hlora")

Batch = TypeVar("Batch")

WholeRun = Callable[[float | None, int], float | None]
"""Seconds that the whole run will still take, by those of the present work and the number of parts since it began."""

_FIRST, _EVERY = 10.0, 60.0  # seconds to the first plain line, and between two of them

_active: Line | None = None
_phase: tuple[str, WholeRun] | None = None


class Line:
    """Progress of one piece of work.

    Args:
        what: The work and what is counted, such as "step" or "perplexity, token".
        total: How many parts it has.
        done: How many were finished before, as by an interrupted run.
        aside: An outer line waits for this work. The time left of the whole run is then not shown, since the estimate
            counts the parts of the outer line.
    """

    def __init__(self, what: str, total: int, done: int = 0, *, aside: bool = False) -> None:
        self.what, self.total, self.aside = what, total, aside
        self._from, self._started = done, time.monotonic()
        self._added = float(done)
        self._next = self._started + _FIRST
        self._live: Live | None = None
        self._console = Console(file=sys.stderr)

    def update(self, done: int, note: str = "") -> None:
        """Show how many parts are finished, and a note such as the loss."""
        if _active is not self or int(os.environ.get("RANK", 0)) > 0:
            return
        now = time.monotonic()
        if self._console.is_terminal:
            if self._live is None:  # not before something is done, so no line stands at 0
                self._live = Live(console=self._console, transient=True, refresh_per_second=4)
                self._live.start()
            self._live.update(Text(self._text(done, note, now), no_wrap=True, overflow="ellipsis"))
        elif now >= self._next:
            self._next = now + _EVERY
            logger.info("%s", self._text(done, note, now))

    def add(self, parts: float) -> None:
        """Show that many more parts as finished."""
        self._added += parts
        self.update(round(self._added))

    def close(self) -> None:
        """Take the line off the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _text(self, done: int, note: str, now: float) -> str:
        left = None
        if done > self._from:
            left = (now - self._started) / (done - self._from) * (self.total - done)
        whole = None if _phase is None or self.aside else _phase[1](left, self.total - self._from)
        parts = [
            f"{self.what} {done:,} of {self.total:,}",
            note,
            "" if left is None else f"{clock(left)} left",
            "" if whole is None else f"run {clock(whole)}",
        ]
        return (f"{_phase[0]}: " if _phase else "") + ", ".join(part for part in parts if part)


@contextmanager
def line(what: str, total: int, done: int = 0, *, aside: bool = False) -> Iterator[Line]:
    """A progress line for the block, unless another one is shown; `aside`: in place of that one, which waits."""
    global _active
    mine, outer = Line(what, total, done, aside=aside), _active
    if aside and outer is not None:
        outer.close()  # a terminal shows one line; the next update brings the outer one back
    _active = mine if aside else outer or mine
    try:
        yield mine
    finally:
        mine.close()
        _active = outer


def counted(batches: Sequence[Batch], what: str, rows: Callable[[Batch], int]) -> Iterator[Batch]:
    """The batches, with a progress line that counts their rows."""
    with line(what, sum(map(rows, batches))) as shown:
        for batch in batches:
            yield batch
            shown.add(rows(batch))


@contextmanager
def phase(name: str, whole: WholeRun) -> Iterator[None]:
    """A phase of a run, for the lines inside the block.

    Args:
        name: Its number and name, such as "phase 4 of 5, tune".
        whole: Estimates the rest of the run; returns None if it is unknown.
    """
    global _phase
    before = _phase
    _phase = name, whole
    try:
        yield
    except KeyboardInterrupt as stopped:  # for the message: the block's name is lost outside
        stopped.args = stopped.args or (name,)
        raise
    finally:
        _phase = before


def current_phase() -> str:
    """The phase that the run is in; empty outside a run."""
    return "" if _phase is None else _phase[0]


def clock(seconds: float) -> str:
    """Seconds as 1:20, or 3:05:00 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
