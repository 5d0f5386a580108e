"""The domain's rows of a run, some of them set aside to evaluate on while it trains."""

from __future__ import annotations

import random
from dataclasses import replace

from hlora.config.run import RunConfig
from hlora.data.domain import DomainRows, TokenLimits, domain_rows, without_prompts_of
from hlora.system.digest import sha256_of_texts
from hlora.system.errors import DataError


def rows_of_run(config: RunConfig, limits: TokenLimits) -> DomainRows:
    """The rows of a run's domain. Training rows with the prompt of a validation row are left out.

    Raises:
        DataError: As domain_rows, or every training row is left out.
    """
    domain, max_test_rows, seed = config.domain, config.evaluation.max_rows, config.seed
    rows = domain_rows(domain, max_test_rows, seed, limits)
    if domain.validation is None:
        return rows
    if isinstance(domain.validation, str):
        of_file = domain.model_copy(update={"train": domain.validation, "max_train_rows": None})
        held_out = domain_rows(of_file, max_test_rows, seed, limits).train
    else:
        held_out = random.Random(seed).sample(rows.train, max(1, round(domain.validation * len(rows.train))))
    train = without_prompts_of(rows.train, held_out, limits.tokenizer)
    if not train:
        raise DataError(f"domain.validation: {domain.validation} leaves none of {len(rows.train)} rows to train on")
    digests = {"train": train, "validation": held_out}
    facts = {f"{part}_rows": len(found) for part, found in digests.items()}
    hashes = {f"{part}_sha256": sha256_of_texts(each.as_json() for each in found) for part, found in digests.items()}
    return replace(rows, train=train, validation=held_out, facts={**rows.facts, **facts, **hashes})
