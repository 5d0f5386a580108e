"""KL to the base model: a divergence from its next-token distributions, added to the task loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedTokenizerBase

from hlora.model.lora import attach_lora
from hlora.numerics.precision import wide_dtype
from hlora.run.job import Job
from hlora.run.phases import History, train_on_domain
from hlora.system.errors import CannotRun, ConfigError

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
    if strength is None or strength < 0:
        raise ConfigError(f"kl: expected a strength β of 0 or more, got {strength}")
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    _check_head(model, job.tokenizer)
    return model, train_on_domain(job, model, "kl", trainer_class=kl_trainer(float(strength)))


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
    from trl import SFTTrainer

    class KLTrainer(SFTTrainer):
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
            backbone = peft_model.get_base_model().base_model
            head = peft_model.get_output_embeddings()
            reference = _hidden_states_of_base(peft_model, backbone, inputs)
            seen: list[Tensor] = []
            hook = backbone.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
            try:
                loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            finally:
                hook.remove()
            has_next = _has_next(inputs)
            kl = summed_kl(seen[0][:, :-1][has_next], reference[:, :-1][has_next], head) / has_next.sum().clamp(min=1)
            self.divergences = [*getattr(self, "divergences", []), kl.detach()]
            # Trainer leaves dividing by the accumulation to a loss that gets the number of items.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            return loss + beta * kl / steps

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs and getattr(self, "divergences", []):
                value = float(torch.stack(self.divergences).mean())
                self.divergences = []
                logs["regularisation_loss"] = value
                logs["weighted_regularisation_loss"] = beta * value
                logs["total_loss"] = logs["loss"]
                logs["loss"] -= beta * value
            super().log(logs, start_time)

    return KLTrainer


@torch.no_grad()
def _hidden_states_of_base(model: PeftModel, backbone: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Last hidden states (rows, tokens, hidden size) with the adapter and all dropout off."""
    model.eval()
    with model.disable_adapter():
        states = backbone(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    model.train()
    return states.last_hidden_state


def _has_next(inputs: dict[str, Any]) -> Tensor:
    """Whether a next token follows, for every token except the row's last: (rows, tokens − 1)."""
    mask = inputs.get("attention_mask")
    return (torch.ones_like(inputs["input_ids"]) if mask is None else mask)[:, 1:].bool()


@torch.no_grad()
def _check_head(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises CannotRun unless logits are just the product of a frozen output layer, as `summed_kl` assumes."""
    base: Any = model.get_base_model()
    head = model.get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise CannotRun("KL to the base model needs a frozen output layer; take it out of lora.target_modules")
    ids = torch.tensor([tokenizer("A short text.")["input_ids"]], device=model.device)
    logits = base(input_ids=ids, use_cache=False).logits
    product = head(base.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits.float(), product.float(), rtol=1e-2, atol=1e-2):
        raise CannotRun(
            "KL to the base model needs logits that come straight from the output layer; this model's do not"
        )
