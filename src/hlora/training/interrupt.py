"""Ctrl-C while a phase trains: its step is finished and a checkpoint written before the command ends."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerControl

logger = logging.getLogger("hlora")

_MARK = "hlora_interrupted"


@contextmanager
def first_interrupt(note: Callable[[], None]) -> Iterator[None]:
    """Call `note` at the first Ctrl-C (SIGINT) instead of raising; a second one raises KeyboardInterrupt.

    Does nothing outside the main thread, and where SIGINT has another handler or is ignored.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return

    def handler(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        note()
        logger.info("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stop_interrupted(control: TrainerControl) -> None:
    """End the training after this step, as one that will resume."""
    control.should_training_stop = True
    setattr(control, _MARK, True)


def is_interrupted(control: TrainerControl) -> bool:
    """Whether `stop_interrupted` ended the training, so that work at its end is better left to the resumed one."""
    return bool(getattr(control, _MARK, False))
