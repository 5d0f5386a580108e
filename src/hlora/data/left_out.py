"""What a chat template leaves out of a row: each part is replaced by a mark, and what writes the part writes the mark.

Reasoning of earlier turns is left out on purpose by templates of reasoning models, so only the last turn's is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hlora.data.chat_template import ChatTemplate, squeezed
from hlora.data.example import Message
from hlora.system.errors import DataError

MARK = "HLORAMARK{}X"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # as DeepSeek, gpt-oss and OpenRouter name it
_END_OF_THOUGHT = "</think>"

_Mark = Callable[[str], str]


def refuse_what_is_left_out(template: ChatTemplate, messages: Sequence[Message], tools: Any, whole: str) -> None:
    """Raises DataError where the template leaves out a part of a turn, or of the tools.

    Args:
        template: The template, which has rendered the messages and tools as `whole`.
    """
    if tools and whole == template.rendered(messages, None):
        raise DataError(f"not rendered: {template} leaves out the row's tools. Take the column out, if so meant")
    marks: list[tuple[str, str]] = []

    def mark(what: str) -> str:
        marks.append((MARK.format(len(marks)), what))
        return marks[-1][0]

    last = len(messages) - 1
    marked = [_marked(turn, number, number == last, mark) for number, turn in enumerate(messages)]
    marked_tools = [_marked_tool(tool, mark) for tool in tools] if tools else tools
    seen = template.rendered(marked, marked_tools)
    for name, what in marks:
        if name not in seen:
            raise DataError(f"not rendered: {template} leaves out {what}")
    for number, turn in enumerate(messages):
        for text in _texts(turn.get("content")):
            if turn["role"] == "assistant" and number < last:
                text = text.rpartition(_END_OF_THOUGHT)[2]
            if squeezed(text) not in squeezed(whole):
                raise DataError(f"not rendered: {template} leaves out content of a turn (role {turn['role']!r})")


def _marked(turn: Message, number: int, with_reasoning: bool, mark: _Mark) -> dict[str, Any]:
    """The turn with a mark in place of each of its texts, and of the names and arguments of its calls."""
    of = f"of turn {number + 1} (role {turn['role']!r})"
    found = dict(turn)
    for key in ("content", *_REASONING) if with_reasoning else ("content",):
        if isinstance(turn.get(key), str) and turn[key].strip():
            found[key] = mark(f"the {key} {of}")
    if turn.get("tool_calls"):
        found["tool_calls"] = [_marked_call(call, of, mark) for call in turn["tool_calls"]]
    return found


def _marked_call(call: Mapping[str, Any], of: str, mark: _Mark) -> dict[str, Any]:
    function = dict(call.get("function") or call)
    if function.get("name"):
        function["name"] = mark(f"the name of a tool call {of}")
    if function.get("arguments"):
        function["arguments"] = {mark(f"the arguments of a tool call {of}"): 0}
    return {**call, "function": function} if "function" in call else function


def _marked_tool(tool: Mapping[str, Any], mark: _Mark) -> dict[str, Any]:
    function = tool.get("function")
    named = dict(function) if isinstance(function, Mapping) else dict(tool)
    if isinstance(named.get("name"), str):
        named["name"] = mark(f"the tool {named['name']!r}")
    return {**tool, "function": named} if isinstance(function, Mapping) else named


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [str(part.get("text", "")) for part in content or [] if isinstance(part, Mapping)]
