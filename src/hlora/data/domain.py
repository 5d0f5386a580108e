"""The domain's rows: examples to train on and rows to test on, with room for their answers."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hlora.config.sections import DomainConfig
from hlora.data.arrow import rows_of_table
from hlora.data.example import Example
from hlora.data.hub import load_from_hub
from hlora.data.rendering import prompt_identity, render
from hlora.data.rows import Rows, is_rows_file, read_rows
from hlora.data.tasks import TASKS, read_example
from hlora.data.tokens import tokenise, writes_all_texts
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
    validation: list[Example] = field(default_factory=list)
    """Rows to evaluate on while training, which are not trained on."""

    def dataset(self, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """The training rows as TRL reads them: token ids, and a mask of what is trained."""
        return _dataset(self.train, tokenizer)

    def validation_dataset(self, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        """The validation rows in the same form; None where there are none."""
        return _dataset(self.validation, tokenizer) if self.validation else None


def _dataset(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    return Dataset.from_list([render(tokenizer, example).training_row() for example in examples])


@dataclass(frozen=True)
class TokenLimits:
    """How long a row may be, in tokens."""

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    """Of the model; None: it has no limit."""
    kept: int | None
    """What training keeps of a row; None: all of it."""
    keeps_end: bool = False
    """Training cuts the start of a longer row off, not its end."""
    packed: bool = False
    """Training joins rows and cuts them anywhere, so that none is too long."""

    @cached_property
    def _writes_all_texts(self) -> bool:
        return writes_all_texts(self.tokenizer)

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
    ) -> TokenLimits:
        """arguments: of trl.SFTConfig, those of the domain phase."""
        from trl import SFTConfig

        length, mode = (arguments.get(name, getattr(SFTConfig, name)) for name in ("max_length", "truncation_mode"))
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # Packing by bfd keeps the start of a longer row, whatever the truncation_mode; the others keep all of it.
        packing = packing_of(arguments)
        return cls(tokenizer, context, length, mode == "keep_end" and packing is None, packing not in (None, "bfd"))

    def train(self, example: Example) -> Example:
        """The example. Raises DataError when training would cut its answer, or it exceeds the context."""
        limit = None if self.packed else min(filter(None, (self.context, self.kept)), default=None)
        if self._needs_no_rendering(example) and (limit is None or _surely_fits(example, limit)):
            return example
        if limit is not None and not self.keeps_end and self._far_beyond(_characters(example), limit):
            prompt_alone = self._far_beyond(_characters(replace(example, answer="")), limit)
            raise DataError(self._why_not(limit, prompt_alone, "more"))
        rendered = render(self.tokenizer, example)
        if limit is not None:
            needed = len(rendered.ids) - (rendered.start if self.keeps_end else 0)
            if needed > limit:
                prompt_alone = not self.keeps_end and rendered.start >= limit
                raise DataError(self._why_not(limit, prompt_alone, str(needed)))
        return example

    def test(self, example: Example) -> Example:
        """The example. Raises DataError when the prompt and an answer exceed the model's context."""
        longest = replace(example, answer=max((example.answer, *example.choices), key=len))
        limit = self.context
        if self._needs_no_rendering(example) and (limit is None or _surely_fits(longest, limit)):
            return example
        if limit is not None and self._far_beyond(_characters(longest), limit):
            raise DataError(self._too_long())
        if render(self.tokenizer, longest).end > (limit or math.inf):
            raise DataError(self._too_long())
        return example

    def _needs_no_rendering(self, example: Example) -> bool:
        """Whether nothing of the row can be refused but its length."""
        return isinstance(example.prompt, str) and self._writes_all_texts

    def _why_not(self, limit: int, prompt_alone: bool, needed: str) -> str:
        if limit != self.kept:
            return self._too_long()
        if prompt_alone:
            return f"no answer left: the prompt fills the {limit} tokens of training's max_length"
        return f"answer cut: it needs {needed} tokens, and training's max_length keeps {limit}"

    def _too_long(self) -> str:
        return f"too long: more than the {self.context} tokens of the model's context"

    def _far_beyond(self, text: str, tokens: int) -> bool:
        """Whether a part of the text has more tokens already. Of one of 100 MB no more is read than that takes."""
        characters = 8 * tokens
        while characters < len(text):
            if len(tokenise(self.tokenizer, text[:characters])) > tokens:
                return True
            characters *= 4
        return False


def packing_of(arguments: Mapping[str, Any]) -> str | None:
    """How the domain phase joins rows: TRL's packing_strategy, or None. hlora's own default is wrapped.

    arguments: of trl.SFTConfig, those of the domain phase.
    """
    return str(arguments.get("packing_strategy", "wrapped")) if arguments.get("packing") else None


def _surely_fits(example: Example, tokens: int) -> bool:
    """Whether a row of text has no more bytes than that: a token has one at least."""
    return len(_characters(example).encode("utf-8")) + len(example.join) + _SPECIAL <= tokens


def _characters(example: Example) -> str:
    """The row's own text, without what a template writes around it."""
    if isinstance(example.prompt, str):
        return example.prompt + example.answer
    return "".join([*(turn["content"] for turn in example.prompt if isinstance(turn["content"], str)), example.answer])


