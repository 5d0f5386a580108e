"""φ·L_reg: its value and gradients against the equations under autograd, layer weights, and the unit of φ."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import move_adapter, record
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from hlora.importance.artefact import Importance
from hlora.importance.layer_weights import layer_coefficients
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.protect import protect
from hlora.importance.squared_gradients import fisher_of_sequences
from hlora.numerics import encodings, equations
from hlora.numerics.encodings import ENCODINGS
from hlora.system.errors import AdapterError, ArtifactError


def dense(omega: encodings.Encoded) -> Tensor:
    return (omega if isinstance(omega, Tensor) else omega.dense()).double()


def by_the_equations(
    penalty: ImportancePenalty, importance: Importance, weights: dict[str, float], phi: float
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """φ·L_reg of Eqs. 14–16 and its gradients by autograd, in float64, with Ω and the anchor dense."""
    factors, penalties = {}, []
    for m in penalty.matrices:
        matrix = importance.matrices[m.name]
        A, B = m.A.detach().double().requires_grad_(), m.B.detach().double().requires_grad_()
        theta_nu = matrix.scale * matrix.B.double() @ matrix.A.double()
        penalties.append(equations.layer_penalty(dense(matrix.omega), m.scale * B @ A, theta_nu))
        factors[m.name] = (A, B)
    c = torch.tensor([weights[m.name] for m in penalty.matrices], dtype=torch.float64)
    value = equations.total_loss(
        torch.zeros((), dtype=torch.float64), equations.regularisation(c, torch.stack(penalties)), phi
    )
    value.backward()
    return value.detach(), {name: (A.grad, B.grad) for name, (A, B) in factors.items()}  # type: ignore[misc]


def assert_gradients(penalty: ImportancePenalty, expected: dict[str, tuple[Tensor, Tensor]]) -> None:
    for m in penalty.matrices:
        for factor, gradient in zip((m.A, m.B), expected[m.name], strict=True):
            assert factor.grad is not None
            assert gradient.any()
            torch.testing.assert_close(
                factor.grad.double(), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
            )


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["softmax", "norm_share", "uniform", "sum", "root"])
def test_value_and_gradients_of_the_callable_equal_the_equations(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, kind: str
) -> None:
    importance = record(peft_model, token_ids, encoding)
    penalty = ImportancePenalty(peft_model, importance, phi=7.0, layer_weights=kind, phi_scale="paper")
    move_adapter(peft_model)
    norms = torch.tensor([float(dense(m.omega).norm()) for m in importance.matrices.values()], dtype=torch.float64)
    c = dict(zip(importance.matrices, equations.layer_weights(norms, kind).tolist(), strict=True))
    assert penalty.coefficients == pytest.approx(c, rel=1e-5)
    expected, gradients = by_the_equations(penalty, importance, c, phi=7.0)
    value = penalty()
    assert value.item() == pytest.approx(float(expected), rel=1e-4)
    value.backward()
    assert_gradients(penalty, gradients)


def test_callable_in_a_loss_adds_its_gradient_to_that_of_the_task(peft_model: PeftModel, token_ids: Tensor) -> None:
    importance = record(peft_model, token_ids)
    penalty = ImportancePenalty(peft_model, importance, phi=2.0)
    move_adapter(peft_model)
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    task = torch.autograd.grad(peft_model(input_ids=token_ids, labels=token_ids).loss, parameters)
    pull = torch.autograd.grad(penalty(), parameters)
    loss = peft_model(input_ids=token_ids, labels=token_ids).loss + 3 * penalty()
    for total, one, two in zip(torch.autograd.grad(loss, parameters), task, pull, strict=True):
        torch.testing.assert_close(total, one + 3 * two)


def test_gradients_of_the_callable_are_the_slopes_of_its_value_in_float64(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    importance = record(peft_model, token_ids, "factored")
    penalty = ImportancePenalty(peft_model.double(), importance, phi=1.5)
    move_adapter(peft_model)
    m = penalty.matrices[0]
    value = penalty()
    grad_A, grad_B = torch.autograd.grad(value, (m.A, m.B))
    for factor, gradient in ((m.A, grad_A), (m.B, grad_B)):
        for index in [(0, 0), (1, 3), (3, 2)]:
            ends = []
            for shift in (1e-6, -1e-6):
                with torch.no_grad():
                    factor[index] += shift
                    ends.append(penalty().item())
                    factor[index] -= shift
            assert float(gradient[index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_add_gradients_equals_backward_through_the_callable(
    peft_model: PeftModel, token_ids: Tensor, encoding: str
) -> None:
    penalty = ImportancePenalty(peft_model, record(peft_model, token_ids, encoding), phi=3.0)
    move_adapter(peft_model)
    penalty().backward()
    expected = {m.name: (m.A.grad.clone(), m.B.grad.clone()) for m in penalty.matrices}  # type: ignore[union-attr]
    peft_model.zero_grad()
    regularisation = penalty.add_gradients_()
    for m in penalty.matrices:
        assert torch.equal(m.A.grad, expected[m.name][0])
        assert torch.equal(m.B.grad, expected[m.name][1])
    assert penalty().item() == pytest.approx(3.0 * float(regularisation), rel=1e-6)
    assert float(penalty.regularisation_loss()) == float(regularisation)
    penalty.add_gradients_()
    for m in penalty.matrices:
        assert torch.equal(m.A.grad, 2 * expected[m.name][0])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("anchor", ["general", "base"])
def test_the_penalty_never_waits_for_the_device(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, anchor: str
) -> None:
    """On a device whose numbers cannot be read: whatever asks for one, as a branch on it does, is an error there."""
    importance = record(peft_model, token_ids, encoding)
    penalty = ImportancePenalty(peft_model.to("meta"), importance, phi=3.0, anchor=anchor)
    there = {part.device.type for omega in penalty._omega.values() for part in encodings.parts(omega).values()}
    assert there == {"meta"}
    for _ in range(2):  # without gradients there, and onto gradients
        value = penalty.add_gradients_()
    penalty().backward()
    assert value.is_meta and all(m.A.grad.is_meta and m.B.grad.is_meta for m in penalty.matrices)
    with pytest.raises(RuntimeError, match="meta"):
        float(value)  # the measure sees what reads a number


def test_a_frozen_factor_gets_no_gradient(peft_model: PeftModel, token_ids: Tensor) -> None:
    penalty = ImportancePenalty(peft_model, record(peft_model, token_ids), phi=3.0)
    move_adapter(peft_model)
    for m in penalty.matrices:
        m.A.requires_grad_(False)
    penalty.add_gradients_()
    assert all(m.A.grad is None and m.B.grad is not None for m in penalty.matrices)


def test_gradients_of_bfloat16_factors_are_bfloat16(peft_model: PeftModel, token_ids: Tensor) -> None:
    importance = record(peft_model, token_ids)
    penalty = ImportancePenalty(peft_model, importance, phi=3.0, phi_scale="paper")
    peft_model.to(torch.bfloat16)
    move_adapter(peft_model)
    _, gradients = by_the_equations(penalty, importance, penalty.coefficients, phi=3.0)
    penalty().backward()
    for m in penalty.matrices:
        for factor, gradient in zip((m.A, m.B), gradients[m.name], strict=True):
            assert factor.grad.dtype == torch.bfloat16
            torch.testing.assert_close(
                factor.grad.double(), gradient, rtol=2**-8, atol=1e-5 * float(gradient.abs().max())
            )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_penalty_is_zero_at_the_general_adapter(peft_model: PeftModel, token_ids: Tensor, encoding: str) -> None:
    penalty = ImportancePenalty(peft_model, record(peft_model, token_ids, encoding), phi=9.0)
    assert penalty().item() == 0.0
    penalty.add_gradients_()
    assert not any(m.A.grad.any() or m.B.grad.any() for m in penalty.matrices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_penalty_inside_autocast_is_the_penalty_outside(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, dtype: torch.dtype
) -> None:
    """In half precision a factored one was 72 % off at such an Ω."""
    importance = record(peft_model, token_ids, encoding)
    for m in importance.matrices.values():
        for part in encodings.parts(m.omega).values():
            part.mul_(1e-4 / float(part.max()))
    penalty = ImportancePenalty(peft_model, importance, phi=7.0, phi_scale="paper")
    move_adapter(peft_model)
    outside = torch.autograd.grad(value := penalty(), [f for m in penalty.matrices for f in (m.A, m.B)])
    with torch.autocast("cpu", dtype):
        inside = torch.autograd.grad(again := penalty(), [f for m in penalty.matrices for f in (m.A, m.B)])
    assert value.item() == again.item() > 0
    assert all(torch.equal(mine, other) for mine, other in zip(inside, outside, strict=True))


# The unit of φ


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["softmax", "norm_share", "uniform", "root"])
@pytest.mark.parametrize("xi", [1e-2, 1e-6])
@pytest.mark.filterwarnings("ignore:.*of the layer weights")
def test_undoing_the_general_phase_costs_a_relative_phi_exactly(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, kind: str, xi: float
) -> None:
    move_adapter(peft_model)
    start = copy.deepcopy(peft_model.state_dict())
    importance = record(peft_model, token_ids, encoding, xi=xi)
    penalty = ImportancePenalty(peft_model, importance, phi=9.0, layer_weights=kind)
    peft_model.load_state_dict(start)
    assert penalty().item() == pytest.approx(9.0, rel=1e-4)


def test_relative_phi_is_the_paper_phi_times_the_cost_of_undoing(peft_model: PeftModel, token_ids: Tensor) -> None:
    importance = record(peft_model, token_ids)
    relative = ImportancePenalty(peft_model, importance, phi=9.0)
    cost = sum(relative.coefficients[name] * m.undo_cost for name, m in importance.matrices.items())
    paper = ImportancePenalty(peft_model, importance, phi=9.0 / cost, phi_scale="paper")
    move_adapter(peft_model)
    assert relative().item() == pytest.approx(paper().item(), rel=1e-6)


def nothing(importance: Importance) -> Importance:
    matrices = {
        name: replace(m, omega=torch.zeros_like(m.omega), undo_cost=0.0)  # type: ignore[arg-type]
        for name, m in importance.matrices.items()
    }
    return replace(importance, matrices=matrices)


def test_a_relative_phi_on_zero_importance_is_refused(peft_model: PeftModel, token_ids: Tensor) -> None:
    zero = nothing(record(peft_model, token_ids))
    with pytest.raises(ArtifactError, match="relative phi has no unit"):
        ImportancePenalty(peft_model, zero, phi=9.0)
    with pytest.raises(ArtifactError, match="no norm shares"):
        ImportancePenalty(peft_model, zero, phi=9.0, layer_weights="norm_share", phi_scale="paper")
    assert ImportancePenalty(peft_model, zero, phi=9.0, phi_scale="paper")().item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phi": -1.0}, "phi: expected a finite weight of at least 0, got -1.0"),
        ({"phi": float("nan")}, "phi: expected a finite weight of at least 0, got nan"),
        ({"phi": 1.0, "phi_scale": "absolute"}, "phi_scale: expected relative or paper, got 'absolute'"),
        ({"phi": 1.0, "group": "head"}, "group: expected matrix or block, got 'head'"),
        ({"phi": 1.0, "layer_weights": "mean"}, "expected softmax, norm_share, uniform, sum or root, got 'mean'"),
    ],
)
def test_wrong_options_are_refused_with_the_valid_ones(
    peft_model: PeftModel, token_ids: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ImportancePenalty(peft_model, record(peft_model, token_ids), **options)


# Layer weights


def with_norms(importance: Importance, norms: list[float]) -> Importance:
    matrices = {
        name: replace(m, omega=norm * m.omega / m.omega.norm())  # type: ignore[union-attr, operator, arg-type]
        for (name, m), norm in zip(importance.matrices.items(), norms, strict=True)
    }
    return replace(importance, matrices=matrices)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("softmax", [0.0320586, 0.0871443, 0.2368828, 0.6439143]),
        ("norm_share", [0.1, 0.2, 0.3, 0.4]),
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_layer_weights_per_matrix(peft_model: PeftModel, token_ids: Tensor, kind: str, expected: list[float]) -> None:
    importance = with_norms(record(peft_model, token_ids), [1.0, 2.0, 3.0, 4.0])
    weights = layer_coefficients(importance, kind)
    assert list(weights) == list(importance.matrices)
    assert list(weights.values()) == pytest.approx(expected, rel=1e-5)
    assert sum(weights.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("softmax", [0.2689414, 0.7310586]), ("norm_share", [5 / 11, 6 / 11]), ("uniform", [0.5, 0.5])],
)
def test_layer_weights_per_block_come_from_the_norm_over_the_whole_block(
    peft_model: PeftModel, token_ids: Tensor, kind: str, expected: list[float]
) -> None:
    importance = with_norms(record(peft_model, token_ids), [3.0, 4.0, 6.0, 0.0])  # blocks 5 and 6
    weights = list(layer_coefficients(importance, kind, "block").values())
    assert weights == pytest.approx([expected[0]] * 2 + [expected[1]] * 2, rel=1e-5)


def test_blocks_of_different_towers_are_different_blocks(peft_model: PeftModel, token_ids: Tensor) -> None:
    """T5's encoder and decoder, a vision tower and its language model, count their blocks from 0 each."""
    importance = with_norms(record(peft_model, token_ids), [1.0, 2.0, 3.0, 4.0])
    names = ["encoder.block.0.q", "encoder.block.0.v", "decoder.block.0.q", "lm_head"]
    renamed = replace(importance, matrices=dict(zip(names, importance.matrices.values(), strict=True)))
    weights = layer_coefficients(renamed, "norm_share", "block")
    norms = [5**0.5, 5**0.5, 3.0, 4.0]
    assert list(weights.values()) == pytest.approx([norm / (5**0.5 + 7) for norm in norms], rel=1e-5)


