"""The domain's rows: examples to train on and rows to test on, with room for their answers."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hlora.config.sections import DomainConfig
from hlora.data.hub import load_from_hub
from hlora.data.rows import Rows, read_rows
from hlora.data.tasks import TASKS, Example, prompt_text, read_example
from hlora.system.digest import sha256_of_texts
from hlora.system.errors import DataError

logger = logging.getLogger("hlora")


@dataclass(frozen=True)
class DomainRows:
    """The domain task: examples to train on, and rows to evaluate on whose prompts are not among them."""

    train: list[Example]
    test: list[Example]
    test_rows: list[dict[str, Any]]
    """The same test rows as they were read, for lm-evaluation-harness."""
    facts: dict[str, Any] = field(default_factory=dict)

    def dataset(self) -> Dataset:
        """As TRL reads it: prompt and completion."""
        return Dataset.from_list([example.training_row() for example in self.train])


@dataclass(frozen=True)
class Space:
    """How long a row may be, in tokens."""

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    """Of the model; None: it has no limit."""
    cut: int | None
    """Where training cuts the end of a row off; None: it does not."""
    trained: int | None
    """What training makes of the longest row; None: all of it."""

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> Space:
        """arguments: of trl.SFTConfig, those of the domain phase."""
        from trl import SFTConfig

        length, mode, packing = (
            arguments.get(name, getattr(SFTConfig, name)) for name in ("max_length", "truncation_mode", "packing")
        )
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return cls(tokenizer, context, length if mode == "keep_start" and not packing else None, length)

    def train(self, example: Example) -> Example:
        """The example. Raises DataError when no token of its answer would be trained, or it exceeds the context."""
        if self.cut is not None and self._reaches(example, "", self.cut):
            raise DataError(f"no answer left: the prompt fills the {self.cut} tokens of training's max_length")
        if self.trained is None or (self.context is not None and self.trained > self.context):
            self._fits_context(example, example.answer)
        return example

    def test(self, example: Example) -> Example:
        """The example. Raises DataError when the prompt and an answer exceed the model's context."""
        self._fits_context(example, max((example.answer, *example.choices), key=len))
        return example

    def _fits_context(self, example: Example, answer: str) -> None:
        if self.context is not None and self._reaches(example, f" {answer}", self.context + 1):
            raise DataError(f"too long: more than the {self.context} tokens of the model's context")

    def _reaches(self, example: Example, answer: str, tokens: int) -> bool:
        """Whether a text has so many tokens. No more of it is tokenised than that takes: it may be one of 100 MB."""
        text = prompt_text(self.tokenizer, example) + answer
        if len(text.encode("utf-8")) + _SPECIAL < tokens:  # a token has a byte at least
            return False
        special, characters = isinstance(example.prompt, str), 8 * tokens
        while True:
            found = self.tokenizer(text[:characters], add_special_tokens=special, truncation=False, verbose=False)
            if len(found["input_ids"]) >= tokens or characters >= len(text):
                return len(found["input_ids"]) >= tokens
            characters *= 4


def domain_rows(config: DomainConfig, max_test_rows: int | None, seed: int, space: Space | None = None) -> DomainRows:
    """Read the domain's train and test rows. Train rows whose prompt stands in the test set are left out and counted.

    Rows that cannot be used, or have no `space`, are left out and listed. Raises DataError when they are more than
    `max_unusable`, and for an empty set.
    """
    hub_split = None if _is_file(config.test) else config.test
    if hub_split and _is_file(config.train):
        raise DataError(
            f"domain.test: {hub_split!r} is no .jsonl, .parquet or .csv file, and train names no hub data set"
        )
    read, limit = partial(read_example, config.task), (config.max_unusable, "domain.max_unusable")
    needed = f"Task {config.task!r} needs {TASKS[config.task].columns}. "
    train_rows = _domain_source(config, config.train, config.train_split).read(read)
    train_rows = (train_rows.read(space.train) if space else train_rows).within(*limit, needed)
    raw = _domain_source(config, config.train if hub_split else config.test, hub_split)
    test_rows = raw.read(read)
    test_rows = (test_rows.read(space.test) if space else test_rows).within(*limit, needed)
    train, numbers = list(train_rows.kept.values()), list(test_rows.kept)[:max_test_rows]
    test = [test_rows.kept[number] for number in numbers]
    if not test:
        raise DataError(f"{test_rows.source}: no rows to evaluate on")
    seen = {json.dumps(example.prompt) for example in test}
    kept = [example for example in train if json.dumps(example.prompt) not in seen]
    left_out, name = len(train) - len(kept), train_rows.source
    if left_out:
        logger.warning("%s: left out %d of %d rows whose prompt is in the test set", name, left_out, len(train))
    if not kept:
        raise DataError(f"{name}: no rows to train on ({len(train)} read, {left_out} of them in the test set)")
    if config.max_train_rows and config.max_train_rows < len(kept):
        kept = random.Random(seed).sample(kept, config.max_train_rows)
    unusable = {**train_rows.facts(), **test_rows.facts()}
    facts = {
        "task": config.task,
        "train_rows": len(kept),
        "test_rows": len(test),
        "train_rows_left_out_as_test_prompts": left_out,
        "train_sha256": sha256_of_texts(json.dumps(example.training_row()) for example in kept),
        "test_sha256": sha256_of_texts(json.dumps(example.training_row()) for example in test),
        **({"unusable": unusable} if unusable else {}),
    }
    return DomainRows(kept, test, [raw.kept[number] for number in numbers], facts)


def hold_out(rows: DomainRows, count: int, seed: int) -> tuple[DomainRows, list[Example]]:
    """Set `count` training rows aside, to choose strengths on; rows with the same prompt leave the training set too.

    Raises DataError when too few would be left.
    """
    if count >= len(rows.train):
        raise DataError(f"selection.rows: {count} of {len(rows.train)} training rows held out leaves none to train on")
    held_out = random.Random(seed).sample(rows.train, count)
    prompts = {json.dumps(example.prompt) for example in held_out}
    train = [example for example in rows.train if json.dumps(example.prompt) not in prompts]
    if not train:
        raise DataError("selection.rows: all training rows have the prompt of a held-out one. Hold out fewer.")
    return replace(rows, train=train, facts={**rows.facts, "train_rows": len(train), "held_out": count}), held_out


def _domain_source(config: DomainConfig, source: str, split: str | None) -> Rows[dict[str, Any]]:
    if _is_file(source):
        return read_rows(source)
    found = load_from_hub(source, config.subset, split or "train").to_list()
    return Rows(f"{source} ({split})", dict(enumerate(found, 1)))


def _is_file(source: str) -> bool:
    return Path(source).suffix in (".jsonl", ".json", ".parquet", ".csv") or Path(source).is_file()


_SPECIAL = 8  # tokens that a tokenizer adds to a text, at most
