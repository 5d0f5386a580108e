"""KL to the base model on general text: distillation replay."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hlora.comparison.rivals.added_term import Batch, backbone_of, check_head, trainer_adding
from hlora.comparison.rivals.common import at_least_0
from hlora.comparison.rivals.kl import mean_kl
from hlora.model.lora import attach_lora
from hlora.run.job import Job
from hlora.run.phases import History, train_on_domain


def general_kl(job: Job, *, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA under L_task + β · KL(p_base ‖ p_model), the divergence on general text instead of the domain's.

    Each step also reads as many general rows as domain rows, cut from `general` as the general phase cuts them. Their
    order comes from the run's seed, and starts again when all have been read. The divergence is `kl`'s: over the whole
    vocabulary, the mean over the rows' tokens. The general text's own next tokens are not trained. A step reads the
    domain batch once and the general batch twice.

    Args:
        job: The job.
        strength: β ≥ 0, without a unit: both losses are in nats per token.

    Raises:
        ConfigError: The strength is missing or negative.
        CannotRun: The output layer is trained, or the model changes its logits after it (Gemma 2, Cohere).

    Source: Li and Hoiem 2016, *Learning without Forgetting*, with text like the old task's instead of the new one's.
    """
    beta = at_least_0(strength, "general_kl", "β")
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    check_head(model, job.tokenizer, "KL to the base model")
    trainer_class = trainer_adding(beta, divergence_on(general_rows(job)))
    return model, train_on_domain(job, model, "general_kl", trainer_class=trainer_class)


def general_rows(job: Job) -> list[Tensor]:
    """The rows of the general phase, token ids, in the order that the seed gives."""
    arguments = job.config.training.record_arguments()
    rows = [torch.tensor(row) for row in job.general.dataset(job.tokenizer, arguments)["input_ids"] if len(row) > 1]
    return random.Random(job.config.seed).sample([row[: arguments.get("max_length")] for row in rows], len(rows))


def divergence_on(rows: list[Tensor]) -> Callable[[Batch], Tensor]:
    """The mean divergence on the next of `rows`, as many as the domain batch has."""

    def term(batch: Batch) -> Tensor:
        count = len(batch.inputs["input_ids"])
        mine = [rows[(batch.number * count + n) % len(rows)] for n in range(count)]
        inputs = {
            "input_ids": pad_sequence(mine, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in mine], batch_first=True),
        }
        inputs = {name: value.to(batch.model.device) for name, value in inputs.items()}
        hidden = backbone_of(batch.model)(**inputs, use_cache=False).last_hidden_state
        return mean_kl(batch.model, inputs, hidden)

    return term
