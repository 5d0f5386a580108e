"""Policy and reference of preference trainers: where each starts by either of the two ways, against a plain loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import record
from datasets import Dataset
from peft import PeftModel
from test_callbacks import LR, STEPS, adapter_parameters, arguments, assert_same_factors, factors
from torch import Tensor
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import hlora
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty

BETA = 0.1
PAIRS = Dataset.from_dict(
    {
        "prompt": [f"What is {n} plus one?" for n in range(16)],
        "chosen": [f" It is {n + 1}." for n in range(16)],
        "rejected": [f" Who knows, {n} or more?" for n in range(16)],
    }
)


def dpo_trainer(model: PeftModel, model_dir: str, output: Path) -> DPOTrainer:
    options = arguments(output, DPOConfig, beta=BETA, gradient_checkpointing=False, max_grad_norm=0.0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return DPOTrainer(model=model, args=options, train_dataset=PAIRS, processing_class=tokenizer)


def log_probabilities(model: Any, batch: dict[str, Tensor]) -> Tensor:  # (2n,): n chosen, then n rejected
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (each * batch["completion_mask"][:, 1:]).sum(-1)


def plain_dpo(
    model: PeftModel,
    batches: list[dict[str, Tensor]],
    reference: PeftModel,
    at_reference: Callable[[], AbstractContextManager[None]],
    penalty: ImportancePenalty,
) -> list[float]:
    """DPO written out (Rafailov et al. 2023, Eq. 7), with the penalty in the loss; returns the DPO losses."""
    optimizer, losses = torch.optim.AdamW(adapter_parameters(model), lr=LR, weight_decay=0.0), []
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = LR * (1 - number / STEPS)
        with torch.no_grad(), at_reference():
            kept = log_probabilities(reference, batch)
        chosen, rejected = (log_probabilities(model, batch) - kept).chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        losses.append(loss.item())
        (loss + penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("way", ["protect", "load first"])
def test_dpo_is_a_plain_loop_with_the_reference_that_the_guide_says(
    peft_model: PeftModel, token_ids: Tensor, model_dir: str, tmp_path: Path, way: str
) -> None:
    importance: Importance = record(copy.deepcopy(peft_model), token_ids, "factored")
    other = copy.deepcopy(peft_model)
    importance.load_adapter_into(other)
    if way == "load first":
        importance.load_adapter_into(peft_model)
    trainer = dpo_trainer(peft_model, model_dir, tmp_path)
    hlora.protect(trainer, importance, phi=50.0)
    batches = [*trainer.get_train_dataloader()][:STEPS]
    trainer.train()
    penalty = ImportancePenalty(other, importance, phi=50.0)
    if way == "protect":  # the reference stays at the base model
        losses = plain_dpo(other, batches, other, other.disable_adapter, penalty)
        assert losses[0] != pytest.approx(math.log(2), abs=1e-4)
    else:  # the reference is the general adapter
        losses = plain_dpo(other, batches, copy.deepcopy(other), nullcontext, penalty)
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-4)  # Trainer rounds what it logs
    mine = {name: factor for name, factor in factors(peft_model).items() if ".ref." not in name}
    assert_same_factors(mine, factors(other), 1e-4)
