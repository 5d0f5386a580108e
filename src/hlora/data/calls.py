"""Tools and their calls, as chat templates take them, from the forms that files have them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hlora.data.cells import from_json, is_absent, listed, short
from hlora.data.example import Message, Row
from hlora.system.errors import DataError


def tools_beside(row: Row) -> list[Any] | None:
    """The tools in the columns `tools` and, in OpenAI's older format, `functions`. None: there are none."""
    functions = [{"type": "function", "function": each} for each in _objects(row.get("functions"), "functions")]
    return [*_objects(row.get("tools"), "tools"), *functions] or None


def with_calls(turn: Message) -> dict[str, Any]:
    """The message with its calls as a list of objects: those of `tool_calls`, or OpenAI's older `function_call`.

    A message of calls may lack a content. Raises DataError for calls of another form.
    """
    found = dict(turn)
    call = from_json(found.pop("function_call", None))
    if call and not found.get("tool_calls"):
        found["tool_calls"] = [{"type": "function", "function": call}]
    if found.get("role") == "function":  # the older name of what answers a call
        found["role"] = "tool"
    if found.get("tool_calls"):
        found["tool_calls"] = calls = [from_json(call) for call in listed(found["tool_calls"], "tool_calls")]
        if not all(isinstance(call, Mapping) and isinstance(call.get("function", call), Mapping) for call in calls):
            raise DataError(f"wrong tool_calls: {short(calls)}, expected objects with a function")
        found.setdefault("content", "")
    return found


def calls_in(value: Any) -> list[dict[str, Any]]:
    """The calls that a ShareGPT turn of `function_call` holds as JSON; none where it is text."""
    found = from_json(value)
    calls = [found] if isinstance(found, Mapping) else found
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        return []
    functions = [call.get("function", call) for call in calls]
    if not all(isinstance(each, Mapping) and isinstance(each.get("name"), str) for each in functions):
        return []
    return [{"type": "function", "function": dict(each)} for each in functions]


def _objects(cell: Any, column: str) -> list[Any]:
    """A list of objects: as it is, as JSON, of JSON texts, or one object by itself."""
    found = from_json(cell)
    if is_absent(found) or found == {}:
        return []
    found = [from_json(each) for each in listed([found] if isinstance(found, Mapping) else cell, column)]
    if not all(isinstance(each, Mapping) for each in found):
        raise DataError(f"wrong {column}: {short(found)}, expected objects with a name and parameters")
    return found
