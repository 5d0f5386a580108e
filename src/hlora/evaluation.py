"""What is measured before and after: general ability as perplexity, the domain as answer likelihood and accuracy."""

from __future__ import annotations

import inspect
import logging
import math
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hlora.config import EvaluationConfig
from hlora.data import DomainRows
from hlora.errors import DataError, TrainingError
from hlora.quiet import quiet
from hlora.tasks import Example, prompt_text, write_harness_task

_SHOWN = 8  # sample answers kept for the report
_BLOCK = 64  # tokens of one paired difference between two models


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
        result["domain"] |= {**_mean("answer_nll", answers), "answer_nll_each": answers}
    if settings.generate:
        asked = domain.test[: settings.generate]
        written = generate_answers(model, tokenizer, asked, settings)
        matches = [float(_normal(a) == _normal(e.answer)) for a, e in zip(written, asked, strict=True)]
        result["domain"] |= {"generated": len(asked), **_mean("exact_match", matches)}
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


@torch.no_grad()
def text_likelihood(
    model: Any, tokenizer: PreTrainedTokenizerBase, text: str, settings: EvaluationConfig
) -> dict[str, Any]:
    """Perplexity (per token) and bits per byte of a text's first `max_tokens` tokens, by sliding window.

    Each token is scored once, given up to window − 1 tokens before it and at least window − stride of them where the
    text has as many. nll: nats per token, weighted by tokens, with its standard error; nll_each: its mean over each
    64 tokens, to compare two models on the same text by paired differences.
    """
    tokens = _first_tokens(tokenizer, text, settings.max_tokens)
    if len(tokens) < 2:
        raise DataError(f"evaluation.texts: a text of {len(tokens)} tokens has nothing to score; it needs at least 2")
    losses = _sliding_window(model, tokens, settings.window, settings.stride, settings.batch_size)
    nll = _finite(float(losses.mean()), "a text's mean token loss")
    scored = len(str(tokenizer.decode(tokens[1:])).encode("utf-8"))
    return {
        "perplexity": math.exp(min(nll, 700.0)),
        "bits_per_byte": float(losses.sum()) / math.log(2) / max(1, scored),
        "nll": nll,
        "nll_stderr": float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0,
        "nll_each": [float(block.mean()) for block in losses.split(_BLOCK)],
        "tokens": len(losses),
        "bytes": scored,
    }


def _first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> Tensor:  # (count,) or fewer
    """Tokenises the start of the text only: eight characters a token (four are typical), more while that is too few."""
    characters = 8 * count
    while True:
        tokens = tokenizer(text[:characters], return_tensors="pt", truncation=False, verbose=False)["input_ids"][0]
        if len(tokens) > count or characters >= len(text):
            return tokens[:count]
        characters *= 2


def _sliding_window(model: Any, tokens: Tensor, window: int, stride: int, batch_size: int) -> Tensor:  # (n − 1,)
    """−log p of each token but the first, float64. All windows have one length, that of the text if it is short."""
    window = min(window, len(tokens))
    stride = max(1, min(stride, window - 1))
    ends = [window, *range(window + stride, len(tokens) + 1, stride)]
    if ends[-1] < len(tokens):
        ends.append(len(tokens))
    new = [window - 1] + [end - before for before, end in pairwise(ends)]  # scored by each window
    can_keep = _takes(model, "logits_to_keep")
    losses = []
    for start in track(range(0, len(ends), batch_size), description="perplexity", transient=True):
        chosen = slice(start, start + batch_size)
        batch = torch.stack([tokens[end - window : end] for end in ends[chosen]]).to(model.device)
        # Logits only where something is scored: the vocabulary makes them the largest tensor.
        keep = max(new[chosen]) + 1
        options = {"logits_to_keep": keep} if can_keep else {}
        logits = model(input_ids=batch, use_cache=False, **options).logits[:, -keep:-1]
        targets = batch[:, 1:][:, -(keep - 1) :]
        for row, target, count in zip(logits, targets, new[chosen], strict=True):  # one row in float32 at a time
            losses.append(cross_entropy(row[-count:].float(), target[-count:], reduction="none").cpu().double())
    return torch.cat(losses)


def _takes(model: Any, argument: str) -> bool:
    """Whether the model's forward has the argument. PEFT's own takes anything and hands it on."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return argument in inspect.signature(base.forward).parameters


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


def harness_accuracy(
    model: Any, tokenizer: PreTrainedTokenizerBase, domain: DomainRows, batch_size: int
) -> dict[str, Any]:
    """acc and acc_norm, shares of 1 with standard errors, by lm-evaluation-harness on the test rows.

    And answer_nll, which the harness scores on its way: that of the right choice, as in `answer_nll`. Nothing in a
    process of a launch that is not its machine's first (LOCAL_RANK).
    """
    with _harness_unnoticed(), tempfile.TemporaryDirectory() as scratch:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        task = write_harness_task(domain.facts["task"], domain.test_rows, Path(scratch))
        outcome = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[task],
            task_manager=TaskManager(include_path=scratch, include_defaults=False),
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=None,
        )
    if outcome is None:  # in a launch the harness speaks in a machine's first process alone; all of them have run it
        return {}
    samples = sorted(outcome["samples"][task], key=lambda sample: sample["doc_id"])
    pairs = zip(samples, domain.test, strict=True)
    answers = [-float(sample["filtered_resps"][e.choices.index(e.answer)][0]) for sample, e in pairs]
    found: dict[str, Any] = {**_mean("answer_nll", answers), "answer_nll_each": answers}
    for metric in ("acc", "acc_norm"):
        right = [float(sample[metric]) for sample in samples]
        found |= {**_mean(metric, right), f"{metric}_each": right}
    return found


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


def _mean(name: str, values: list[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = _finite(statistics.fmean(values), name)
    return {name: mean, f"{name}_stderr": spread / math.sqrt(len(values))}


def _finite(measured: float, what: str) -> float:
    if not math.isfinite(measured):
        raise TrainingError(
            f"evaluation: {what} is {measured}. The model's weights or activations are not finite: in float16 take "
            "model.dtype bfloat16 or float32, otherwise train with a lower learning rate."
        )
    return measured


def _normal(answer: str) -> str:
    """For exact match: case, outer spaces, a final full stop and the number of inner spaces do not matter."""
    return " ".join(answer.casefold().strip().rstrip(".").split())


@contextmanager
def _harness_unnoticed() -> Iterator[None]:
    """Without the step reports of lm-evaluation-harness and datasets, nor the random numbers that it names tasks by."""
    import datasets

    state = random.getstate()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with quiet():
            yield
    finally:
        random.setstate(state)
        if bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
