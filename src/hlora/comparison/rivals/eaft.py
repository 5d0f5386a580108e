"""EAFT: each token's loss times the entropy of the model's own prediction (Diao et al. 2026, arXiv 2601.02151)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from hlora.comparison.rivals.added_term import check_head, last_hidden_states
from hlora.comparison.rivals.common import at_least_0
from hlora.model.lora import attach_lora
from hlora.run.job import Job
from hlora.run.phases import History, train_on_domain

if TYPE_CHECKING:
    from trl import SFTTrainer

TOP = 20
"""Most likely tokens that the entropy is taken over (paper)."""
UNIT = 3.0
"""What the entropy is divided by: LLaMA-Factory rounds the largest, ln 20, to it."""


def eaft(job: Job, *, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA under Σ_t h_t^α · (−log p(y_t)), h_t the entropy of the model's prediction, without a gradient.

    A token of low probability where the model is certain of another one, a confident conflict, trains little. h_t is
    the entropy of the 20 most likely tokens, renormalised, over 3.0, as LLaMA-Factory 0.9.5 has it (`use_eaft_loss`).
    The sum is divided by the number of trained tokens, so weights below 1 also shorten the steps before clipping.
    `loss` in the history is the weighted loss. The logits of all trained tokens of a batch are kept.

    Args:
        job: The job.
        strength: α ≥ 0, without a unit (`eaft_alpha`); 0 is plain LoRA; 1 where it is None, as in the paper.

    Raises:
        ConfigError: The strength is negative.
        CannotRun: The output layer is trained, or the model changes its logits after it (Gemma 2, Cohere).
    """
    alpha = at_least_0(1.0 if strength is None else strength, "eaft", "α")
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    check_head(model, job.tokenizer, "EAFT")
    return model, train_on_domain(job, model, "eaft", trainer_class=eaft_trainer(alpha))


def gated_losses(logits: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """h^α · (−log p(target)) of each token, (tokens,), in nats.

    Args:
        logits: (tokens, vocabulary).
        targets: Token ids (tokens,).
        alpha: α.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        log_p = torch.topk(logits, min(TOP, logits.shape[-1]), dim=-1).values.log_softmax(dim=-1)
        gate = (-(log_p.exp() * log_p).sum(dim=-1) / UNIT) ** alpha
    return gate * cross_entropy(logits, targets, reduction="none")


def eaft_trainer(alpha: float) -> type[SFTTrainer]:
    """An SFTTrainer whose loss is the mean of `gated_losses`."""
    from trl import SFTTrainer

    class EaftTrainer(SFTTrainer):
        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            peft_model = self.accelerator.unwrap_model(model)
            with last_hidden_states(peft_model) as seen:
                super().compute_loss(model, inputs, False, num_items_in_batch)  # for its forward pass and metrics
            targets = inputs["labels"][:, 1:]
            trained = targets != -100
            with self.accelerator.autocast():
                logits = peft_model.get_output_embeddings()(seen[0][:, :-1][trained])
            count = trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            return gated_losses(logits, targets[trained], alpha).sum() / count

    return EaftTrainer
