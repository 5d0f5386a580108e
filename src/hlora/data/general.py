"""General text: documents for the general phase, texts to measure forgetting on, and what is held out from both."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hlora.config.sections import EvaluationConfig, GeneralConfig, GeneralSource
from hlora.data.hub import load_from_hub
from hlora.data.leaks import without_long_lines_of
from hlora.data.packing import document_rows, packed_rows
from hlora.data.rows import Rows, read_documents, text_of
from hlora.data.samples import model_samples
from hlora.system.digest import sha256_of_texts
from hlora.system.errors import ConfigError, DataError

logger = logging.getLogger("hlora")

_HELD_OUT = 0.1  # share of the general documents held out for evaluation if no evaluation text is named


@dataclass(frozen=True)
class GeneralText:
    """The general task: documents to train on and texts to evaluate on, with no long line in common."""

    train: list[str]
    evaluation: dict[str, str]
    """Text by its name in the report."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Source, sizes, hashes and what was skipped, for provenance."""

    def dataset(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> Dataset:
        """Rows of token ids, packed here and not by TRL, so that each begins with BOS if the tokenizer adds one.

        Args:
            tokenizer: The model's.
            arguments: Arguments of trl.SFTConfig for the general phase. Without `packing` each document is a row.

        Raises:
            ConfigError: `packing` without a `max_length`.
        """
        if not arguments.get("packing"):
            return Dataset.from_dict({"input_ids": document_rows(tokenizer, self.train)})
        from trl import SFTConfig

        length = arguments.get("max_length", SFTConfig.max_length)
        if length is None:
            raise ConfigError(
                "training.record.max_length: None cannot be used here. Packing needs one; or set packing: false"
            )
        return Dataset.from_dict({"input_ids": packed_rows(tokenizer, self.train, length)})


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

    Lines of 80 characters or more that also appear in an evaluation text are removed from the training documents.
    Without `evaluation.texts` the last tenth of the documents is held out.

    Args:
        config: The `general` section.
        evaluation: The `evaluation` section.
        model: The base model, to sample from.
        tokenizer: The model's.
        seed: Seed of sampling and of the order of a mixture.
        directory: Where samples of the model are read from and kept.
        keep: Whether to keep new samples there.

    Raises:
        DataError: A file cannot be read, too many of its rows hold no text, or nothing is left to train on.
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
        documents, held_out = _split(documents)
        texts = {"general (held out)": "\n\n".join(held_out)}
    train, dropped = without_long_lines_of(documents, texts.values())
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
        **_sizes(train),
        "characters_left_out_as_evaluation_text": dropped,
        "evaluation_texts": {name: sha256_of_texts([text]) for name, text in texts.items()},
        **({"unusable": unusable} if unusable else {}),
    }
    return GeneralText(train, texts, facts)


def _split(documents: list[str]) -> tuple[list[str], list[str]]:
    """All but the last tenth of the documents, and that tenth. A single document is split by its lines.

    Raises:
        DataError: There is only one line.
    """
    lines = documents[0].rstrip().splitlines(keepends=True) if len(documents) == 1 else documents
    held_out = max(1, round(len(lines) * _HELD_OUT))
    if len(lines) < 2:
        raise DataError(
            "general: 1 document of one line, which leaves none to hold out for evaluation. "
            "Name a text in evaluation.texts, or give more general text."
        )
    if len(documents) == 1:
        return ["".join(lines[:-held_out])], ["".join(lines[-held_out:])]
    return documents[:-held_out], documents[-held_out:]


