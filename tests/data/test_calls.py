"""Tools and calls are the same to a template in whatever form a file has them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hlora.data.tasks import read_example
from hlora.system.errors import DataError

FUNCTION = {"name": "weather", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
CALLS = [{"type": "function", "function": CALL}]
USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": TOOL},
        {"tools": json.dumps(TOOL)},
        {"functions": [FUNCTION]},
        {"functions": json.dumps([FUNCTION]), "tools": None},
    ],
)
def test_tools_are_read_from_each_form_that_they_come_in(columns: dict[str, Any]) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "x"}], **columns}
    assert read_example("rows", row).tools == [TOOL]


@pytest.mark.parametrize("none", [None, "", "null", "[]", [], {}, float("nan")])
def test_a_cell_without_tools_is_no_tools(none: Any) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "x"}], "tools": none, "functions": none}
    assert read_example("rows", row).tools is None


@pytest.mark.parametrize("tools", ["hammer", [3], ["hammer"]])
def test_other_tools_are_refused(tools: Any) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "x"}], "tools": tools}
    with pytest.raises(DataError, match="wrong tools: "):
        read_example("rows", row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALLS}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [json.dumps(CALLS[0])]}]},
        {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL}]},
        {"messages": [USER, {"role": "assistant", "content": "", "function_call": CALL, "tool_calls": []}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(CALL)}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(CALLS)}]},
    ],
)
def test_calls_are_read_from_each_form_that_they_come_in(row: dict[str, Any]) -> None:
    example = read_example("rows", row)
    assert (example.prompt, example.answer, dict(example.turn)) == ([USER], "", {"tool_calls": CALLS})


@pytest.mark.parametrize("value", ["weather(Rome)", '{"city": "Rome"}', "[1]", "7"])
def test_a_sharegpt_call_that_is_no_json_of_a_call_stays_text(value: str) -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": value}]}
    example = read_example("rows", row)
    assert (example.answer, dict(example.turn)) == (value, {})


def test_what_a_function_answered_is_a_turn_of_the_tool() -> None:
    call = {"role": "assistant", "content": None, "function_call": CALL}
    answered = {"role": "function", "name": "weather", "content": "7"}
    prompt = read_example("rows", {"messages": [USER, call, answered, {"role": "assistant", "content": "x"}]}).prompt
    assert prompt[1:] == [
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "name": "weather", "content": "7"},
    ]
