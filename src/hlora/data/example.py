"""What a domain row becomes, before rendering.py makes token ids of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One domain row. `prompt` is text, or chat messages that the tokenizer's template renders."""

    prompt: str | list[dict[str, Any]]
    answer: str
    """What the model should say: the completion, the right choice, or the content of the last message."""
    choices: tuple[str, ...] = ()
    """The options, for a multiple-choice row; `answer` is one of them."""
    join: str = ""
    """Between a text prompt and its answer."""
    turn: Message = field(default_factory=dict)
    """What else the last message holds, such as tool_calls."""
    tools: list[Any] | None = None
    """Tools that the template presents to the model."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    """What the row passes to its template besides, such as enable_thinking."""

    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation of a row of messages."""
        assert not isinstance(self.prompt, str)
        return [*self.prompt, {"role": "assistant", "content": self.answer, **self.turn}]

    def as_json(self) -> str:
        """All that is trained of the row, for a digest."""
        parts = [self.prompt, self.join, self.answer, dict(self.turn), self.tools]
        return json.dumps([*parts, dict(self.template_options)] if self.template_options else parts, default=str)
