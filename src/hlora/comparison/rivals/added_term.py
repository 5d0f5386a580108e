"""A trainer whose loss is the task's plus a weighted term: KL to the base, and LaLoRA's penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hlora.system.errors import CannotRun

if TYPE_CHECKING:
    from trl import SFTTrainer


class Batch(NamedTuple):
    """What a term is computed from, once the task's loss on the batch is known."""

    model: PeftModel
    inputs: dict[str, Any]
    """The domain batch."""
    hidden: Tensor
    """Last hidden states (rows, tokens, hidden size) of the task's forward pass, with its graph."""
    number: int
    """Different for every batch of a training, and the same for this one after a resume."""


def trainer_adding(weight: float, term: Callable[[Batch], Tensor]) -> type[SFTTrainer]:
    """An SFTTrainer whose loss is the task's plus `weight` times `term`, a mean over the batch.

    Under gradient accumulation the mean of the batches' terms counts. `loss` in the history stays the task's, as for
    ImportancePenalty; the term is `regularisation_loss`, and both together are `total_loss`.
    """
    from trl import SFTTrainer

    class AddingTrainer(SFTTrainer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.terms: list[Tensor] = []
            self.at = -1, 0  # optimizer step, batches of it so far

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
            given = dict(inputs)  # TRL adds to it
            with last_hidden_states(peft_model) as seen:
                loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            step = self.state.global_step
            self.at = step, self.at[1] + 1 if self.at[0] == step else 0
            number = step * self.args.gradient_accumulation_steps + self.at[1]
            with self.accelerator.autocast():
                value = term(Batch(peft_model, given, seen[0], number))
            self.terms.append(value.detach())
            # Trainer leaves dividing by the accumulation to a loss that gets the number of items.
            parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            return loss + weight * value / parts

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs and self.terms:
                value = float(torch.stack(self.terms).mean())
                self.terms = []
                logs["regularisation_loss"] = value
                logs["weighted_regularisation_loss"] = weight * value
                logs["total_loss"] = logs["loss"]
                logs["loss"] -= weight * value
            super().log(logs, start_time)

    return AddingTrainer


@contextmanager
def last_hidden_states(model: PeftModel) -> Iterator[list[Tensor]]:
    """The last hidden states (rows, tokens, hidden size) of each forward pass within, with their graph."""
    seen: list[Tensor] = []
    hook = backbone_of(model).register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    try:
        yield seen
    finally:
        hook.remove()


def backbone_of(model: PeftModel) -> nn.Module:
    """The model, with its adapter, below its output layer."""
    base: Any = model.get_base_model()
    return base.base_model


@torch.no_grad()
def check_head(model: PeftModel, tokenizer: PreTrainedTokenizerBase, method: str) -> None:
    """Raises CannotRun unless logits are just the product of last hidden states and a frozen output layer."""
    base: Any = model.get_base_model()
    head = model.get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise CannotRun(f"{method} needs a frozen output layer; take it out of lora.target_modules")
    ids = torch.tensor([tokenizer("A short text.")["input_ids"]], device=model.device)
    logits = base(input_ids=ids, use_cache=False).logits
    product = head(base.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits.float(), product.float(), rtol=1e-2, atol=1e-2):
        raise CannotRun(f"{method} needs logits that come straight from the output layer; this model's do not")
