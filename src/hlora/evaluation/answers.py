"""The domain: likelihood of the right answers, and answers that the model writes."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hlora.config.sections import EvaluationConfig
from hlora.data.example import Example
from hlora.data.generation import written
from hlora.data.rendering import Rendered, end_tokens, render
from hlora.evaluation.likelihood import checked_finite, token_losses
from hlora.system.progress import counted


@torch.no_grad()
def answer_nll(model: Any, tokenizer: PreTrainedTokenizerBase, examples: list[Example], batch_size: int) -> list[float]:
    """−log p(answer | prompt) of each example, in nats per answer, summed over the answer's tokens.

    The tokens are those that are trained, without what ends the turn.
    """
    rendered = [render(tokenizer, example) for example in examples]
    order = sorted(range(len(rendered)), key=lambda i: rendered[i].end)
    values = [0.0] * len(rendered)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for chosen in counted(batches, "answer likelihood, row", len):
        sequences = [torch.tensor(rendered[i].ids[: rendered[i].end]) for i in chosen]
        losses = token_losses(model, sequences, [rendered[i].end - rendered[i].start for i in chosen])
        for i, loss in zip(chosen, losses, strict=True):
            values[i] = float(loss.sum())
    return values


def scoring_passes(tokenizer: PreTrainedTokenizerBase, examples: list[Example], *, accuracy: bool) -> int:
    """How many sequences the model reads to score the rows: one each, or one for each choice where there is accuracy.

    Choices of one token, such as letters, share the sequence that ends before the letter.
    """
    if not (accuracy and examples[0].choices):
        return len(examples)
    choices = [render(tokenizer, replace(example, answer=each)) for example in examples for each in example.choices]
    return len({tuple(row.ids[: row.end - 1]) for row in choices})


def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Rendered], settings: EvaluationConfig
) -> list[str]:
    """Greedy answers of at most `answer_limit` tokens within the context, cut to as many lines as are expected."""
    limit = answer_limit(rows, settings)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    stops = sorted(end_tokens(tokenizer, rows))
    answers: list[str] = []
    batches = _batches(rows, settings.batch_size, limit, context)
    for batch in counted(batches, "sample answers", len):
        ids, mask = _padded_left([row.prompt_ids for row in batch], tokenizer.pad_token_id)
        room = limit if context is None else min(limit, context - ids.shape[1])
        found = written(model, tokenizer, ids, mask=mask, new_tokens=room, stops=stops)
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        answers += [_answer_in(tokenizer, row, text) for text, row in zip(texts, batch, strict=True)]
    return [
        "\n".join(answer.strip().splitlines()[: len(row.answer.strip().splitlines())])
        for answer, row in zip(answers, rows, strict=True)
    ]


def _answer_in(tokenizer: PreTrainedTokenizerBase, row: Rendered, text: str) -> str:
    """The answer in what the model wrote, without what is trained around it.

    Before it that is the end of the prompt, or what a chat template writes there: Qwen 3's an empty thought, gpt-oss'
    the name of a channel. After it that is an end of turn which is no special token.
    """
    trained, end = (
        str(tokenizer.decode(ids, skip_special_tokens=True))
        for ids in (row.ids[row.start : row.end], row.ids[row.end :])
    )
    start = trained.rfind(row.answer.strip())
    text = text.removeprefix(row.prompt_rest if start < 0 else trained[:start])
    return text.partition(end.strip())[0] if end.strip() else text


def answer_limit(rows: list[Rendered], settings: EvaluationConfig) -> int:
    """How many tokens may be written: `max_new_tokens`, or those of the longest expected answer and of its end."""
    return settings.max_new_tokens or max((len(row.ids) - row.start for row in rows), default=1)


def _batches(rows: list[Rendered], size: int, limit: int, context: int | None) -> list[list[Rendered]]:
    """In order, `size` at a time; a row whose prompt and limit exceed the context is alone, for it has less room."""
    batches: list[list[Rendered]] = []
    for row in rows:
        alone = context is not None and len(row.prompt_ids) + limit > context
        if (
            alone
            or not batches
            or len(batches[-1]) == size
            or len(batches[-1][0].prompt_ids) + limit > (context or math.inf)
        ):
            batches.append([])
        batches[-1].append(row)
    return batches


def _padded_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])


def mean_with_stderr(name: str, values: list[float]) -> dict[str, float]:
    """Mean and standard error, under `name` and `name`_stderr."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = checked_finite(statistics.fmean(values), name)
    return {name: mean, f"{name}_stderr": spread / math.sqrt(len(values))}
