"""The one rendering: a domain row becomes token ids, and it is known which of them are the answer.

Training, the answer likelihood, lm-evaluation-harness, generation, lengths and the leak check all read it, so what is
trained is what is scored. BOS and EOS are put on here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hlora.data.cells import short
from hlora.data.chat_template import ChatTemplate, squeezed
from hlora.data.example import Example, Message
from hlora.data.left_out import MARK, refuse_what_is_left_out
from hlora.data.tokens import begins_with, is_written, text_start, tokenise
from hlora.system.errors import DataError


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

    Raises DataError for messages that the chat template refuses, or renders only in part, and for a prompt or an answer
    of which the tokenizer has no token.
    """
    if isinstance(example.prompt, str):
        found = render_text(tokenizer, example.prompt, example.join + example.answer)
    else:
        found = _render_messages(tokenizer, example)
    if found.start == 0:
        raise DataError("no prompt: the tokenizer has no token for it, and nothing predicts the answer's first token")
    if example.answer.strip() and not is_written(tokenizer, example.answer):
        raise DataError(f"no answer: the tokenizer has no tokens for {short(example.answer)}")
    return found


def render_text(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> Rendered:
    """A text prompt and its continuation, between the tokenizer's BOS, where it adds one, and EOS."""
    before = text_start(tokenizer)
    ids, alone, start = _tokens(tokenizer, prompt, prompt + continuation, before)
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


def _tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, whole: str, before: list[int]
) -> tuple[list[int], list[int], int]:
    """Token ids of the whole row and of the prompt alone, and how many they begin with together.

    Where one token would hold all of the prompt and the answer's start, and no BOS comes before, they are tokenised
    apart, as the model reads a prompt: nothing would predict that token.
    """
    ids, alone = tokenise(tokenizer, whole), tokenise(tokenizer, prompt)
    start = _shared(alone, ids)
    if start == 0 and not before and whole.startswith(prompt):
        return [*alone, *tokenise(tokenizer, whole[len(prompt) :])], alone, len(alone)
    return ids, alone, start


def _render_messages(tokenizer: PreTrainedTokenizerBase, example: Example) -> Rendered:
    messages = example.messages()
    template = ChatTemplate(tokenizer, example.template_options)
    opened = template.rendered(messages[:-1], example.tools, add_generation_prompt=True)
    whole = template.rendered(messages, example.tools)
    refuse_what_is_left_out(template, messages, example.tools, whole)
    closing = _closing(template, messages, example.tools, whole)
    body = whole[: len(whole) - len(closing)]
    if not squeezed(body).endswith(squeezed(_call_free(example))):
        raise DataError(
            f"not rendered: {template} changes the content of the last turn (role {messages[-1]['role']!r}). "
            "Write it as the template does, or use another template"
        )
    ids, alone, start = _tokens(tokenizer, opened, whole, [])
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
    template = ChatTemplate(tokenizer, example.template_options)
    return template.rendered(turns, example.tools, add_generation_prompt=True).strip()


def _closing(template: ChatTemplate, messages: Sequence[Message], tools: Any, whole: str) -> str:
    """What the template writes after the last turn's content or calls."""
    last = MARK.format("END")
    plain = template.rendered([*messages[:-1], {"role": messages[-1]["role"], "content": last}], tools)
    after = plain.rpartition(last)[2]
    return whole[len(whole) - _shared(whole[::-1], after[::-1]) :]


def _call_free(example: Example) -> str:
    """The answer's text where it ends the turn; nothing is expected there of a turn that ends in calls."""
    return "" if example.turn.get("tool_calls") else example.answer


def _content_start(body: str, opened: str, example: Example) -> int:
    """The character at which the answer begins: as it is or stripped, as some templates do; else after the prompt."""
    for text in (example.answer, example.answer.rstrip(), example.answer.lstrip(), example.answer.strip()):
        if text and body.endswith(text):
            return len(body) - len(text)
    return _shared(body, opened)


def _stripped(content: Any) -> Any:
    return content.strip() if isinstance(content, str) else content


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens, or characters, both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
