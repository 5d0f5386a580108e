"""General text and domain rows, from files, the hub or the model itself; training never sees what is evaluated."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hlora.config import DomainConfig, EvaluationConfig, GeneralConfig, GeneralSource
from hlora.errors import DataError, first_line
from hlora.files import write_text
from hlora.rows import Rows, read_documents, read_rows, text_of
from hlora.tasks import TASKS, Example, prompt_text, read_example

logger = logging.getLogger("hlora")

_HELD_OUT = 0.1  # share of the general documents kept for evaluation when no evaluation text is named
_SPECIAL = 8  # tokens that a tokenizer adds to a text, at most
_LONG_LINE = 80  # characters; a line this long that stands in an evaluation text is no coincidence


@dataclass(frozen=True)
class GeneralText:
    """The general task: documents to train on and texts to evaluate on, with no long line in common."""

    train: list[str]
    evaluation: dict[str, str]
    """Text by its name in the report."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Source, sizes, hashes and what was left out, for provenance."""

    def dataset(self) -> Dataset:
        """As TRL reads it: one column, text."""
        return Dataset.from_dict({"text": self.train})


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


def general_text(
    config: GeneralConfig,
    evaluation: EvaluationConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    directory: Path,
    keep: bool = True,
) -> GeneralText:
    """Read or sample the general text, and the texts to evaluate on.

    Lines of 80 characters or more that stand in an evaluation text are taken out of the training documents. Without
    `evaluation.texts` the last tenth of the documents is held out. Samples of the model are read from
    `directory`, and kept there (`keep`).

    Raises DataError when a file cannot be read, more of its rows than `max_unusable` hold no text, or nothing is left
    to train on.
    """
    unusable: dict[str, Any] = {}

    def read(source: GeneralSource) -> list[str]:
        documents, left_out = _documents(source, model, tokenizer, seed, directory, keep)
        unusable.update(left_out)
        return documents

    mixed: list[dict[str, Any]] = []
    if config.mixture:
        parts = [read(each) for each in config.mixture]
        documents, shares = _mixed(parts, [each.weight for each in config.mixture], seed)
        mixed = [{"source": each.source, "characters": n} for each, n in zip(config.mixture, shares, strict=True)]
    else:
        documents = read(config)
    texts = {name: "\n\n".join(measured_text(path, config.column)) for name, path in evaluation.texts.items()}
    if not texts:
        if len(documents) < 2:
            raise DataError(
                f"general: {len(documents)} document, which leaves none to hold out for evaluation. "
                "Name a text in evaluation.texts, or give more general text."
            )
        held_out = max(1, round(len(documents) * _HELD_OUT))
        documents, texts = documents[:-held_out], {"general (held out)": "\n\n".join(documents[-held_out:])}
    train, dropped = _without_lines_of(documents, texts.values())
    if not train:
        raise DataError(
            f"general: nothing left to train on; all {len(documents)} documents stand in an evaluation text too. "
            "Name other files in general.paths or in evaluation.texts."
        )
    if dropped:
        logger.warning("general: left out %d characters that stand in an evaluation text too", dropped)
    facts = {
        "source": "mixture" if mixed else config.source,
        **({"mixture": mixed} if mixed else {}),
        "documents": len(train),
        "characters": sum(map(len, train)),
        "sha256": _sha256(train),
        "characters_left_out_as_evaluation_text": dropped,
        "evaluation_texts": {name: _sha256([text]) for name, text in texts.items()},
        **({"unusable": unusable} if unusable else {}),
    }
    return GeneralText(train, texts, facts)


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
        "train_sha256": _sha256(json.dumps(example.training_row()) for example in kept),
        "test_sha256": _sha256(json.dumps(example.training_row()) for example in test),
        **({"unusable": unusable} if unusable else {}),
    }
    return DomainRows(kept, test, [raw.kept[number] for number in numbers], facts)


def _documents(
    source: GeneralSource,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    directory: Path,
    keep: bool,
) -> tuple[list[str], dict[str, Any]]:
    """The documents of a source, and what was left out of it (see Rows.facts)."""
    if source.source == "files":
        parts = [read_documents(path, source.column) for path in source.paths]
    elif source.source == "hub":
        parts = [_hub_documents(source)]
    else:
        samples = model_samples(source, model, tokenizer, seed, directory, keep)
        parts = [Rows("samples", dict(enumerate(samples, 1)))]
    parts = [part.within(source.max_unusable, "general.max_unusable", "Set general.column. ") for part in parts]
    # Blank documents count as nothing at all: data sets of the hub have one for each blank line of a page.
    documents = [text for part in parts for text in part.kept.values() if text.strip()][: source.max_documents]
    if not documents:
        raise DataError(f"general: no text in what source {source.source!r} names. Give it some, or another source.")
    return documents, {name: found for part in parts for name, found in part.facts().items()}


def _mixed(parts: list[list[str]], weights: list[float], seed: int) -> tuple[list[str], list[int]]:
    """Documents of several sources in one seeded order, and the characters taken of each.

    As much as there is without repeating any: the source with the fewest characters for its weight sets the total.
    """
    total = min(sum(map(len, part)) / weight for part, weight in zip(parts, weights, strict=True))
    documents: list[str] = []
    taken = []
    for part, weight in zip(parts, weights, strict=True):
        left = whole = round(total * weight)
        for document in part:
            if left <= 0:
                break
            documents.append(document[:left])
            left -= len(document)
        taken.append(whole)
    random.Random(seed).shuffle(documents)
    return documents, taken


