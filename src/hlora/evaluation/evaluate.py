"""What is measured before and after: general ability as perplexity, the domain as answer likelihood and accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hlora.config.sections import EvaluationConfig
from hlora.data.domain import DomainRows
from hlora.data.tasks import prompt_text
from hlora.evaluation.answers import answer_nll, generate_answers, mean_with_stderr
from hlora.evaluation.harness import harness_accuracy
from hlora.evaluation.likelihood import text_likelihood

_SHOWN = 8  # sample answers kept for the report


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    domain: DomainRows,
    settings: EvaluationConfig,
) -> dict[str, Any]:
    """All measures of one model, as plain values: `texts` (by name), `domain` and `samples`. See docs/quickstart.md.

    The same texts, tokens and rows are scored whatever the model, so results before and after compare.

    Raises TrainingError where a loss is not finite: a diverged model, or one whose float16 overflows.
    """
    training = model.training
    model.eval()
    result: dict[str, Any] = {"texts": {}, "domain": {"rows": len(domain.test)}, "samples": []}
    for name, text in texts.items():
        result["texts"][name] = text_likelihood(model, tokenizer, text, settings)
    if settings.accuracy and domain.test[0].choices:
        result["domain"] |= harness_accuracy(model, tokenizer, domain, settings.batch_size)
    else:
        answers = answer_nll(model, tokenizer, domain.test, settings.batch_size)
        result["domain"] |= {**mean_with_stderr("answer_nll", answers), "answer_nll_each": answers}
    if settings.generate:
        asked = domain.test[: settings.generate]
        written = generate_answers(model, tokenizer, asked, settings)
        matches = [float(_normal(a) == _normal(e.answer)) for a, e in zip(written, asked, strict=True)]
        result["domain"] |= {"generated": len(asked), **mean_with_stderr("exact_match", matches)}
        result["samples"] = [
            {"prompt": prompt_text(tokenizer, example), "expected": example.answer, "answer": answer}
            for answer, example in list(zip(written, asked, strict=True))[:_SHOWN]
        ]
    model.train(training)
    return result


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
