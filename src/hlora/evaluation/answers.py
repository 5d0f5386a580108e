"""The domain: likelihood of the right answers, and answers that the model writes."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hlora.config.sections import EvaluationConfig
from hlora.data.tasks import Example, prompt_text
from hlora.evaluation.likelihood import checked_finite


@torch.no_grad()
def answer_nll(model: Any, tokenizer: PreTrainedTokenizerBase, examples: list[Example], batch_size: int) -> list[float]:
    """−log p(answer | prompt) of each example, in nats per answer, summed over the answer's tokens."""
    encoded = [_encode(tokenizer, example) for example in examples]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    values = [0.0] * len(encoded)
    for start in track(range(0, len(order), batch_size), description="answer likelihood", transient=True):
        rows = order[start : start + batch_size]
        ids = pad_sequence([encoded[i][0] for i in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
        lengths = torch.tensor([len(encoded[i][0]) for i in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = model(
            input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device), use_cache=False
        ).logits
        for row, i in zip(logits, rows, strict=True):
            sequence, answer = encoded[i]
            scored = row[len(sequence) - 1 - answer : len(sequence) - 1].float()
            target = sequence[len(sequence) - answer :].to(model.device)
            values[i] = float(cross_entropy(scored, target, reduction="none").cpu().double().sum())
    return values


def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: list[Example], settings: EvaluationConfig
) -> list[str]:
    """Greedy answers, cut after as many lines as the expected answer has."""
    prompts = [prompt_text(tokenizer, example) for example in examples]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    answers: list[str] = []
    for start in track(range(0, len(prompts), settings.batch_size), description="sample answers", transient=True):
        batch = tokenizer(
            prompts[start : start + settings.batch_size],
            return_tensors="pt",
            padding=True,
            add_special_tokens=isinstance(examples[0].prompt, str),
        ).to(model.device)
        written = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    tokenizer.padding_side = side
    return [
        "\n".join(answer.strip().splitlines()[: len(example.answer.splitlines())])
        for answer, example in zip(answers, examples, strict=True)
    ]


def _encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[Tensor, int]:
    """Tokens of prompt and answer, (n,), and how many of them are the answer's."""
    text = prompt_text(tokenizer, example)
    special = isinstance(example.prompt, str)  # a chat template writes its own special tokens
    whole = tokenizer(text + (" " if special else "") + example.answer, add_special_tokens=special)["input_ids"]
    before = tokenizer(text, add_special_tokens=special)["input_ids"]
    return torch.tensor(whole), len(whole) - len(before)


def mean_with_stderr(name: str, values: list[float]) -> dict[str, float]:
    """Mean and standard error, under `name` and `name`_stderr."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = checked_finite(statistics.fmean(values), name)
    return {name: mean, f"{name}_stderr": spread / math.sqrt(len(values))}
