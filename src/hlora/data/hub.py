"""Data sets of the hub."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from datasets import load_dataset

from hlora.system.errors import DataError, first_line


def load_from_hub(name: str, subset: str | None, split: str, streaming: bool = False) -> Any:
    """A split of a data set. Raises DataError where the hub has none, or cannot be reached."""
    if glob.has_magic(name) and Path(name).is_dir():
        raise DataError(f"{name}: datasets reads *, ? and [ in a path as a pattern. Rename the directory.")
    try:
        return load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds; to the user all mean the same
        raise DataError(
            f"{name}: not a file here, nor a data set of the hub that can be read ({first_line(error)}). "
            "Check the name, its subset and split, and the network, or give a local file."
        ) from None
