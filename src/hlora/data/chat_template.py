"""A tokenizer's chat template, which is given what it can render of a row: some take what others refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hlora.data.conversations import joined
from hlora.data.example import Message
from hlora.system.errors import DataError, first_line


@dataclass(frozen=True)
class ChatTemplate:
    """The template of a tokenizer, with the options that a row passes to it."""

    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any]

    def rendered(self, messages: Sequence[Message], tools: Any, add_generation_prompt: bool = False) -> str:
        """The messages as text. Raises DataError where there is no template, or it refuses them."""
        if self.tokenizer.chat_template is None:
            raise DataError(
                "no chat template: rows of messages need a tokenizer that has one, and this model's has none; "
                "use prompt and completion columns instead"
            )
        refused: list[str] = []
        in_part: list[str] = []
        for turns in _forms(messages):
            try:
                found = str(
                    self.tokenizer.apply_chat_template(
                        turns, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **self.options
                    )
                )
            except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
                refused.append(first_line(error))
                continue
            if _has_parts(found, turns):
                return found
            in_part.append(found)
        if in_part:
            return in_part[-1]
        raise DataError(f"wrong messages: the model's chat template refuses them ({refused[0]})")

    def __str__(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path or 'this tokenizer'}"


def squeezed(text: str) -> str:
    """The text without white space, which templates add and take away."""
    return "".join(text.split())


def _forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The turns as the row has them, and then with contents in parts joined, for a template that knows no parts."""
    yield from _with_arguments(messages)
    if any(isinstance(turn.get("content"), list) for turn in messages):
        yield from _with_arguments([_with_joined_parts(turn) for turn in messages])


def _with_joined_parts(turn: Message) -> Message:
    return {**turn, "content": joined(turn["content"])} if isinstance(turn.get("content"), list) else turn


def _has_parts(rendered: str, turns: Sequence[Message]) -> bool:
    """Whether each content in parts is there as text, and not left out or written as a list of Python or JSON."""
    for content in (turn["content"] for turn in turns if isinstance(turn.get("content"), list)):
        if str(content) in rendered or json.dumps(content, ensure_ascii=False) in rendered:
            return False
        if any(squeezed(part["text"]) not in squeezed(rendered) for part in content):
            return False
    return True


def _with_arguments(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The turns with the arguments of their tool calls as objects, and then as JSON text, for a template that needs it.

    OpenAI's files have text. The templates of Qwen 2.5, Llama 3.1 and gpt-oss would quote it once more, those of Qwen
    3.5 and GLM-4 refuse it; DeepSeek V3's refuses objects.
    """
    yield [_each_call(turn, _as_object) for turn in messages]
    if any(turn.get("tool_calls") for turn in messages):
        yield [_each_call(turn, _as_text) for turn in messages]


def _each_call(turn: Message, form: Callable[[Any], Any]) -> dict[str, Any]:
    """The turn with the arguments of each call in that form."""
    calls = []
    for call in turn.get("tool_calls") or ():
        function = call.get("function") or call
        if "arguments" in function:
            function = {**function, "arguments": form(function["arguments"])}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**turn, "tool_calls": calls} if calls else dict(turn)


def _as_object(arguments: Any) -> Any:
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            found = json.loads(arguments) if arguments.strip() else {}
            return found if isinstance(found, dict) else arguments
    return arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
