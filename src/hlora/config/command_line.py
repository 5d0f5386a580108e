"""What several commands share: their arguments, the configuration that these name, and the command as it was typed."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hlora import __version__
from hlora.system.redaction import redact_argument

if TYPE_CHECKING:
    from hlora.config.run import RunConfig

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file. `hlora config` prints one to start from.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: --set penalty.phi=9")
]


def load_named(
    path: Path, overrides: list[str] | None, *, importance: str | None = None, after: str | None = None
) -> RunConfig:
    """The configuration of a run, once all files that it names are found.

    Imports neither PyTorch nor Transformers, so an error is there within a second.

    Args:
        path: The YAML file.
        overrides: Fields to override, as FIELD=VALUE.
        importance: Overrides importance.use.
        after: Overrides after.

    Raises:
        ConfigError: A field is wrong.
        DataError: A file is missing.
    """
    from hlora.config.data_files import check_files
    from hlora.config.reading import load_config

    used = {"importance": importance, "after": after}
    named = [f"{field}={json.dumps(value)}" for field, value in used.items() if value is not None]
    config = load_config(path, [*(overrides or []), *named])
    check_files(config)
    say_loading(path)
    return config


def say_loading(what: object) -> None:
    """Say that a command has begun: the libraries that it imports next take 5 to 20 seconds."""
    logging.getLogger("hlora").info("hlora %s, %s: loading PyTorch and Transformers", __version__, what)


def typed_command() -> str:
    """The command line of this process, with secrets redacted."""
    return shlex.join(["hlora", *map(redact_argument, sys.argv[1:])])