def _documents(
    source: GeneralSource,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    directory: Path,
    keep: bool,
) -> tuple[list[str], dict[str, Any]]:
    """The documents of a source, and what was skipped (see Rows.facts)."""
    if source.source == "files":
        parts = [read_documents(path, source.column) for path in source.paths]
    elif source.source == "hub":
        parts = [_hub_documents(source)]
    else:
        samples = model_samples(source, model, tokenizer, seed, directory, keep)
        parts = [Rows("samples", dict(enumerate(samples, 1)))]
    parts = [part.within(source.max_unusable, "general.max_unusable", "Set general.column. ") for part in parts]
    # Blank documents do not count: some hub data sets have one for each blank line of a page.
    documents = [text for part in parts for text in part.kept.values() if text.strip()][: source.max_documents]
    if not documents:
        raise DataError(f"general: no text in what source {source.source!r} names. Give it some, or another source.")
    return documents, {name: found for part in parts for name, found in part.facts().items()}


def _mixed(parts: list[list[str]], weights: list[float], seed: int) -> tuple[list[str], list[int]]:
    """Documents of several sources in one seeded order, and the number of characters taken from each.

    Nothing is repeated, so the source with the fewest characters for its weight sets the total.
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
    """Hold out the last tenth of the general documents, to choose strengths on. Raises DataError for one document."""
    if len(text.train) < 2:
        raise DataError("general: one document, which leaves none to choose strengths on. Give more general text.")
    held_out = max(1, round(len(text.train) * _HELD_OUT))
    train = text.train[:-held_out]
    facts = {**text.facts, **_sizes(train), "documents_held_out": held_out}
    return replace(text, train=train, facts=facts), text.train[-held_out:]


def probe_texts(paths: Mapping[str, str], general: GeneralText, column: str = "text") -> dict[str, str]:
    """The texts that a forgetting budget is measured on, without long lines that are also trained or evaluated on.

    Args:
        paths: Name → file.
        general: The general text.
        column: Column that holds the text in files of rows.

    Raises:
        DataError: Nothing is left of a text.
    """
    found = {}
    for name, path in paths.items():
        kept, dropped = without_long_lines_of(
            measured_text(path, column), [*general.train, *general.evaluation.values()]
        )
        if not kept:
            raise DataError(
                f"penalty.probe_texts: nothing is left of {name!r} ({path}); all of it is in the general or an "
                "evaluation text too. Name a text that is held out from both."
            )
        if dropped:
            logger.warning("probe text %r: left out %d characters that are trained or evaluated on too", name, dropped)
        found[name] = "\n\n".join(kept)
    return found


def measured_text(path: str, column: str = "text") -> list[str]:
    """All documents of a file to measure on, from which no row is skipped. Raises DataError if one cannot be used."""
    found = read_documents(path, column)
    if found.unusable:
        raise DataError(f"{path}: {found.first(5)}. A text to measure on must not lose rows, so fix them.")
    return list(found.kept.values())


def without_lines_of(text: GeneralText, others: Iterable[str]) -> GeneralText:
    """Remove from the general documents what also appears in `others`: documents, and lines of 80 characters or more.

    Raises:
        DataError: Nothing is left.
    """
    others = list(others)
    apart = [document for document in text.train if not any(document.strip() in other for other in others)]
    train, _ = without_long_lines_of(apart, others)
    if not train:
        raise DataError("general: nothing left to train on; all of it stands in a text that strengths are chosen on.")
    sizes = _sizes(train)
    held_out = sum(map(len, text.train)) - sizes["characters"]
    return replace(text, train=train, facts={**text.facts, **sizes, "characters_held_out": held_out})


def _sizes(documents: list[str]) -> dict[str, Any]:
    """The facts of the documents themselves."""
    characters = sum(map(len, documents))
    return {"documents": len(documents), "characters": characters, "sha256": sha256_of_texts(documents)}


def _hub_documents(config: GeneralSource) -> Rows[str]:
    assert config.dataset is not None  # validated with the configuration
    rows: Iterable[dict[str, Any]] = load_from_hub(
        config.dataset, config.subset, config.split, config.max_documents is not None
    )
    found = Rows(config.dataset, dict(enumerate(islice(rows, config.max_documents), 1)))
    return found.read(lambda row: text_of(row, config.column))
