"""Conversations: rows of messages, of ShareGPT and of TRL become the messages that chat templates take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hlora.data.calls import calls_in, tools_beside, with_calls
from hlora.data.cells import from_json, is_absent, short, text
from hlora.data.example import Example, Row
from hlora.system.errors import DataError

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_TRAINED = ("weight", "train", "training", "loss")  # as OpenAI, Axolotl and ms-swift mark the turns to learn


def conversation(messages: list[Any], beside: Row) -> Example:
    """A conversation, with the system prompt, the tools and the template's options that stand in columns beside it.

    Raises DataError for messages of another form, and for a last one that is no answer to train.
    """
    if not is_absent(beside.get("documents")) and from_json(beside["documents"]):
        raise DataError(
            "not rendered: documents; hlora passes none to the chat template. Write them into a message, or take the "
            "column out"
        )
    if "system" in beside:
        messages = _after_system(text(beside, "system", str), messages)
    turns = [_turn(turn) for turn in messages]
    if not all(turns):
        raise DataError(
            f"wrong messages: {short(messages)}, expected a list of role and content, both texts; "
            "the content may be a list of texts, or absent beside tool_calls"
        )
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise DataError("wrong messages: they must end with an answer of the assistant to something")
    last = dict(turns[-1])
    for mark in _TRAINED:
        if last.get(mark) in (0, False):
            raise DataError(f"not to be trained: the last message has {mark} {last[mark]}, and it is the one trained")
    answer, _ = last.pop("content"), last.pop("role")
    if isinstance(answer, list):
        answer = joined(answer)
    if not last.get("tool_calls"):
        text({"answer": answer}, "answer")
    return Example(turns[:-1], answer, turn=last, tools=tools_beside(beside), template_options=_options(beside))


def turns_in(cell: Any) -> list[Any] | None:
    """The messages in a cell, which may be JSON; None where it holds text."""
    if isinstance(cell, list):
        return cell
    found = from_json(cell)
    is_chat = isinstance(found, list) and found and all(isinstance(turn, Mapping) and "role" in turn for turn in found)
    return found if is_chat else None


def sharegpt_turn(turn: Any) -> Any:
    """A turn of ShareGPT's `from` and `value` as a message; any other as it is."""
    if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys() or not isinstance(turn["from"], str):
        return turn
    found = {key: value for key, value in turn.items() if key not in ("from", "value")}
    found |= {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
    if turn["from"] == "function_call" and (calls := calls_in(turn["value"])):
        found |= {"content": "", "tool_calls": calls}
    return found


def joined(parts: list[Any]) -> str:
    """The texts of a content in parts, joined by nothing, as templates that take parts join them."""
    return "".join(part["text"] for part in parts)


def _options(beside: Row) -> dict[str, Any]:
    options = from_json(beside.get("chat_template_kwargs"))
    if not isinstance(options, dict | None):
        raise DataError(f"wrong chat_template_kwargs: {short(options)}, expected an object")
    return options or {}


def _after_system(system: str, messages: list[Any]) -> list[Any]:
    first = _turn(messages[0]) if messages else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first["content"] != system:
        raise DataError(f"wrong system: {short(system)}, but the messages begin with {short(first['content'])}")
    return messages


def _turn(turn: Any) -> dict[str, Any]:
    """The message without nulls; empty where it is none."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        return {}
    found = with_calls({key: value for key, value in turn.items() if value == "" or not is_absent(value)})
    content = found.get("content")
    if isinstance(content, list) and all(map(_is_text_part, content)):
        if len(content) == 1:  # as OpenAI and Gemma 3 write a text
            found["content"] = content[0]["text"]
        return found
    return found if isinstance(content, str) else {}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)