def hold_out_documents(text: GeneralText) -> tuple[GeneralText, list[str]]:
    """Set the last tenth of the general documents aside, to choose strengths on. Raises DataError when there is one."""
    if len(text.train) < 2:
        raise DataError("general: one document, which leaves none to choose strengths on. Give more general text.")
    held_out = max(1, round(len(text.train) * _HELD_OUT))
    train = text.train[:-held_out]
    facts = {**text.facts, "documents": len(train), "characters": sum(map(len, train)), "sha256": _sha256(train)}
    return replace(text, train=train, facts={**facts, "documents_held_out": held_out}), text.train[-held_out:]


def probe_texts(paths: Mapping[str, str], general: GeneralText) -> dict[str, str]:
    """The texts that a forgetting budget is measured on, without long lines that are also trained or evaluated on.

    Raises DataError for a text of which nothing is left.
    """
    found = {}
    for name, path in paths.items():
        kept, dropped = _without_lines_of(measured_text(path), [*general.train, *general.evaluation.values()])
        if not kept:
            raise DataError(
                f"penalty.probe_texts: nothing is left of {name!r} ({path}); all of it stands in the general or an "
                "evaluation text too. Name a text that is held out from both."
            )
        if dropped:
            logger.warning("probe text %r: left out %d characters that are trained or evaluated on too", name, dropped)
        found[name] = "\n\n".join(kept)
    return found


def measured_text(path: str, column: str = "text") -> list[str]:
    """All documents of a file that something is measured on. Raises DataError when one of them cannot be used."""
    found = read_documents(path, column)
    if found.unusable:
        raise DataError(f"{path}: {found.first(5)}. Of a text that is measured on no row is left out; mend them.")
    return list(found.kept.values())


def without_lines_of(text: GeneralText, others: Iterable[str]) -> GeneralText:
    """Leave out of the general documents what stands in `others`: whole ones, and lines of 80 characters or more.

    Raises DataError when nothing is left.
    """
    others = list(others)
    apart = [document for document in text.train if not any(document.strip() in other for other in others)]
    train, _ = _without_lines_of(apart, others)
    if not train:
        raise DataError("general: nothing left to train on; all of it stands in a text that strengths are chosen on.")
    facts = {**text.facts, "documents": len(train), "characters": sum(map(len, train)), "sha256": _sha256(train)}
    return replace(
        text, train=train, facts={**facts, "characters_held_out": sum(map(len, text.train)) - facts["characters"]}
    )


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
    found = _hub(source, config.subset, split or "train").to_list()
    return Rows(f"{source} ({split})", dict(enumerate(found, 1)))


def _is_file(source: str) -> bool:
    return Path(source).suffix in (".jsonl", ".json", ".parquet", ".csv") or Path(source).is_file()


def _hub(name: str, subset: str | None, split: str, streaming: bool = False) -> Any:
    try:
        return load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds; to the user all mean the same
        raise DataError(
            f"{name}: not a file here, nor a data set of the hub that can be read ({first_line(error)}). "
            "Check the name, its subset and split, and the network, or give a local file."
        ) from None


def _hub_documents(config: GeneralSource) -> Rows[str]:
    assert config.dataset is not None  # validated with the configuration
    rows: Iterable[dict[str, Any]] = _hub(config.dataset, config.subset, config.split, config.max_documents is not None)
    found = Rows(config.dataset, dict(enumerate(islice(rows, config.max_documents), 1)))
    return found.read(lambda row: text_of(row, config.column))


@torch.no_grad()
def model_samples(
    config: GeneralSource,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    directory: Path,
    keep: bool = True,
) -> list[str]:
    """Text that the base model writes by itself from its first token; seeded.

    It is read from `directory` where it is there, else kept there (`keep`).
    """
    shape = f"{config.samples}x{config.sample_tokens}"
    cache = directory / f"samples-{shape}-temperature-{config.temperature:g}-seed-{seed}.json"
    asked = [config.samples, config.sample_tokens, config.temperature, seed, str(model.config._name_or_path)]
    if cache.is_file():
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["asked"] == asked:
            return kept["samples"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    samples: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batches = [min(32, config.samples - done) for done in range(0, config.samples, 32)]
        for size in track(batches, description="sampling general text"):
            written = model.generate(  # type: ignore[operator]  # nn.Module types its attributes as tensors
                torch.full((size, 1), start, device=model.device),
                attention_mask=torch.ones(size, 1, dtype=torch.long, device=model.device),
                do_sample=True,
                temperature=config.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=config.sample_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            samples += tokenizer.batch_decode(written, skip_special_tokens=True)
    if keep:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(cache, json.dumps({"asked": asked, "samples": samples}))
    return samples


def _without_lines_of(documents: list[str], texts: Iterable[str]) -> tuple[list[str], int]:
    """The documents without long lines that stand in `texts`, and the number of characters taken out."""
    lines = {line.strip() for text in texts for line in text.splitlines() if len(line.strip()) >= _LONG_LINE}
    kept, dropped = [], 0
    for document in documents:
        parts = document.splitlines(keepends=True)
        left = [part for part in parts if part.strip() not in lines]
        if len(left) < len(parts):
            dropped += sum(map(len, parts)) - sum(map(len, left))
            document = "".join(left)
        if document.strip():
            kept.append(document)
    return kept, dropped


def _sha256(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