def test_a_penalty_per_block_equals_the_equations(peft_model: PeftModel, token_ids: Tensor) -> None:
    importance = record(peft_model, token_ids)
    penalty = ImportancePenalty(peft_model, importance, phi=7.0, phi_scale="paper", group="block")
    move_adapter(peft_model)
    squares = [float(dense(m.omega).norm()) ** 2 for m in importance.matrices.values()]
    norms = torch.tensor([squares[0] + squares[1], squares[2] + squares[3]], dtype=torch.float64).sqrt()
    block = equations.layer_weights(norms, "softmax").tolist()
    weights = dict(zip(importance.matrices, (block[0], block[0], block[1], block[1]), strict=True))
    expected, _ = by_the_equations(penalty, importance, weights, phi=7.0)
    assert penalty().item() == pytest.approx(float(expected), rel=1e-4)


def test_one_coefficient_above_nine_tenths_is_warned_of_by_name(peft_model: PeftModel, token_ids: Tensor) -> None:
    importance = with_norms(record(peft_model, token_ids), [1.0, 9.0, 1.0, 1.0])
    with pytest.warns(UserWarning, match=r"layers\.0\.self_attn\.v_proj takes 0\.999 of the layer weights.*norm_share"):
        ImportancePenalty(peft_model, importance, phi=1.0)


