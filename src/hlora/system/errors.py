"""The errors of hlora, as one small tree.

HloraError
├── ConfigError    a field of the configuration is wrong or unknown
├── DataError      a file, row or column cannot be used
├── AdapterError   the model has parts that importance cannot protect
├── ArtifactError  a saved importance or adapter is damaged, or belongs to another model
├── TrainingError  a loss or weight is no longer finite
├── ClusterError   the machines that compute a grid's cells are missing, or die
└── CannotRun      a method of a comparison does not work on this model

Each message has what was expected, what came and what to do next. The CLI prints the message without a
traceback and exits with status 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hlora.system.redaction import redact_text


class HloraError(Exception):
    """Base of every error that hlora raises on purpose. Secrets in its message are redacted."""

    def __init__(self, message: object = "") -> None:
        super().__init__(redact_text(str(message)))


class ConfigError(HloraError):
    """A field of the configuration is unknown, missing, out of range, or refused by a library."""


class DataError(HloraError):
    """A data file, row or column cannot be used as asked."""


class AdapterError(HloraError):
    """The model's adapter is missing, or the model has trained parts that importance cannot protect."""


class ArtifactError(HloraError):
    """A saved importance or adapter is damaged, or does not fit the model."""


class TrainingError(HloraError):
    """Training has diverged: a loss, the penalty or a weight is not finite."""


class ClusterError(HloraError):
    """The machines that compute a grid's cells are missing, see other files than the driver, or die."""


class CannotRun(HloraError):
    """A method of a comparison does not work on this model. The comparison reports it in the cell and continues."""


def first_line(error: BaseException) -> str:
    """Type and first line of another library's error, up to 200 characters, to quote in one of ours.

    A first line that ends in a colon brings the second one.
    """
    first, *further = str(error).strip().splitlines() or [""]
    if first.endswith(":") and further:
        first = f"{first} {further[0].strip()}"
    return f"{type(error).__name__}: {first[:200]}"


def how_to_install(extra: str) -> str:
    """A sentence with the command that installs an extra. hlora is not on a package index, so in a clone."""
    return f"In your clone of hlora: pip install '.[{extra}]'"


def io_message(error: BaseException) -> str:
    """What the command line prints for a disk error: disk full, no permission, a lost mount."""
    place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
    return (
        f"{redact_text(f'{place}{reason}')}. Everything completed so far is intact. Fix the cause, then run the same "
        "command again to resume."
    )


LOST_PEER = (
    "another process of this launch has ended, so this one stops. The reason is in its message, or in the launcher's. "
    "Run the same command again, with any number of processes, to resume from the last checkpoint."
)
"""What the command line prints when another process of the launch dies."""


@contextmanager
def culprit(path: Path, remedy: str) -> Iterator[None]:
    """Turn any error from the content of a file, except disk errors, into a DataError that names the file."""
    try:
        yield
    except (HloraError, OSError):
        raise
    except Exception as error:  # the file may have been edited by hand, which can cause any error
        raise DataError(f"{path}: not as hlora writes it ({first_line(error)}). {remedy}") from None
