"""What a command prints besides results: one log, and one message for an error, for all processes of a launch."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from hlora.system.errors import LOST_PEER, HloraError, io_message
from hlora.system.files import is_io_error
from hlora.system.redaction import RedactingFormatter


def set_up_logs() -> None:
    """Log to stderr with secrets redacted, in the main process only."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("hlora").setLevel(logging.INFO)
    if not is_main_process():
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    # Deprecations inside Transformers and TRL are for their authors; a user of this command cannot act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|datasets|accelerate)\.")
    # At each import, whatever the model: 4-bit products on a CPU, and torchao's kernels for other machines and torches.
    # At each training: that the model's settings took a special token from its tokenizer.
    for name in ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree", "transformers.trainer_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    threading.excepthook = _in_a_thread


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn an error of hlora, of the disk or of a lost process into one message on stderr and exit status 2."""
    try:
        yield
    except HloraError as error:
        _print_error(str(error), error)
        sys.exit(2)
    except Exception as error:
        if is_io_error(error):
            _print_error(io_message(error), error)
        elif _is_lost_peer(error):
            _print_error(LOST_PEER, error)
        else:
            raise
        sys.exit(2)


@contextmanager
def resumable(kept: str = "The same command, given again, resumes from there.") -> Iterator[None]:
    """Turn Ctrl-C into a message that says where the command stopped and what is kept; the exit status is 130."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if is_main_process():
            where = f" in {stopped}" if stopped.args else ""
            print(f"hlora: stopped{where}. {kept}", file=sys.stderr)
        sys.exit(130)


def is_main_process() -> bool:
    """Whether this process is the only one, or the first of a launch by torchrun or accelerate."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or int(os.environ.get("RANK", 0)) == 0


def _in_a_thread(failed: threading.ExceptHookArgs) -> None:
    """Print no disk error of a thread: TensorBoard writes in one, and raises the error again in the main thread."""
    if failed.exc_value is None or not is_io_error(failed.exc_value):
        threading.__excepthook__(failed)


def _is_lost_peer(error: Exception) -> bool:
    """Whether another process of this launch has ended. Without torch in memory there is no process group."""
    if "torch" not in sys.modules:
        return False
    from hlora.parallel.group import peer_died

    return isinstance(error, RuntimeError) and peer_died(error)


def _print_error(message: str, error: Exception) -> None:
    """Print an error on stderr, once for all processes of a launch."""
    if getattr(error, "reported", False):
        return
    if not is_main_process():
        time.sleep(3)  # if the main process has the same error, the launcher stops this one in the meantime
    print(f"hlora: {message}", file=sys.stderr)
