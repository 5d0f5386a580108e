"""LoRA on experts that a mixture keeps in one parameter: one matrix an expert, recorded, held, saved and loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import move_adapter, record
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.protect import ProtectCallback
from hlora.importance.recorder import ImportanceRecorder
from hlora.importance.squared_gradients import fisher_of_sequences
from hlora.model.adapters import AdaptedMatrix, adapted_matrices
from hlora.model.saved_adapter import load_adapter
from hlora.system.errors import AdapterError, ArtifactError

EXPERTS = 12  # two digits: expert 2 comes before expert 10
UNREACHED = "ignore:.*the general phase gave no importance"


def mixture(experts: int = EXPERTS) -> Qwen3MoeForCausalLM:
    """A random Qwen3-MoE of one layer; each token goes to two experts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "head_dim": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    chosen = {"num_experts": experts, "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=384, **sizes, **heads, **chosen))


def adapted(**options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(mixture(**options), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def of_experts(matrices: list[AdaptedMatrix]) -> list[AdaptedMatrix]:
    return [matrix for matrix in matrices if matrix.expert]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_each_expert_is_a_matrix_that_moves_as_peft_moves_it() -> None:
    model = adapted()
    move_adapter(model)
    experts = of_experts(adapted_matrices(model))
    which = ("gate_up_proj", "down_proj")
    names = {f"model.layers.0.mlp.experts.{parameter}[{e}]" for parameter in which for e in range(EXPERTS)}
    assert {matrix.name for matrix in experts} == names
    for matrix in experts:
        assert matrix.expert is not None
        added = matrix.module.get_delta_weight("default")[matrix.expert[0]]
        torch.testing.assert_close(matrix.scale * matrix.B @ matrix.A, added)
        base = matrix.module.get_param()[matrix.expert[0]].detach()
        assert matrix.base_sample()[0] == base.flatten()[0]
        assert matrix.base_square() == pytest.approx(float(base.square().sum()))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_experts_that_no_token_reached_stay_unprotected_and_are_named(token_ids: Tensor) -> None:
    rows = token_ids[:1, :4].repeat(16, 1)  # four tokens reach eight of the experts at most
    with pytest.warns(UserWarning, match=r"experts\.\w+_proj\[\d+\].* and \d+ more: the general phase gave no import"):
        importance = record(adapted(), rows)
    reached = {name for name, norm in importance.norms().items() if norm > 0}
    assert 2 * 2 <= sum("experts" in name for name in reached) <= 2 * 8


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning", UNREACHED)
@pytest.mark.parametrize("encoding", ["float32", "factored"])
def test_an_importance_of_experts_is_saved_loaded_and_held(token_ids: Tensor, tmp_path: Path, encoding: str) -> None:
    trained = adapted()
    importance = Importance.load(record(trained, token_ids, encoding).save(tmp_path / "importance"))
    plain = PeftModel.from_pretrained(mixture(), str(tmp_path / "importance"))  # an ordinary adapter
    checked = load_adapter(mixture(), tmp_path / "importance", rank=2)
    with torch.no_grad():
        expected, *others = (m.eval()(input_ids=token_ids).logits for m in (trained, plain, checked))
    for each in others:
        torch.testing.assert_close(each, expected, rtol=0, atol=0)

    model = adapted()
    penalty = ProtectCallback(importance, phi=3.0, phi_scale="paper", layer_weights="uniform").start(model)
    assert penalty.is_at_anchor() and penalty().item() == 0
    move_adapter(model)
    general = {n: m.scale * m.B.double() @ m.A.double() for n, m in importance.matrices.items()}
    expected_value = torch.zeros((), dtype=torch.float64)
    for matrix in penalty.matrices:  # dense, through PEFT's parameters
        omega = importance.matrices[matrix.name].omega
        omega = omega if isinstance(omega, Tensor) else omega.dense()
        delta = matrix.scale * matrix.B.double() @ matrix.A.double() - general[matrix.name]
        expected_value = expected_value + 3.0 * (omega.double() * delta**2).sum() / len(penalty.matrices)
    expected_value.backward()
    gradients = [parameter.grad for parameter in parameters(model)]
    assert penalty().item() == pytest.approx(expected_value.item(), rel=1e-5)
    for add in (lambda: penalty().backward(), penalty.add_gradients_):
        model.zero_grad()
        add()
        for parameter, gradient in zip(parameters(model), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning", UNREACHED)
def test_factors_of_another_number_of_experts_are_refused(token_ids: Tensor, tmp_path: Path) -> None:
    record(adapted(), token_ids).save(tmp_path / "importance")
    model = adapted(experts=EXPERTS - 4)
    with pytest.raises(ArtifactError, match=r"has 'model\.layers\.0\.mlp\.experts\.\w+\[8\]' and \d+ more"):
        ImportancePenalty(model, str(tmp_path / "importance"), 1.0)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_squared_gradients_of_experts_are_refused_with_what_to_do(token_ids: Tensor) -> None:
    for refused in (
        lambda: ImportanceRecorder(adapted(), method="squared_gradients"),
        lambda: fisher_of_sequences(adapted(), token_ids, 0),
    ):
        with pytest.raises(AdapterError, match=r"mlp\.\S+: squared gradients .* Record by method path_integral, or"):
            refused()


def test_attention_alone_of_a_mixture_needs_no_experts() -> None:
    attention = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    found = adapted_matrices(get_peft_model(mixture(), attention))
    assert len(found) == 4 and not of_experts(found)


def test_no_warning_where_every_matrix_is_reached(peft_model: PeftModel, token_ids: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(peft_model, token_ids)
