"""Paths that mean the same everywhere: with the home directory for a ~, and of a local model from the root on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def at_home(path: str) -> str:
    """The path with the home directory in place of a leading ~. Raises ValueError where no home is known."""
    found = os.path.expanduser(path)  # noqa: PTH111  # a Path would drop a ./ and a last slash, and raise RuntimeError
    if found == path and re.match(r"~([/\\]|$)", path):
        raise ValueError("no home directory is known here, which ~ stands for. Write the whole path")
    return found


def argument_at_home(argument: str) -> str:
    """The same for a word of the command line, --output=~/x among them; as it is where no home is known."""
    option, path = re.fullmatch(r"(--[\w-]+=)?(.*)", argument, re.DOTALL).groups(default="")  # type: ignore[union-attr]
    return option + os.path.expanduser(path) if path.startswith("~") else argument  # noqa: PTH111


def located(name: str) -> str:
    """The name of a model; of a local directory its absolute path."""
    return str(Path(name).absolute()) if os.path.isdir(name) else name  # noqa: PTH112  # Path raises where it is long


PathText = Annotated[str, AfterValidator(at_home)]
"""A path, or a name of the hub: those do not begin with ~."""
