"""Replay: general text mixed into the domain's rows."""

from __future__ import annotations

import math
from typing import Any

from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from hlora.comparison.rivals.common import between_0_and_1
from hlora.data.packing import pieces_of
from hlora.model.lora import attach_lora
from hlora.run.job import Job
from hlora.run.phases import History, train_on_domain
from hlora.training.train import sft_arguments


def replay(job: Job, *, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA on the domain with general text mixed in. strength: share p of the rows that is general, 0 < p < 1.

    All domain rows are kept and general ones added, D·p/(1 − p) to D, each as long as the mean domain row in tokens.
    The steps stay those of the unmixed rows, so of what is seen a share p is general instead of domain. All tokens of a
    general row count in the loss, of a domain row those of the answer: the share of loss terms is larger than p.
    """
    p = between_0_and_1(strength, "replay", "the share of general rows")
    domain = job.domain.dataset()
    arguments = sft_arguments(job.output, job.config.training.of_tune(), job.config.seed)
    length = _mean_tokens(domain, job.tokenizer)
    if arguments.max_length is not None:
        length = min(length, arguments.max_length)
    count = max(1, round(len(domain) * p / (1 - p)))
    pieces = pieces_of(job.general.train, job.tokenizer, length, count, job.config.seed)
    texts = [str(job.tokenizer.decode(pieces[n % len(pieces)])) for n in range(count)]  # again, where the text is short
    mixed = concatenate_datasets([domain, Dataset.from_list([_general_row(domain, text) for text in texts])])
    steps = arguments.max_steps
    if steps <= 0:
        batches = math.ceil(len(domain) / (arguments.train_batch_size * arguments.world_size))
        steps = math.ceil(arguments.num_train_epochs * math.ceil(batches / arguments.gradient_accumulation_steps))
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    return model, train_on_domain(job, model, "replay", dataset=mixed, max_steps=steps)


def _mean_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """Mean length of the rows in tokens, prompt and completion, chat templates left out; at least 1."""
    texts = [_text(row["prompt"]) + _text(row["completion"]) for row in rows]
    return max(1, round(sum(map(len, tokenizer(texts)["input_ids"])) / len(texts)))


def _text(part: str | list[dict[str, str]]) -> str:
    return part if isinstance(part, str) else "\n".join(message["content"] for message in part)


def _general_row(domain: Dataset, text: str) -> dict[str, Any]:
    """As TRL reads it: a completion of nothing; among chat rows, the answer to an empty message."""
    if isinstance(domain[0]["prompt"], str):
        return {"prompt": "", "completion": text}
    return {
        "prompt": [{"role": "user", "content": ""}],
        "completion": [{"role": "assistant", "content": text}],
    }
