"""Rows of an Arrow table, as the file had them that the table was made from."""

from __future__ import annotations

import json
from typing import Any

import pyarrow

_JSON = "arrow.json"  # Arrow's type for texts that are JSON; the Json of `datasets` is one


def rows_of_table(table: pyarrow.Table) -> list[dict[str, Any]]:
    """The rows, without the keys that Arrow fills in with null, and with JSON read where Arrow's type says JSON.

    In Arrow all objects of a column have the same keys: those of any of them. A null that JSON holds is the file's own.

    Raises:
        pyarrow.ArrowException, ValueError or OverflowError: A cell cannot be read.
    """
    rows: list[dict[str, Any]] = table.to_pylist()
    for field in table.schema:
        has_json = _JSON in str(field.type)
        if not (has_json or pyarrow.types.is_nested(field.type)):
            continue
        for row in rows:
            cell = _without_filled_in(row[field.name])
            row[field.name] = _with_json_read(cell, field.type) if has_json else cell
    return rows


def _without_filled_in(cell: Any) -> Any:
    from trl.trainer.utils import remove_none_values

    if isinstance(cell, list):
        return remove_none_values(cell)
    return remove_none_values(cell) if isinstance(cell, dict) else cell


def _with_json_read(cell: Any, kind: Any) -> Any:
    if cell is None:
        return None
    if getattr(kind, "extension_name", None) == _JSON:
        return json.loads(cell) if isinstance(cell, str) else cell
    if isinstance(cell, dict):
        return {key: _with_json_read(part, kind.field(key).type) for key, part in cell.items()}
    if isinstance(cell, list) and hasattr(kind, "value_type"):
        return [_with_json_read(part, kind.value_type) for part in cell]
    return cell
