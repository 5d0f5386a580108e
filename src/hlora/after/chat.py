"""A conversation with a tuned model, streamed, and with its base model beside it if asked."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from hlora.after.tuned import Tuned
from hlora.data.generation import as_list, nothing_of_its_own
from hlora.data.rendering import end_tokens_of_template
from hlora.data.tokens import text_to_continue, tokenise


@dataclass
class Chat:
    """Answers one line after another with the tuned model; with `compare`, with the base model first."""

    tuned: Tuned
    compare: bool = False
    plain: bool = False
    """Continue the text of the prompt, each by itself, in place of a conversation under the chat template."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token each time."""
    turns: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """The conversation so far, of each model."""

    def __post_init__(self) -> None:
        self.plain = self.plain or not _has_template(self.tokenizer)
        self.forget()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.tuned.tokenizer

    def forget(self) -> None:
        """Begin a new conversation."""
        self.turns = {name: [] for name in (("base", "tuned") if self.compare else ("tuned",))}

    def heading(self) -> str:
        """What answers, and how, in a few words."""
        how = "greedy" if self.temperature == 0 else f"sampling at temperature {self.temperature:g}"
        form = "plain text, each line by itself" if self.plain else "the tokenizer's chat template"
        return (
            f"{self.tuned.config.name}, tuned. {form[0].upper()}{form[1:]}; {how}; at most {self.max_new_tokens} new "
            "tokens. /new begins a new conversation, Ctrl-D or Ctrl-C ends."
        )

    def answer(self, prompt: str) -> dict[str, str]:
        """Stream the answer of each model to stdout; returns them by name (base, tuned)."""
        answers = {}
        for name, turns in self.turns.items():
            asked = [*turns, {"role": "user", "content": prompt}]
            ids = self._encoded(prompt if self.plain else asked)
            if self.compare:
                print(f"[{name}] ", end="", flush=True)
            if (too_long := self._too_long(ids)) is not None:
                print(too_long)
                continue
            answers[name] = self._generated(name, ids)
            if not self.plain:
                self.turns[name] = [*asked, {"role": "assistant", "content": answers[name]}]
        return answers

    def _encoded(self, prompt: str | list[dict[str, str]]) -> Tensor:
        """Token ids, (1, n)."""
        if isinstance(prompt, str):
            ids = text_to_continue(self.tokenizer, prompt)
        else:
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = tokenise(self.tokenizer, str(text))
        return torch.tensor([ids], device=self.tuned.model.device)

    def _too_long(self, ids: Tensor) -> str | None:
        context = getattr(self.tuned.model.config.get_text_config(), "max_position_embeddings", None)
        if context is None or ids.shape[1] < context:
            return None
        return f"(too long: {ids.shape[1]} tokens of a context of {context}; /new begins a new conversation)"

    @torch.inference_mode()
    def _generated(self, name: str, ids: Tensor) -> str:
        model: Any = self.tuned.model
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        room = self.max_new_tokens if context is None else min(self.max_new_tokens, context - ids.shape[1])
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        settings = GenerationConfig(
            max_new_tokens=room,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=_ends(model, self.tokenizer),
            **sampling,
        )
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with model.disable_adapter() if name == "base" else nullcontext(), nothing_of_its_own(model):
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer
            )
        return str(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def chat(tuned: Tuned, compare: bool, plain: bool, max_new_tokens: int, temperature: float) -> None:
    """Read lines from stdin and answer each, until it ends or Ctrl-C."""
    talk = Chat(tuned, compare, plain, max_new_tokens, temperature)
    print(talk.heading(), file=sys.stderr)
    try:
        for line in _lines():
            if line.strip() == "/new":
                talk.forget()
            elif line.strip():
                talk.answer(line)
    except KeyboardInterrupt:
        print()


def _lines() -> Iterator[str]:
    """Lines of stdin; from a terminal with a prompt, and its line editing."""
    if sys.stdin is None:  # closed, as by <&-
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # no tokenizer takes what is no text
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is a chat template for a conversation: the only one, or among several the default."""
    try:
        return bool(tokenizer.get_chat_template())
    except ValueError:
        return False


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Tokens that end an answer: the model's, the tokenizer's and the chat template's."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    ends = {*as_list(of_model), *as_list(tokenizer.eos_token_id), *end_tokens_of_template(tokenizer)}
    return sorted(ends) or None
