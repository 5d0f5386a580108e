"""What can go wrong, as one small tree.

HloraError
├── ConfigError    a field of the configuration is wrong or unknown
├── DataError      a file, row or column cannot be used
├── AdapterError   the model holds something that importance cannot protect
├── ArtifactError  a saved importance is damaged or belongs to another model
├── TrainingError  a loss or weight is not finite any more
├── ClusterError   the machines that compute a grid's cells are not there, or die
└── CannotRun      a method of a comparison does not work on this model

Each message says what was expected, what came and what to do next. The CLI prints it without a
traceback and exits with status 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hlora.system.redaction import redact_text


class HloraError(Exception):
    """Base of every error that hlora raises on purpose. Its message holds no secret, whatever it quotes."""

    def __init__(self, message: object = "") -> None:
        super().__init__(redact_text(str(message)))


class ConfigError(HloraError):
    """A configuration field is unknown, missing or out of range."""


class DataError(HloraError):
    """A data file, row or column cannot be used as asked."""


class AdapterError(HloraError):
    """The model's adapter is missing, or has parts that importance cannot protect."""


class ArtifactError(HloraError):
    """A saved importance is damaged, or does not fit the model it is put on."""


class TrainingError(HloraError):
    """Training has diverged: a loss, the penalty or a weight is not finite any more."""


class ClusterError(HloraError):
    """The machines that compute a grid's cells are not there, see other files than the driver, or die."""


class CannotRun(HloraError):
    """A method of a comparison does not work on this model; the comparison says so in the cell and goes on."""


def first_line(error: Exception) -> str:
    """Kind and first line of another library's error, at most 200 characters, to quote in one of ours."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def how_to_install(extra: str) -> str:
    """The command that brings an extra of hlora, as a sentence. hlora is on no package index: a clone has it."""
    return f"In your clone of hlora: pip install '.[{extra}]'"


@contextmanager
def culprit(path: Path, remedy: str) -> Iterator[None]:
    """Raises DataError that names a file for whatever goes wrong, but with the disk, while its content is worked on."""
    try:
        yield
    except (HloraError, OSError):
        raise
    except Exception as error:  # a file that anyone may have changed can make any of Python's errors
        raise DataError(f"{path}: not as hlora writes it ({first_line(error)}). {remedy}") from None
