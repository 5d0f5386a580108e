"""Which adapter is the base model: sBA of the initialisation, not B = 0."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import move_adapter, record
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor
from transformers import LlamaForCausalLM

from hlora.budget.budget import ForgettingBudget
from hlora.budget.probes import SampleProbe
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.squared_gradients import fisher_of_sequences
from hlora.model.adapters import adapted_matrices
from hlora.model.initialisation import initialisation, is_at_base
from hlora.system.errors import AdapterError, ArtifactError

AT_BASE = [True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]
IN_ADAPTER = ["pissa", "olora"]


def begun(model_dir: str, how: Any, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(model_dir, dtype=dtype)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=how, task_type="CAUSAL_LM", **options
    )
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def step(model: PeftModel, token_ids: Tensor, lr: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    optimizer.step()
    model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", AT_BASE)
def test_a_fresh_adapter_is_the_base_model_and_a_trained_one_is_not(
    model_dir: str, token_ids: Tensor, how: Any, dtype: torch.dtype
) -> None:
    model = begun(model_dir, how, dtype)
    if dtype == torch.float32:  # the logits say so too
        plain = LlamaForCausalLM.from_pretrained(model_dir)
        torch.testing.assert_close(model(token_ids).logits, plain(token_ids).logits, rtol=1e-3, atol=1e-4)
    assert all(is_at_base(matrix) for matrix in adapted_matrices(model))
    for _ in range(3):
        step(model, token_ids, 1e-3 if dtype == torch.float32 else 2e-2)
    assert not any(is_at_base(matrix) for matrix in adapted_matrices(model))


def test_random_factors_are_not_the_base_model(model_dir: str) -> None:
    assert not any(is_at_base(matrix) for matrix in adapted_matrices(begun(model_dir, False)))


def test_the_initialisation_is_found_inside_another_model(model_dir: str) -> None:
    inside = torch.nn.ModuleDict({"policy": begun(model_dir, "pissa_niter_4")})
    assert initialisation(inside, "default") == "pissa"
    assert initialisation(inside, "another") == ""
    assert initialisation(begun(model_dir, True), "default") == ""


# The anchor base


@pytest.mark.parametrize("how", IN_ADAPTER)
def test_the_base_model_costs_nothing_under_the_anchor_base_and_the_residual_does(
    model_dir: str, token_ids: Tensor, how: str
) -> None:
    importance = record(begun(model_dir, how), token_ids)
    model = begun(model_dir, how)
    penalty = ImportancePenalty(model, importance, phi=3.0, layer_weights="uniform", phi_scale="paper", anchor="base")
    fresh = {m.name: (m.A.detach().clone(), m.B.detach().clone()) for m in penalty.matrices}
    assert penalty().item() == 0.0
    step(model, token_ids, 1e-2)
    expected = 0.0
    for m in penalty.matrices:
        A, B = fresh[m.name]
        moved = m.scale * (m.B @ m.A - B @ A).detach().double()
        expected += 3.0 / len(fresh) * float((importance.matrices[m.name].omega.double() * moved**2).sum())
    assert penalty().item() == pytest.approx(expected, rel=1e-3)
    with torch.no_grad():
        for m in penalty.matrices:
            m.B.zero_()
    assert penalty().item() > 5 * expected  # at the residual matrices, where the penalty once was 0


@pytest.mark.parametrize("how", IN_ADAPTER)
def test_the_anchor_base_of_a_trained_adapter_that_held_the_base_is_refused(
    model_dir: str, token_ids: Tensor, how: str
) -> None:
    model = begun(model_dir, how)
    importance = record(model, token_ids)
    with pytest.raises(AdapterError, match=rf"q_proj: .*initialised by {how}.*Make the penalty before training"):
        ImportancePenalty(model, importance, phi=1.0, anchor="base")


def test_importance_of_plain_lora_on_pissa_is_refused_with_the_initialisation(
    model_dir: str, token_ids: Tensor
) -> None:
    importance = record(begun(model_dir, True), token_ids)
    with pytest.raises(ArtifactError, match="base weights are not those"):
        ImportancePenalty(begun(model_dir, "pissa"), importance, phi=1.0, anchor="base")


@pytest.mark.parametrize("how", IN_ADAPTER)
def test_what_takes_the_model_without_its_adapter_for_the_base_is_refused(
    model_dir: str, token_ids: Tensor, how: str
) -> None:
    model = begun(model_dir, how)
    with pytest.raises(AdapterError, match=rf"the model with its adapter off.*{how}"):
        fisher_of_sequences(model, token_ids, 0)
    penalty = ImportancePenalty(model, record(copy.deepcopy(model), token_ids), phi=1.0)
    with pytest.raises(AdapterError, match=rf"the model with its adapter off.*{how}"):
        ForgettingBudget(penalty, SampleProbe(model, token_ids), 0.01)


def test_corda_is_refused_since_no_adapter_carries_its_base(model_dir: str, token_ids: Tensor) -> None:
    base = LlamaForCausalLM.from_pretrained(model_dir)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )
    preprocess_corda(base, config, run_model=lambda: base(token_ids[:1]))
    with pytest.raises(AdapterError, match="CorDA has changed its base weight, and no adapter file carries the change"):
        adapted_matrices(get_peft_model(base, config))


def test_general_factors_are_not_taken_for_fresh_ones(model_dir: str) -> None:
    model = begun(model_dir, "pissa")
    move_adapter(model)
    assert not any(is_at_base(matrix) for matrix in adapted_matrices(model))
