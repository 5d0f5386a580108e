"""The one rendering: a domain row becomes token ids, and it is known which of them are the answer.

Training, the answer likelihood, lm-evaluation-harness, generation, lengths and the leak check all read it, so what is
trained is what is scored. BOS and EOS are put on here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hlora.data.example import Example, Message
from hlora.data.tokens import begins_with, text_start, tokenise
from hlora.system.errors import DataError, first_line

_MARK = "HLORAMARK{}X"  # stands for a part of a row, to see whether and where a chat template writes it
_WRITTEN = ("content", "reasoning_content", "thinking")  # texts of a turn that its reader expects to be trained on


@dataclass(frozen=True)
class Rendered:
    """A row as the model reads it. Tokens 0 to start are the prompt, start to end the answer, the rest ends the turn.

    What ends the turn (EOS, or what the chat template closes a turn with) is trained with the answer and not scored.
    """

    ids: list[int]
    start: int
    end: int
    prompt: str
    """The prompt as text."""
    answer: str
    """The answer as text, as it is rendered."""
    prompt_rest: str = ""
    """The end of the prompt where the answer's first token holds it too."""

    @property
    def prompt_ids(self) -> list[int]:
        return self.ids[: self.start]

    def training_row(self) -> dict[str, list[int]]:
        """As TRL reads it: token ids, and 1 where a token is trained."""
        return {
            "input_ids": self.ids,
            "completion_mask": [0] * self.start + [1] * (len(self.ids) - self.start),
        }


def render(tokenizer: PreTrainedTokenizerBase, example: Example) -> Rendered:
    """The row's token ids and the place of its answer.

    The answer starts at the first token in which prompt and whole row differ. A token that holds the end of the prompt
    and the start of the answer is thus the answer's, as in TRL.

    Raises DataError for messages that the chat template refuses, or renders only in part.
    """
    if isinstance(example.prompt, str):
        return render_text(tokenizer, example.prompt, example.join + example.answer)
    return _render_messages(tokenizer, example)


def render_text(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> Rendered:
    """A text prompt and its continuation, between the tokenizer's BOS, where it adds one, and EOS."""
    ids = tokenise(tokenizer, prompt + continuation)
    alone = tokenise(tokenizer, prompt)
    start = _shared(alone, ids)
    before = text_start(tokenizer)
    before = [] if begins_with(ids, before) else before
    stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    end = len(ids) - 1 if stop and ids[-1:] == stop else len(ids)
    return Rendered(
        [*before, *ids[:end], *stop],
        len(before) + start,
        len(before) + end,
        prompt,
        continuation,
        str(tokenizer.decode(alone[start:])),
    )


def _render_messages(tokenizer: PreTrainedTokenizerBase, example: Example) -> Rendered:
    messages = example.messages()
    opened = _template(tokenizer, messages[:-1], example.tools, add_generation_prompt=True)
    whole = _template(tokenizer, messages, example.tools)
    closing = _checked_closing(tokenizer, messages, example.tools, whole)
    body = whole[: len(whole) - len(closing)]
    if not _squeezed(body).endswith(_squeezed(_call_free(example))):
        raise DataError(
            f"not rendered: {_of(tokenizer)} changes the content of the last turn (role {messages[-1]['role']!r}). "
            "Write it as the template does, or use another template"
        )
    ids = tokenise(tokenizer, whole)
    alone = tokenise(tokenizer, opened)
    start = _shared(alone, ids)
    rest = str(tokenizer.decode(alone[start:]))
    content = _content_start(body, opened, example)
    if not whole.startswith(opened):  # an opener such as <think> that the whole row lacks, or has in another form
        start = min(start, _shared(tokenise(tokenizer, whole[:content]), ids))
        opened, rest = opened[: _shared(opened, whole[:content])], ""
    end = len(ids) - _shared(tokenise(tokenizer, closing)[::-1], ids[::-1])
    if not (closing.strip() or example.turn.get("tool_calls") or tokenizer.eos_token_id is None):
        ids = [*ids, tokenizer.eos_token_id]  # as with GLM-4, where the user's next turn ends the answer
    return Rendered(ids, start, max(end, start + 1), opened, body[content:], rest)


def end_tokens(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Rendered]) -> set[int]:
    """The special tokens that end the rows' answers, such as <|im_end|>. Qwen's base models have another EOS."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return {row.ids[row.end] for row in rows if row.end < len(row.ids)} & special


def end_tokens_of_template(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The same for an answer under the tokenizer's chat template; empty where there is none."""
    try:
        return end_tokens(tokenizer, [render(tokenizer, Example([{"role": "user", "content": "Hi"}], "Hello"))])
    except DataError:
        return set()


