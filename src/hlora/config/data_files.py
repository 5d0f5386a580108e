"""The local files that a configuration names, checked before anything is imported, fetched or loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hlora.config.comparison import CompareConfig
from hlora.config.run import RunConfig
from hlora.config.sections import DomainConfig, GeneralSource
from hlora.system.errors import DataError
from hlora.system.files import ROW_FILES, kind_of_file


def check_files(config: RunConfig | CompareConfig) -> None:
    """Check that every local file exists.

    Raises:
        DataError: One line per missing file, with its field.
    """
    problems = [f"{field}: {path}: {problem}" for field, path in named_files(config) if (problem := _problem(path))]
    if problems:
        raise DataError("\n".join(problems))


def named_files(config: RunConfig | CompareConfig) -> Iterator[tuple[str, str]]:
    """Field and path of every local file. Names of hub data sets, hub models and splits are left out."""
    if _is_local(config.model.name):
        yield "model.name", config.model.name
    sources: list[tuple[str, GeneralSource]] = [("general", config.general)]
    if config.general.mixture:
        sources = [(f"general.mixture.{number}", each) for number, each in enumerate(config.general.mixture)]
    for field, source in sources:
        for path in source.paths if source.source == "files" else ():
            yield f"{field}.paths", path
    texts = {"evaluation.texts": config.evaluation.texts, "penalty.probe_texts": config.penalty.probe_texts}
    tasks: dict[str, DomainConfig] = {}
    if isinstance(config, CompareConfig):
        texts["selection.texts"] = config.selection.texts
        tasks = {f"tasks.{name}": task for name, task in config.tasks.items()}
    else:
        tasks = {f"domains.{number}": each for number, each in enumerate(config.domains)} or {"domain": config.domain}
    for field, named in texts.items():
        for name, path in named.items():
            yield f"{field}.{name}", path
    for field, task in tasks.items():
        for part in ("train", "test", "validation"):
            rows = getattr(task, part, None)  # a share of rows is no file
            if isinstance(rows, str) and (kind_of_file(rows) in ROW_FILES or _is_local(rows)):
                yield f"{field}.{part}", rows


def _is_local(name: str) -> bool:
    """Whether a name is there as a path, or can only be one: hub names start with neither a slash nor a dot."""
    return name.startswith(("/", "./", "../", "~")) or os.path.exists(name)  # noqa: PTH110  # Path raises where it is long


def _problem(path: str) -> str:
    try:
        return "" if Path(path).exists() else f"no such file (from {Path.cwd()})"
    except OSError as error:  # a name too long, a directory without permission
        return f"cannot be read ({error.strerror})"
