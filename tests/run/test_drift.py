"""How far a tuned model has drifted from the base model and from the general phase, and what is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import GENERAL_TEXT, move_adapter, record
from peft import LoraConfig, OSFConfig, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from hlora.config.sections import EvaluationConfig
from hlora.data.domain import DomainRows
from hlora.data.example import Example
from hlora.evaluation.likelihood import text_likelihood
from hlora.importance.artefact import Importance
from hlora.model.adapters import adapted_matrices
from hlora.run.drift import measure_with_drift, references_of
from hlora.run.kept_predictions import KeptPredictions

SETTINGS = EvaluationConfig(max_tokens=130, window=48, stride=24, batch_size=2)


def dense_kl(before: Any, after: Any, model_dir: str) -> tuple[float, int]:
    """Mean KL(before ‖ after) in float64, window by window: the first one whole, then the last 24 tokens of each."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(model_dir)(GENERAL_TEXT)["input_ids"][:130])
    total, count, scored = 0.0, 0, 1
    with torch.no_grad():
        while scored < len(ids):
            end = 48 if scored == 1 else min(scored + 24, len(ids))
            p, q = (
                model(input_ids=ids[None, end - 48 : end]).logits[0, :-1].double().log_softmax(-1)
                for model in (before, after)
            )
            total += float((p.exp() * (p - q)).sum(-1)[scored - end :].sum())
            count += end - scored
            scored = end
    return total / count, count


def tuned(peft_model: Any, token_ids: Tensor) -> tuple[Any, Importance]:
    """A model tuned after a general phase, both by a large step so that they differ."""
    move_adapter(peft_model, seed=1)
    importance = record(peft_model, token_ids)
    move_adapter(peft_model, seed=2)
    return peft_model.eval(), importance


def test_drift_is_the_dense_divergence_from_the_base_model_and_from_the_general_phase(
    peft_model: Any, token_ids: Tensor, model_dir: str
) -> None:
    model, importance = tuned(peft_model, token_ids)
    base, general = LlamaForCausalLM.from_pretrained(model_dir).eval(), copy.deepcopy(model)
    importance.load_adapter_into(general)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    references, left_out = references_of(model, importance, base_changed=False)
    found = text_likelihood(
        model, AutoTokenizer.from_pretrained(model_dir), GENERAL_TEXT, SETTINGS, references=references
    )
    for name, other in (("from_base", base), ("from_general", general)):
        expected, count = dense_kl(other, model, model_dir)
        assert found[f"kl_{name}"] == pytest.approx(expected, rel=1e-4) and expected > 1e-3
        assert found["tokens"] == count == 129 and len(found[f"kl_{name}_each"]) == len(found["nll_each"]) == 3
        assert found[f"kl_{name}_stderr"] > 0
    assert left_out == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trained == [parameter.requires_grad for parameter in model.parameters()]


def test_a_frozen_adapter_is_still_frozen_after_its_drift_was_measured(peft_model: Any, token_ids: Tensor) -> None:
    model, importance = tuned(peft_model, token_ids)
    model.requires_grad_(False)
    for reference in references_of(model, importance, base_changed=False)[0].values():
        reference([token_ids[0]], [1])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_importance_without_a_general_phase_gives_the_drift_from_the_base_model_alone(
    peft_model: Any, token_ids: Tensor
) -> None:
    model, importance = tuned(peft_model, token_ids)
    importance.provenance.pop("steps", None)
    importance.provenance["method"] = "squared_gradients"
    assert [*references_of(model, importance, base_changed=False)[0]] == ["from_base"]
    assert [*references_of(model, None, base_changed=False)[0]] == ["from_base"]


def test_what_cannot_be_measured_is_left_out_with_a_reason(peft_model: Any, token_ids: Tensor, model_dir: str) -> None:
    model, importance = tuned(peft_model, token_ids)
    assert references_of(LlamaForCausalLM.from_pretrained(model_dir), None, base_changed=False) == ({}, {})

    references, left_out = references_of(model, importance, base_changed=True)
    assert references == {} and "changes the base model's weights" in left_out["from_base"]

    plain = LlamaForCausalLM.from_pretrained(model_dir)
    osf = get_peft_model(plain, OSFConfig(effective_rank=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    references, left_out = references_of(osf, None, base_changed=False)
    assert references == {} and "changes the base model's weights" in left_out["from_base"]

    plain = LlamaForCausalLM.from_pretrained(model_dir)
    other = get_peft_model(plain, LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    references, left_out = references_of(other, importance, base_changed=False)
    assert [*references] == ["from_base"] and "up_proj" in left_out["from_general"]
    assert {matrix.name.rsplit(".", 1)[-1] for matrix in adapted_matrices(other)} == {"up_proj"}


def test_a_job_that_keeps_predictions_measures_the_drift_from_each_general_phase(
    peft_model: Any, token_ids: Tensor, model_dir: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = DomainRows([], [Example("a question", "an answer")], [])
    general = SimpleNamespace(evaluation={"text": GENERAL_TEXT})
    predictions = KeptPredictions()
    for seed in (1, 3, 1):  # another general phase, and the first one again
        move_adapter(peft_model, seed=seed)
        importance = record(peft_model, token_ids)
        move_adapter(peft_model, seed=seed + 1)
        for _ in range(2):
            job: Any = SimpleNamespace(tokenizer=tokenizer, general=general, domain=rows, predictions=predictions)
            found = measure_with_drift(job, peft_model.eval(), SETTINGS, importance, base_changed=False)
            references, _ = references_of(peft_model, importance, base_changed=False)
            plain = text_likelihood(peft_model, tokenizer, GENERAL_TEXT, SETTINGS, references=references)
            assert found["texts"]["text"] == plain
