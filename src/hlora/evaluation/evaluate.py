"""What is measured before and after: general ability as perplexity, the domain as answer likelihood and accuracy."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hlora.config.sections import EvaluationConfig
from hlora.data.domain import DomainRows
from hlora.data.packing import first_tokens
from hlora.data.rendering import Rendered, render
from hlora.evaluation.answers import answer_limit, answer_nll, generate_answers, mean_with_stderr
from hlora.evaluation.harness import harness_accuracy
from hlora.evaluation.likelihood import Reference, text_likelihood
from hlora.system.progress import line

logger = logging.getLogger("hlora")

_SHOWN = 8  # sample answers kept for the report


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    domain: DomainRows,
    settings: EvaluationConfig,
    *,
    references: Mapping[str, Reference] | None = None,
) -> dict[str, Any]:
    """All measures of one model, as plain values: `texts` (by name), `domain` and `samples`. See docs/quickstart.md.

    The same texts, tokens and rows are scored whatever the model, so results before and after compare.

    references: models by name, whose predictions on each text the model's are compared with (see text_likelihood).

    Raises TrainingError where a loss is not finite: a diverged model, or one whose float16 overflows.
    """
    training = model.training
    model.eval()
    result: dict[str, Any] = {"texts": {}, "domain": {"rows": len(domain.test)}, "samples": []}
    tokens = sum(len(first_tokens(tokenizer, text, settings.max_tokens)[0]) - 1 for text in texts.values())
    with line("perplexity, token", tokens) as shown:  # of all texts: a short one is a single batch
        for name, text in texts.items():
            result["texts"][name] = text_likelihood(
                model, tokenizer, text, settings, references=references, on_scored=shown.add
            )
    if settings.accuracy and domain.test[0].choices:
        result["domain"] |= harness_accuracy(model, tokenizer, domain, settings.batch_size)
    else:
        answers = answer_nll(model, tokenizer, domain.test, settings.batch_size)
        result["domain"] |= {**mean_with_stderr("answer_nll", answers), "answer_nll_each": answers}
    if settings.generate:
        asked = [render(tokenizer, example) for example in domain.test[: settings.generate]]
        written = generate_answers(model, tokenizer, asked, settings)
        matches = [float(_normal(a) == _normal(row.answer)) for a, row in zip(written, asked, strict=True)]
        result["domain"] |= {"generated": len(asked), **mean_with_stderr("exact_match", matches)}
        result["domain"] |= _too_long(asked, settings)
        result["samples"] = [
            {"prompt": row.prompt, "expected": row.answer.strip(), "answer": answer}
            for answer, row in list(zip(written, asked, strict=True))[:_SHOWN]
        ]
    model.train(training)
    return result


def _too_long(asked: list[Rendered], settings: EvaluationConfig) -> dict[str, int]:
    """How many expected answers are longer than what is generated, so that they cannot match; nothing for none."""
    limit = answer_limit(asked, settings)
    lengths = [row.end - row.start for row in asked if row.end - row.start > limit]
    if not lengths:
        return {}
    logger.warning(
        "evaluation.max_new_tokens: %d of %d expected answers have more than %d tokens, up to %d, and cannot match. "
        "Raise it, or leave it out.",
        len(lengths),
        len(asked),
        limit,
        max(lengths),
    )
    return {"generated_too_short": len(lengths)}


def add_forgetting(measured: dict[str, Any], base: Mapping[str, Any]) -> None:
    """Put `forgetting`, the rise of the mean token loss against the base (nats/token), beside each text's measures.

    As PEFT's method_comparison counts it. `measured` itself gets the mean over texts, the worst, and whose it is.
    measured, base: what `evaluate` returns of a model and of the base.
    """
    rises = {n: text["nll"] - base["texts"][n]["nll"] for n, text in measured["texts"].items() if n in base["texts"]}
    for name, rise in rises.items():
        measured["texts"][name]["forgetting"] = rise
    if rises:
        worst = max(rises, key=rises.__getitem__)
        measured["forgetting"] = {"mean": statistics.fmean(rises.values()), "worst": rises[worst], "text": worst}


def _normal(answer: str) -> str:
    """For exact match: case, outer spaces, a final full stop and the number of inner spaces do not matter."""
    return " ".join(answer.casefold().strip().rstrip(".").split())