def test_no_warning_below_nine_tenths_or_with_one_block_alone(peft_model: PeftModel, token_ids: Tensor) -> None:
    importance = with_norms(record(peft_model, token_ids), [1.0, 2.0, 3.0, 4.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_coefficients(importance)
        first = dict(list(importance.matrices.items())[:1])
        assert list(layer_coefficients(replace(importance, matrices=first)).values()) == [1.0]


def test_importance_of_another_adapter_is_refused(peft_model: PeftModel, token_ids: Tensor) -> None:
    importance = record(peft_model, token_ids)
    part = replace(importance, matrices=dict(list(importance.matrices.items())[:-1]))
    with pytest.raises(ArtifactError, match=r"the model's adapter has 'model\.layers\.1\.self_attn\.v_proj'"):
        ImportancePenalty(peft_model, part, phi=1.0)


def test_a_loop_under_the_penalty_stays_closer_to_the_general_adapter(peft_model: PeftModel, token_ids: Tensor) -> None:
    importance = record(peft_model, token_ids)
    other = copy.deepcopy(peft_model)
    distance = {}
    for phi, model in ((0.0, other), (100.0, peft_model)):
        penalty = ImportancePenalty(model, importance, phi=phi)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(8):
            rows = token_ids[8:]
            (model(input_ids=rows, labels=rows).loss + penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
        distance[phi] = float(penalty.regularisation_loss())
    assert 0 < distance[100.0] < 0.5 * distance[0.0]


# The anchor


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj"]])
def test_anchor_base_penalises_the_adapter_itself_at_any_rank_on_covered_matrices(
    model_dir: str, peft_model: PeftModel, token_ids: Tensor, encoding: str, targets: list[str]
) -> None:
    importance = record(peft_model, token_ids, encoding)
    torch.manual_seed(4)
    config = LoraConfig(r=3, lora_alpha=9, target_modules=targets)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config)
    penalty = ImportancePenalty(model, importance, 7.0, layer_weights="uniform", phi_scale="paper", anchor="base")
    assert penalty().item() == 0.0
    move_adapter(model)
    covered = [m.name for m in penalty.matrices]
    at_base = {
        n: replace(m, A=torch.zeros(3, m.A.shape[1]), B=torch.zeros(m.B.shape[0], 3))
        for n, m in importance.matrices.items()
        if n in covered
    }
    weights = {name: 1 / len(covered) for name in covered}
    expected, gradients = by_the_equations(penalty, replace(importance, matrices=at_base), weights, phi=7.0)
    value = penalty()
    assert value.item() == pytest.approx(float(expected), rel=1e-4)
    value.backward()
    assert_gradients(penalty, gradients)


def test_anchor_base_counts_layer_weights_and_unit_over_the_covered_matrices_alone(
    model_dir: str, peft_model: PeftModel, token_ids: Tensor
) -> None:
    importance = record(peft_model, token_ids)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), LoraConfig(r=2, target_modules=["q_proj"]))
    penalty = ImportancePenalty(model, importance, 1.0, layer_weights="norm_share", anchor="base")
    kept = {name: m for name, m in importance.matrices.items() if name.endswith("q_proj")}
    norms = {name: importance.norms()[name] for name in kept}
    assert penalty.coefficients == pytest.approx({name: norm / sum(norms.values()) for name, norm in norms.items()})
    assert penalty.unit == pytest.approx(sum(penalty.coefficients[n] * m.undo_cost for n, m in kept.items()))


