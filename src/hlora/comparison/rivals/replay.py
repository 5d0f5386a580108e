"""Replay: general text mixed into the domain's rows."""

from __future__ import annotations

from datasets import Dataset, concatenate_datasets
from peft import PeftModel

from hlora.comparison.rivals.common import between_0_and_1
from hlora.data.packing import pieces_of
from hlora.model.lora import attach_lora
from hlora.run.job import Job
from hlora.run.phases import History, train_on_domain
from hlora.training.train import sft_arguments, total_steps


def replay(job: Job, *, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA on the domain with general text mixed in.

    All D domain rows are kept and D·p/(1 − p) general rows added, each as long in tokens as the mean domain row. The
    number of steps stays that of the domain rows alone, so a share p of the rows seen is general instead of domain. All
    tokens of a general row count in the loss, but only the answer's of a domain row. So general text has a larger share
    of the loss terms than p.

    Args:
        job: The job.
        strength: p, the share of general rows, 0 < p < 1.

    Raises:
        ConfigError: The strength is out of range.
    """
    p = between_0_and_1(strength, "replay", "the share of general rows")
    domain = job.domain.dataset(job.tokenizer)
    arguments = sft_arguments(job.output, job.config.training.tune_arguments(), job.config.seed)
    length = max(1, round(sum(map(len, domain["input_ids"])) / len(domain)))
    if arguments.max_length is not None:
        length = min(length, arguments.max_length)
    count = max(1, round(len(domain) * p / (1 - p)))
    pieces = pieces_of(job.general.train, job.tokenizer, length, count, job.config.seed)
    again = [pieces[n % len(pieces)] for n in range(count)]  # repeats some if the text is short
    general = [{"input_ids": piece, "completion_mask": [1] * len(piece)} for piece in again]
    mixed = concatenate_datasets([domain, Dataset.from_list(general)])
    steps = total_steps(job.output, job.config.training.tune_arguments(), rows=len(domain))
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    return model, train_on_domain(job, model, "replay", dataset=mixed, max_steps=steps)