def domain_rows(
    config: DomainConfig, max_test_rows: int | None, seed: int, token_limits: TokenLimits | None = None
) -> DomainRows:
    """Read the domain's train and test rows. Train rows whose prompt is also in the test set are skipped and counted.

    Args:
        config: The section `domain`.
        max_test_rows: Keep the first so many usable test rows; None for all.
        seed: Draws the rows when there are more than `max_train_rows`.
        token_limits: Rows longer than these are skipped and listed, as are rows that cannot be used.

    Raises:
        DataError: More rows than `max_unusable` are skipped, or none is left.
    """
    hub_split = None if is_rows_file(config.test) else config.test
    if hub_split and is_rows_file(config.train):
        raise DataError(
            f"domain.test: {hub_split!r} is no .jsonl, .json, .parquet or .csv file, and train names no hub data set"
        )
    train_rows = training_rows(config, config.train, config.train_split, token_limits)
    try:
        raw = _domain_source(config, config.train if hub_split else config.test, hub_split)
    except DataError as error:
        if hub_split and Path(hub_split).is_dir():
            raise DataError(
                f"domain.test: {hub_split!r} is a directory. Name a file in it, or a split of {config.train}"
            ) from error
        raise
    test_rows = _usable(config, raw, token_limits.test if token_limits else None)
    numbers = list(test_rows.kept)[:max_test_rows]
    test = [test_rows.kept[number] for number in numbers]
    if not test:
        raise DataError(f"{test_rows.source}: no rows to evaluate on")
    kept = apart_from(test, train_rows, token_limits.tokenizer if token_limits else None)
    left_out = len(train_rows.kept) - len(kept)
    if config.max_train_rows and config.max_train_rows < len(kept):
        kept = random.Random(seed).sample(kept, config.max_train_rows)
    unusable = {**train_rows.facts(), **test_rows.facts()}
    facts = {
        "task": config.task,
        "train_rows": len(kept),
        "test_rows": len(test),
        "train_rows_left_out_as_test_prompts": left_out,
        "train_sha256": sha256_of_texts(example.as_json() for example in kept),
        "test_sha256": sha256_of_texts(example.as_json() for example in test),
        **({"unusable": unusable} if unusable else {}),
    }
    return DomainRows(kept, test, [raw.kept[number] for number in numbers], facts)


def training_rows(
    config: DomainConfig, source: str, split: str, token_limits: TokenLimits | None = None
) -> Rows[Example]:
    """The usable rows of a file, or of a split of a hub data set. Arguments and errors as `domain_rows` has them."""
    rows = _domain_source(config, source, split)
    return _usable(config, rows, token_limits.train if token_limits else None)


def apart_from(test: list[Example], rows: Rows[Example], tokenizer: PreTrainedTokenizerBase | None) -> list[Example]:
    """The rows whose prompt is not in the test set. Raises DataError if none is left."""
    found = list(rows.kept.values())
    kept = without_prompts_of(found, test, tokenizer)
    left_out = len(found) - len(kept)
    if left_out:
        logger.warning("%s: left out %d of %d rows whose prompt is in the test set", rows.source, left_out, len(found))
    if not kept:
        raise DataError(f"{rows.source}: no rows left ({len(found)} read, {left_out} of them in the test set)")
    return kept


def _usable(
    config: DomainConfig, rows: Rows[dict[str, Any]], fits: Callable[[Example], Example] | None
) -> Rows[Example]:
    found = rows.read(partial(read_example, config.task, join=config.join))
    needed = f"Task {config.task!r} needs {TASKS[config.task].columns}; domain.columns maps other names to these. "
    return (found.read(fits) if fits else found).within(config.max_unusable, "domain.max_unusable", needed)


def hold_out(
    rows: DomainRows, count: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[DomainRows, list[Example]]:
    """Set `count` training rows aside, to choose strengths on; rows with the same prompt leave the training set too.

    Raises DataError when too few would be left.
    """
    if count >= len(rows.train):
        raise DataError(f"selection.rows: {count} of {len(rows.train)} training rows held out leaves none to train on")
    held_out = random.Random(seed).sample(rows.train, count)
    train = without_prompts_of(rows.train, held_out, tokenizer)
    if not train:
        raise DataError("selection.rows: all training rows have the prompt of a held-out one. Hold out fewer.")
    return replace(rows, train=train, facts={**rows.facts, "train_rows": len(train), "held_out": count}), held_out


def without_prompts_of(
    train: list[Example], others: list[Example], tokenizer: PreTrainedTokenizerBase | None
) -> list[Example]:
    seen = {prompt_identity(tokenizer, example) for example in others}
    return [example for example in train if prompt_identity(tokenizer, example) not in seen]


def _domain_source(config: DomainConfig, source: str, split: str | None) -> Rows[dict[str, Any]]:
    if is_rows_file(source):
        found = read_rows(source)
    else:
        rows = rows_of_table(load_from_hub(source, config.subset, split or "train").with_format("arrow")[:])
        found = Rows(f"{source} ({split})", dict(enumerate(rows, 1)))
    if not config.columns:
        return found
    columns = {column for row in found.kept.values() for column in row}
    return found.read(partial(_with_columns, config.columns, columns))


def _with_columns(columns: Mapping[str, str], of_source: set[str], row: dict[str, Any]) -> dict[str, Any]:
    """The row with the columns that the task reads, from those of the source; null where this row alone lacks one."""
    missing = [theirs for theirs in columns.values() if theirs not in of_source]
    if missing:
        raise DataError(f"missing column: {missing[0]!r} (domain.columns), it has {', '.join(map(str, row))}")
    taken = set(columns.values())
    mapped = {ours: row.get(theirs) for ours, theirs in columns.items()}
    return {name: cell for name, cell in row.items() if name not in taken} | mapped


_SPECIAL = 8  # tokens that a tokenizer adds to a text, at most
