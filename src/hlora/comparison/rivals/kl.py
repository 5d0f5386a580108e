"""KL to the base model: a divergence from its next-token distributions, added to the task loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from hlora.comparison.rivals.added_term import Batch, backbone_of, check_head, trainer_adding
from hlora.comparison.rivals.common import at_least_0
from hlora.model.lora import attach_lora
from hlora.numerics.precision import wide_dtype
from hlora.run.job import Job
from hlora.run.phases import History, train_on_domain

if TYPE_CHECKING:
    from trl import SFTTrainer

_TOKENS_AT_ONCE = 512  # rows of logits in float32: 100 MB at a vocabulary of 49,152


def kl(job: Job, *, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA under L_task + β · KL(p_base ‖ p_model), p_base being the model with its adapter off.

    The divergence of the next-token distributions is over the whole vocabulary. It is the mean over the tokens of the
    domain batch, with prompts and without padding; under gradient accumulation, the mean of its parts' means. `loss` in
    the history is the task's, as for ImportancePenalty. A step reads each batch twice and keeps 512 rows of logits at a
    time.

    Args:
        job: The job.
        strength: β ≥ 0, without a unit: both losses are in nats per token.

    Raises:
        ConfigError: The strength is missing or negative.
        CannotRun: The output layer is trained, or the model changes its logits after it (Gemma 2, Cohere).
    """
    beta = at_least_0(strength, "kl", "β")
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    check_head(model, job.tokenizer, "KL to the base model")
    return model, train_on_domain(job, model, "kl", trainer_class=kl_trainer(beta))


class _SummedKL(torch.autograd.Function):
    """Σ over tokens of KL(softmax(head(reference)) ‖ softmax(head(hidden))), computed with its gradient for `hidden`.

    The gradient for the logits is q − p, so each part's gradient is known at once and no logits are kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, reference: Tensor, head: nn.Linear) -> Tensor:
        precision = wide_dtype(hidden)
        total = torch.zeros((), dtype=precision, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            log_p = log_softmax(head(reference[part]).to(precision), dim=-1)
            log_q = log_softmax(head(hidden[part]).to(precision), dim=-1)
            p = log_p.exp()
            total += torch.sum(p * (log_p - log_q))
            gradient[part] = ((log_q.exp_() - p).to(head.weight.dtype) @ head.weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None


def summed_kl(hidden: Tensor, reference: Tensor, head: nn.Linear) -> Tensor:
    """Σ_t KL(p_t ‖ q_t) in nats, p = softmax(head(reference)) and q = softmax(head(hidden)); a scalar.

    Differentiable in `hidden` only, since the head is frozen.

    Args:
        hidden: Last hidden states (tokens, hidden size) of the model.
        reference: Those of the base model.
        head: The output layer.
    """
    return _SummedKL.apply(hidden, reference, head)


def kl_trainer(beta: float) -> type[SFTTrainer]:
    """An SFTTrainer whose loss is the task's plus beta times the divergence from the model with its adapter off."""
    return trainer_adding(beta, _on_the_domain)


def _on_the_domain(batch: Batch) -> Tensor:
    return mean_kl(batch.model, batch.inputs, batch.hidden)


def mean_kl(model: PeftModel, inputs: dict[str, Any], hidden: Tensor) -> Tensor:
    """Mean KL(p_base ‖ p_model), nats per token that has a next one; a scalar, differentiable in `hidden`.

    Args:
        model: The model with its adapter.
        inputs: `input_ids` (rows, tokens), with an `attention_mask` where rows are padded.
        hidden: The model's last hidden states on them (rows, tokens, hidden size).
    """
    reference, has_next = _hidden_states_of_base(model, inputs), _has_next(inputs)
    total = summed_kl(hidden[:, :-1][has_next], reference[:, :-1][has_next], model.get_output_embeddings())
    return total / has_next.sum().clamp(min=1)


@torch.no_grad()
def _hidden_states_of_base(model: PeftModel, inputs: dict[str, Any]) -> Tensor:
    """Last hidden states (rows, tokens, hidden size) with the adapter and all dropout off."""
    model.eval()
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with model.disable_adapter():
        states = backbone_of(model)(**given, use_cache=False)
    model.train()
    return states.last_hidden_state


def _has_next(inputs: dict[str, Any]) -> Tensor:
    """Whether a next token follows, for every token except the row's last: (rows, tokens − 1)."""
    mask = inputs.get("attention_mask")
    return (torch.ones_like(inputs["input_ids"]) if mask is None else mask)[:, 1:].bool()
