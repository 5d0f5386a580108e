"""What a cell of a row holds: text, a list, JSON as text, or nothing."""

from __future__ import annotations

import json
import math
import reprlib
from contextlib import suppress
from typing import Any

from hlora.data.example import Row
from hlora.system.errors import DataError

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel = 60, 60, 3
short = _SHORT.repr
"""The cell in a line, for a message."""


def is_absent(cell: Any) -> bool:
    """Whether there is no cell: null, an empty cell of a CSV, or the NaN that pandas writes in place of one."""
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def from_json(cell: Any) -> Any:
    """What the cell's JSON says, as a CSV and many a column of tools hold it; a cell that is no JSON as it is."""
    if isinstance(cell, str):
        with suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell


def listed(cell: Any, column: str) -> list[Any]:
    """A list, or the JSON of one."""
    found = from_json(cell)
    if not isinstance(found, list):
        raise DataError(f"wrong {column}: {short(cell)}, expected a list")
    return found


def text(row: Row, column: str, kind: Any = str | int | float) -> str:
    """A cell that holds text, or a number where that will do."""
    cell = row[column]
    if not isinstance(cell, kind) or isinstance(cell, bool) or (isinstance(cell, float) and not math.isfinite(cell)):
        raise DataError(f"wrong cell: {column} is {short(cell)}, expected text")
    if not str(cell).strip():
        raise DataError(f"empty cell: {column} is {short(cell)}")
    return str(cell)
