"""The domain's rows of a run, some of them set aside to evaluate on while it trains."""

from __future__ import annotations

import random
from dataclasses import replace

from hlora.config.domains import RunDomain
from hlora.config.run import RunConfig
from hlora.data.domain import (
    DomainRows,
    TokenLimits,
    apart_from,
    domain_rows,
    training_rows,
    without_prompts_of,
)
from hlora.data.example import Example
from hlora.data.rows import is_rows_file
from hlora.system.digest import sha256_of_texts
from hlora.system.errors import DataError


def rows_of_run(config: RunConfig, limits: TokenLimits) -> DomainRows:
    """The rows of a run's domain. Training rows with the prompt of a validation row are left out.

    Raises:
        DataError: As domain_rows, or every training row is left out.
    """
    domain, seed = config.domain, config.seed
    rows = domain_rows(domain, config.evaluation.max_rows, seed, limits)
    if domain.validation is None:
        return rows
    if isinstance(domain.validation, str):
        held_out = _named_rows(domain, domain.validation, rows, limits)
    else:
        held_out = random.Random(seed).sample(rows.train, max(1, round(domain.validation * len(rows.train))))
    train = without_prompts_of(rows.train, held_out, limits.tokenizer)
    if not train:
        raise DataError(f"domain.validation: {domain.validation} leaves none of {len(rows.train)} rows to train on")
    digests = {"train": train, "validation": held_out}
    facts = {f"{part}_rows": len(found) for part, found in digests.items()}
    hashes = {f"{part}_sha256": sha256_of_texts(each.as_json() for each in found) for part, found in digests.items()}
    return replace(rows, train=train, validation=held_out, facts={**rows.facts, **facts, **hashes})


def _named_rows(domain: RunDomain, name: str, rows: DomainRows, limits: TokenLimits) -> list[Example]:
    """The rows of a file, or of a split of the hub data set in `train`, that have no test prompt."""
    of_hub = not is_rows_file(name) and not is_rows_file(domain.train)
    source = (domain.train, name) if of_hub else (name, domain.train_split)
    try:
        return apart_from(rows.test, training_rows(domain, *source, limits), limits.tokenizer)
    except DataError as error:
        raise DataError(f"domain.validation: {error}") from None
