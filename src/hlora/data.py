"""General text and domain rows, from files, the hub or the model itself; training never sees what is evaluated."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hlora.config import DomainConfig, EvaluationConfig, GeneralConfig, GeneralSource
from hlora.errors import DataError, first_line
from hlora.files import write_text
from hlora.tasks import Example, read_example

logger = logging.getLogger("hlora")

_DOCUMENT = 10_000  # characters of one training document cut from a .txt file, at paragraph ends
_HELD_OUT = 0.1  # share of the general documents kept for evaluation when no evaluation text is named
_JSON_CELLS = ("label", "cop", "choices", "messages")  # columns of a CSV
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
) -> GeneralText:
    """Read or sample the general text, and the texts to evaluate on.

    Lines of 80 characters or more that stand in an evaluation text are taken out of the training documents. Without
    `evaluation.texts` the last tenth of the documents is held out. Samples of the model are kept in `directory`.

    Raises DataError when a file cannot be read, or nothing is left to train on.
    """

    def read(source: GeneralSource) -> list[str]:
        return _documents(source, model, tokenizer, seed, directory)

    mixed: list[dict[str, Any]] = []
    if config.mixture:
        parts = [read(each) for each in config.mixture]
        documents, shares = _mixed(parts, [each.weight for each in config.mixture], seed)
        mixed = [{"source": each.source, "characters": n} for each, n in zip(config.mixture, shares, strict=True)]
    else:
        documents = read(config)
    texts = {name: "\n\n".join(read_documents(path, config.column)) for name, path in evaluation.texts.items()}
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
    }
    return GeneralText(train, texts, facts)


def domain_rows(config: DomainConfig, max_test_rows: int | None, seed: int) -> DomainRows:
    """Read the domain's train and test rows. Train rows whose prompt stands in the test set are left out and counted.

    Raises DataError that names file and row for a row which cannot be used, and for an empty set.
    """
    train_rows, train_name = _domain_source(config, config.train, config.train_split)
    hub_split = None if _is_file(config.test) else config.test
    if hub_split and _is_file(config.train):
        raise DataError(
            f"domain.test: {hub_split!r} is no .jsonl, .parquet or .csv file, and train names no hub data set"
        )
    test_rows, test_name = _domain_source(config, config.train if hub_split else config.test, hub_split)
    test_rows = test_rows[:max_test_rows]
    train = [read_example(config.task, row, f"{train_name} row {n}") for n, row in enumerate(train_rows, 1)]
    test = [read_example(config.task, row, f"{test_name} row {n}") for n, row in enumerate(test_rows, 1)]
    if not test:
        raise DataError(f"{test_name}: no rows to evaluate on")
    seen = {json.dumps(example.prompt) for example in test}
    kept = [example for example in train if json.dumps(example.prompt) not in seen]
    left_out = len(train) - len(kept)
    if left_out:
        logger.warning("%s: left out %d of %d rows whose prompt is in the test set", train_name, left_out, len(train))
    if not kept:
        raise DataError(f"{train_name}: no rows to train on ({len(train)} read, {left_out} of them in the test set)")
    if config.max_train_rows and config.max_train_rows < len(kept):
        kept = random.Random(seed).sample(kept, config.max_train_rows)
    facts = {
        "task": config.task,
        "train_rows": len(kept),
        "test_rows": len(test),
        "train_rows_left_out_as_test_prompts": left_out,
        "train_sha256": _sha256(json.dumps(example.training_row()) for example in kept),
        "test_sha256": _sha256(json.dumps(example.training_row()) for example in test),
    }
    return DomainRows(kept, test, test_rows, facts)


def _documents(
    source: GeneralSource, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, directory: Path
) -> list[str]:
    if source.source == "files":
        documents = [document for path in source.paths for document in read_documents(path, source.column)]
    elif source.source == "hub":
        documents = _hub_documents(source)
    else:
        documents = model_samples(source, model, tokenizer, seed, directory)
    documents = [document for document in documents if document.strip()][: source.max_documents]
    if not documents:
        raise DataError(f"general: no text in what source {source.source!r} names. Give it some, or another source.")
    return documents


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
        kept, dropped = _without_lines_of(read_documents(path), [*general.train, *general.evaluation.values()])
        if not kept:
            raise DataError(
                f"penalty.probe_texts: nothing is left of {name!r} ({path}); all of it stands in the general or an "
                "evaluation text too. Name a text that is held out from both."
            )
        if dropped:
            logger.warning("probe text %r: left out %d characters that are trained or evaluated on too", name, dropped)
        found[name] = "\n\n".join(kept)
    return found


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


def read_documents(path: str, column: str = "text") -> list[str]:
    """Documents of a .txt file, cut at paragraph ends to about 10,000 characters, or of a .jsonl or .parquet column."""
    if Path(path).suffix == ".txt":
        return _paragraph_groups(_read_text(path))
    documents = []
    for number, row in enumerate(read_rows(path), 1):
        if not isinstance(row.get(column), str):
            raise DataError(
                f"{path} row {number}: no text in column {column!r}; it has {', '.join(row)}. Set general.column."
            )
        documents.append(row[column])
    return documents


def read_rows(path: str) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .parquet or .csv file. Raises DataError that names file and line."""
    suffix = Path(path).suffix
    if suffix == ".parquet":
        try:
            return pyarrow.parquet.read_table(_existing(path)).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from None
    if suffix == ".csv":
        table = csv.DictReader(io.StringIO(_read_text(path)), restkey="(no name)", strict=True)
        try:
            return [_csv_row(path, number, row) for number, row in enumerate(table, 1)]
        except csv.Error as error:
            raise DataError(f"{path} line {table.reader.line_num}: not CSV ({error})") from None
    if suffix not in (".jsonl", ".json"):
        raise DataError(f"{path}: expected a .jsonl, .parquet or .csv file of rows, got {suffix or 'no suffix'}")
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # splitlines would cut at U+2028 inside a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 10,000 deep
            reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            raise DataError(f"{path} line {number}: not JSON ({reason}). Expected one object a line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def _csv_row(path: str, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """CSV knows text only: a label becomes a number, and choices and messages are JSON lists."""
    try:
        return {key: json.loads(cell) if key in _JSON_CELLS else cell for key, cell in row.items()}
    except (ValueError, TypeError, RecursionError):
        raise DataError(
            f'{path} row {number}: {", ".join(_JSON_CELLS)} are read as JSON; expected 2 or ["a", "b"]'
        ) from None


def _domain_source(config: DomainConfig, source: str, split: str | None) -> tuple[list[dict[str, Any]], str]:
    if _is_file(source):
        return read_rows(source), source
    return _hub(source, config.subset, split or "train").to_list(), f"{source} ({split})"


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


def _hub_documents(config: GeneralSource) -> list[str]:
    assert config.dataset is not None  # validated with the configuration
    rows: Iterable[dict[str, Any]] = _hub(config.dataset, config.subset, config.split, config.max_documents is not None)
    documents = []
    for row in rows:
        if not isinstance(row.get(config.column), str):
            raise DataError(f"{config.dataset}: no text in column {config.column!r}; it has {', '.join(row)}")
        documents.append(row[config.column])
        if len(documents) == config.max_documents:
            break
    return documents


@torch.no_grad()
def model_samples(
    config: GeneralSource,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    directory: Path,
) -> list[str]:
    """Text that the base model writes by itself from its first token; seeded, and kept in `directory`."""
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
    directory.mkdir(parents=True, exist_ok=True)
    write_text(cache, json.dumps({"asked": asked, "samples": samples}))
    return samples


def _paragraph_groups(text: str) -> list[str]:
    groups, group = [], ""
    for paragraph in re.split(r"(?<=\n)[ \t]*\n", text):  # a blank line, be it empty or of spaces
        group += paragraph + "\n"
        if len(group) >= _DOCUMENT:
            groups.append(group)
            group = ""
    return groups + ([group] if group.strip() else [])


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


def _read_text(path: str) -> str:
    try:
        return _existing(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file (from {Path.cwd()})")
    return Path(path)


def _sha256(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