def test_a_matrix_that_the_importance_does_not_cover_is_refused_by_name(
    model_dir: str, peft_model: PeftModel, token_ids: Tensor
) -> None:
    importance = record(peft_model, token_ids)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config)
    with pytest.raises(ArtifactError, match=r"0\.mlp\.down_proj', which .* \(it covers q_proj, v_proj\)"):
        ImportancePenalty(model, importance, 1.0, anchor="base")
    with pytest.raises(ValueError, match="anchor: expected general or base, got 'nu'"):
        ImportancePenalty(peft_model, importance, 1.0, anchor="nu")


def test_a_relative_phi_on_squared_gradients_is_per_nat_of_expected_forgetting(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    importance = fisher_of_sequences(peft_model, token_ids, 0, encoding="factored", labels="text")
    assert importance.describe()["anchors"] == ["base"]
    plain = ImportancePenalty(peft_model, importance, 5.0, layer_weights="sum", phi_scale="paper", anchor="base")
    relative = ImportancePenalty(peft_model, importance, 5.0, layer_weights="sum", anchor="base")
    move_adapter(peft_model)
    assert relative().item() == pytest.approx(plain().item() / 2, rel=1e-5)
    assert plain().item() > 0
    weighted = ImportancePenalty(peft_model, importance, 5.0, layer_weights="norm_share", anchor="base")
    # a move alike in all elements costs c·trace of each matrix: the same in sum as without layer weights
    traces = {name: float(encodings.total(m.omega)) for name, m in importance.matrices.items()}
    cost = sum(weighted.coefficients[name] * trace for name, trace in traces.items()) / weighted.unit
    assert cost == pytest.approx(sum(traces.values()) / 2, rel=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_penalty_follows_a_model_that_is_moved_after_it_was_made(
    peft_model: PeftModel, token_ids: Tensor, encoding: str
) -> None:
    """As Trainer moves one to its GPU. The meta device stands in for it: it refuses a CPU tensor in a computation."""
    penalty = ImportancePenalty(peft_model, record(peft_model, token_ids, encoding), phi=2.0)
    peft_model.to("meta")
    assert penalty.add_gradients_().is_meta
    assert all(m.A.grad.is_meta and m.B.grad.is_meta for m in penalty.matrices)


def test_a_penalty_takes_a_directory_and_reads_in_one_line(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    importance = record(peft_model, token_ids)
    importance.save(tmp_path / "importance")
    assert repr(importance) == f"Importance(4 matrices, float32, {importance.nbytes():,} bytes, path_integral)"
    penalty = ImportancePenalty(peft_model, tmp_path / "importance", phi=2.0)
    assert repr(penalty) == "ImportancePenalty(phi=2, 4 matrices, anchor='general')"
    assert penalty().item() == ImportancePenalty(peft_model, importance, phi=2.0)().item()


def test_the_wrong_kind_of_thing_is_named(peft_model: PeftModel, token_ids: Tensor) -> None:
    importance = record(peft_model, token_ids)
    with pytest.raises(ArtifactError, match="expected an Importance, a directory or a hub repository, got Tensor"):
        ImportancePenalty(peft_model, token_ids, phi=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="phi: expected a finite weight of at least 0, got 'strong'"):
        ImportancePenalty(peft_model, importance, phi="strong")  # type: ignore[arg-type]
    with pytest.raises(
        AdapterError, match=r"trainer: expected a transformers.Trainer .* got PeftModel.*ImportancePenalty"
    ):
        protect(peft_model, importance, phi=1.0)  # type: ignore[arg-type]