def prompt_identity(tokenizer: PreTrainedTokenizerBase | None, example: Example) -> str:
    """The prompt as it is compared for leaks: rendered, without the white space around it and around its turns.

    Key order, keys that the template does not read and nulls make no difference. Without a tokenizer, roles and
    contents are compared.
    """
    if isinstance(example.prompt, str):
        return example.prompt.strip()
    turns = [{**turn, "content": _stripped(turn["content"])} for turn in example.prompt]
    if tokenizer is None:
        return json.dumps([[turn["role"], turn["content"]] for turn in turns])
    return _template(tokenizer, turns, example.tools, add_generation_prompt=True).strip()


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any, add_generation_prompt: bool = False
) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            "no chat template: rows of messages need a tokenizer that has one, and this model's has none; "
            "use prompt and completion columns instead"
        )
    refused: list[str] = []
    for turns in _with_arguments(messages):
        try:
            return str(
                tokenizer.apply_chat_template(
                    turns, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            refused.append(first_line(error))
    raise DataError(f"wrong messages: the model's chat template refuses them ({refused[0]})")


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


def _checked_closing(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any, whole: str) -> str:
    """What the template writes after the last turn's content or calls.

    Raises DataError where the template leaves out a part of a turn, or the tools. Each part is replaced by a mark of
    its own: a template that writes the part writes the mark.
    """
    marks: list[tuple[str, str]] = []

    def mark(what: str) -> str:
        marks.append((_MARK.format(len(marks)), what))
        return marks[-1][0]

    marked = [_marked(turn, number, mark) for number, turn in enumerate(messages, 1)]
    seen = _template(tokenizer, marked, tools)
    for name, what in marks:
        if name not in seen:
            raise DataError(f"not rendered: {_of(tokenizer)} leaves out {what}")
    if tools and whole == _template(tokenizer, messages, None):
        raise DataError(f"not rendered: {_of(tokenizer)} leaves out the row's tools. Take the column out, if so meant")
    for turn in messages:
        for text in _texts(turn.get("content")):
            if _squeezed(text) not in _squeezed(whole):
                raise DataError(f"not rendered: {_of(tokenizer)} leaves out content of a turn (role {turn['role']!r})")
    last = _MARK.format(len(marks))
    plain = _template(tokenizer, [*messages[:-1], {"role": messages[-1]["role"], "content": last}], tools)
    after = plain.rpartition(last)[2]
    return whole[len(whole) - _shared(whole[::-1], after[::-1]) :]


def _marked(turn: Message, number: int, mark: Any) -> dict[str, Any]:
    """The turn with a mark in place of each of its texts, and of the names and arguments of its calls."""
    of = f"of turn {number} (role {turn['role']!r})"
    found = dict(turn)
    for key in _WRITTEN:
        if isinstance(turn.get(key), str) and turn[key].strip():
            found[key] = mark(f"the {key} {of}")
    if turn.get("tool_calls"):
        found["tool_calls"] = [_marked_call(call, of, mark) for call in turn["tool_calls"]]
    return found


def _marked_call(call: Mapping[str, Any], of: str, mark: Any) -> dict[str, Any]:
    function = dict(call.get("function") or call)
    if function.get("name"):
        function["name"] = mark(f"the name of a tool call {of}")
    if function.get("arguments"):
        function["arguments"] = {mark(f"the arguments of a tool call {of}"): 0}
    return {**call, "function": function} if "function" in call else function


def _call_free(example: Example) -> str:
    """The answer's text where it ends the turn; nothing is expected there of a turn that ends in calls."""
    return "" if example.turn.get("tool_calls") else example.answer


def _content_start(body: str, opened: str, example: Example) -> int:
    """The character at which the answer begins: as it is or stripped, as some templates do; else after the prompt."""
    for text in (example.answer, example.answer.rstrip(), example.answer.lstrip(), example.answer.strip()):
        if text and body.endswith(text):
            return len(body) - len(text)
    return _shared(body, opened)


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [str(part.get("text", "")) for part in content or [] if isinstance(part, Mapping)]


def _stripped(content: Any) -> Any:
    return content.strip() if isinstance(content, str) else content


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _of(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {tokenizer.name_or_path or 'this tokenizer'}"


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens, or characters, both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
