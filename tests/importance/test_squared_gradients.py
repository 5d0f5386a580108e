"""The Fisher information against one backward pass an example, against the KL divergence, and its edges."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import GENERAL_TEXT, move_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hlora.data.packing import pack
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.squared_gradients import add_squares_, fisher_information, fisher_of_sequences, whole_model_bytes
from hlora.model.adapters import adapted_matrices
from hlora.numerics import equations
from hlora.numerics.encodings import ENCODINGS, Factored
from hlora.system.errors import AdapterError, DataError

SEED = 5


@pytest.fixture
def exact_model(model_dir: str) -> PeftModel:
    """The tiny Llama in float64; q_proj is 32×32, v_proj 16×32, down_proj 32×64."""
    torch.manual_seed(1)
    base = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    return get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    ).double()


def sampled_labels(logits: Tensor, uniform: Tensor) -> list[int]:
    """The first label at which the cumulative probability exceeds the draw, position by position."""
    rows = (list(accumulate(row)) for row in logits.softmax(-1).tolist())
    return [bisect_right(row, draw * row[-1]) for row, draw in zip(rows, uniform.tolist(), strict=True)]


def fisher_by_one_backward_an_example(model_dir: str, names: list[str], sequences: Tensor) -> dict[str, Tensor]:
    base = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    weights = [base.get_submodule(name).weight for name in names]
    total = [torch.zeros_like(weight) for weight in weights]
    predicted = sequences.shape[1] - 1
    uniform = torch.rand(len(sequences), predicted, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    for sequence, draws in zip(sequences, uniform, strict=True):
        logits = base(input_ids=sequence[None]).logits[0, :-1]
        labels = sampled_labels(logits.detach(), draws)
        likelihood = logits.log_softmax(-1)[range(predicted), labels].sum()
        for i, gradient in enumerate(torch.autograd.grad(likelihood, weights)):
            total[i] += gradient**2
    return {name: t / (len(sequences) * predicted) for name, t in zip(names, total, strict=True)}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_fisher_equals_one_backward_pass_an_example_at_any_batch_size(
    exact_model: PeftModel, model_dir: str, token_ids: Tensor, batch_size: int
) -> None:
    sequences = token_ids[:7]
    importance = fisher_of_sequences(exact_model, sequences, SEED, batch_size=batch_size)
    expected = fisher_by_one_backward_an_example(model_dir, list(importance.matrices), sequences)
    assert len(expected) == 6
    for name, fisher in expected.items():
        omega = importance.matrices[name].omega
        assert isinstance(omega, Tensor) and omega.dtype == torch.float64 and fisher.min() > 0
        torch.testing.assert_close(omega, fisher, rtol=1e-9, atol=0)


def test_half_the_fisher_penalty_is_the_kl_divergence_of_a_small_change(model_dir: str) -> None:
    """One element of W changed by δ: KL(p ‖ p_δ) → ½ F δ² nats a token, F over many samplings of one sequence."""
    base = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    sequence = torch.randint(3, 384, (1, 10), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = base(input_ids=sequence).logits[0, :-1].log_softmax(-1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[1])).double()
    ((name, matrix),) = fisher_of_sequences(model, sequence.repeat(4000, 1), SEED, batch_size=500).matrices.items()
    assert isinstance(matrix.omega, Tensor)
    row, column = divmod(int(matrix.omega.argmax()), matrix.omega.shape[1])
    weight = model.get_base_model().get_submodule(name).get_base_layer().weight
    change = 1e-3
    with torch.no_grad():
        weight[row, column] += change
        after = base(input_ids=sequence).logits[0, :-1].log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.5 * float(matrix.omega[row, column]) * change**2 == pytest.approx(divergence, rel=0.1)


def test_penalty_with_plain_sum_is_lambda_times_fisher_times_the_squared_update(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    importance = fisher_of_sequences(peft_model, token_ids, SEED)
    penalty = ImportancePenalty(peft_model, importance, phi=3.0, layer_weights="sum", phi_scale="paper")
    assert penalty().item() == 0.0
    move_adapter(peft_model)
    expected = 0.0
    for matrix in adapted_matrices(peft_model):
        update = matrix.scale * matrix.B.detach() @ matrix.A.detach()
        expected += 3.0 * float(equations.layer_penalty(importance.matrices[matrix.name].omega, update, 0 * update))
    assert expected > 0
    assert penalty().item() == pytest.approx(expected, rel=1e-5)


def test_fisher_is_taken_at_the_pretrained_weights_whatever_the_adapter_holds(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    fresh = fisher_of_sequences(peft_model, token_ids[:4], SEED)
    move_adapter(peft_model)
    moved = fisher_of_sequences(peft_model, token_ids[:4], SEED)
    for name, matrix in fresh.matrices.items():
        assert torch.equal(matrix.omega, moved.matrices[name].omega)
        assert not moved.matrices[name].B.any()


def test_another_seed_samples_other_labels(peft_model: PeftModel, token_ids: Tensor) -> None:
    first, same, other = (fisher_of_sequences(peft_model, token_ids[:4], seed) for seed in (1, 1, 2))
    for name, matrix in first.matrices.items():
        assert torch.equal(matrix.omega, same.matrices[name].omega)
        assert not torch.equal(matrix.omega, other.matrices[name].omega)


def test_the_model_is_left_as_it_was(model_dir: str, token_ids: Tensor) -> None:
    base = LlamaForCausalLM.from_pretrained(model_dir)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5)).train()
    model.base_model.model.lm_head.eval()
    move_adapter(model)
    frozen = adapted_matrices(model)[0].A.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    fisher_of_sequences(model, token_ids[:2], SEED)
    assert [module.training for module in model.modules()] == modes
    assert not frozen.requires_grad
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    assert not any(m.module.get_base_layer()._forward_hooks for m in adapted_matrices(model))
    assert not torch.equal(model(input_ids=token_ids).logits, model(input_ids=token_ids).logits)  # dropout is back


def test_dropout_does_not_reach_the_fisher(model_dir: str, token_ids: Tensor) -> None:
    config = LlamaConfig.from_pretrained(model_dir, attention_dropout=0.5)
    base = LlamaForCausalLM.from_pretrained(model_dir, config=config, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["v_proj"], lora_dropout=0.5)).train()
    first, second = (fisher_of_sequences(model, token_ids[:2], SEED) for _ in range(2))
    for name, matrix in first.matrices.items():
        assert torch.equal(matrix.omega, second.matrices[name].omega)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_is_of_the_same_fisher_and_survives_saving(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, encoding: str
) -> None:
    dense = fisher_of_sequences(peft_model, token_ids, SEED)
    fisher_of_sequences(peft_model, token_ids, SEED, batch_size=len(token_ids), encoding=encoding).save(
        tmp_path / "fisher"
    )
    loaded = Importance.load(tmp_path / "fisher")
    assert loaded.encoding == encoding
    for name, matrix in dense.matrices.items():
        kept, exact = loaded.matrices[name].omega, matrix.omega
        assert isinstance(exact, Tensor) and exact.any()
        if isinstance(kept, Factored):
            torch.testing.assert_close(kept.row, exact.sum(1))
            torch.testing.assert_close(kept.column, exact.sum(0))
        else:
            torch.testing.assert_close(kept, exact, rtol=1e-6, atol=0)


def test_information_on_documents_says_where_it_comes_from(peft_model: PeftModel, model_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    importance = fisher_information(peft_model, tokenizer, [GENERAL_TEXT], examples=3, max_length=16, seed=SEED)
    facts = importance.provenance
    assert (facts["method"], facts["labels"]) == ("squared_gradients", "sampled")
    assert (facts["examples"], facts["max_length"], facts["tokens"]) == (3, 16, 45)
    assert facts["seed"] == SEED and facts["base_model"] == model_dir
    sequences = pack(tokenizer, [GENERAL_TEXT], 3, 16)
    for name, matrix in fisher_of_sequences(peft_model, sequences, SEED).matrices.items():
        assert torch.equal(matrix.omega, importance.matrices[name].omega)


def test_packing_joins_documents_by_the_end_token_and_cuts_nothing_out(model_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    documents = ["assert x", "a break in a loop", "calls and classes, and more text to fill it"]
    joined = [i for document in documents for i in [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]]
    assert pack(tokenizer, documents, 3, 8).flatten().tolist() == joined[:24]


def test_a_text_too_short_is_refused_with_the_number_of_sequences_it_has(model_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokens = len(tokenizer("assert x")["input_ids"]) + 1
    with pytest.raises(DataError, match=rf"has {tokens // 2} sequences of 2 tokens, expected 100\. Give more text"):
        pack(tokenizer, ["assert x"], 100, 2)
    assert pack(tokenizer, ["assert x"], 100, 2, at_most=True).shape == (tokens // 2, 2)
    with pytest.raises(DataError, match="has 0 sequences of 50 tokens"):
        pack(tokenizer, ["assert x"], 100, 50, at_most=True)
    with pytest.raises(DataError, match="at least 1 sequence of at least 2 tokens, got 0 of 8"):
        pack(tokenizer, ["assert x"], 0, 8)


class _Flattened(torch.nn.Module):
    """A linear layer that is given the tokens of all rows in one, from number `first` on."""

    def __init__(self, linear: torch.nn.Module, first: int) -> None:
        super().__init__()
        self.linear, self.first = linear, first

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.linear(x.flatten(0, 1)[self.first :])
        return torch.cat([chosen.new_zeros(self.first, chosen.shape[1]), chosen]).view(*x.shape[:2], -1)


def _flattened(model_dir: str, first: int) -> PeftModel:
    base = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    base.model.layers[1].mlp.up_proj = _Flattened(base.model.layers[1].mlp.up_proj, first)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["linear"]))


def test_a_layer_that_is_given_all_rows_in_one_counts_each_of_them(model_dir: str, token_ids: Tensor) -> None:
    (matrix,) = fisher_of_sequences(_flattened(model_dir, 0), token_ids[:4], SEED).matrices.values()
    name = "model.layers.1.mlp.up_proj"
    expected = fisher_by_one_backward_an_example(model_dir, [name], token_ids[:4])[name]
    torch.testing.assert_close(matrix.omega, expected, rtol=1e-9, atol=0)


def test_a_layer_that_mixes_examples_is_refused_by_name(model_dir: str, token_ids: Tensor) -> None:
    model = _flattened(model_dir, 1)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj\.linear: .* got \(47, 32\).*target_modules"):
        fisher_of_sequences(model, token_ids[:4], SEED)
    assert adapted_matrices(model)[0].A.requires_grad


def test_a_layer_used_twice_is_refused_by_name(model_dir: str, token_ids: Tensor) -> None:
    base = LlamaForCausalLM.from_pretrained(model_dir)
    base.model.layers[1].mlp.up_proj = base.model.layers[1].mlp.gate_proj
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["gate_proj"], layers_to_transform=[1]))
    model.get_submodule("base_model.model.model.layers.1.mlp").up_proj = adapted_matrices(model)[0].module
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.gate_proj: .* got a second one"):
        fisher_of_sequences(model, token_ids[:4], SEED)


def test_an_unknown_encoding_is_refused_before_any_work(peft_model: PeftModel) -> None:
    with pytest.raises(ValueError, match="expected one of float32, factored, got 'int3'"):
        fisher_of_sequences(peft_model, torch.zeros(0, 2, dtype=torch.long), SEED, encoding="int3")


def test_whole_model_bytes_are_four_for_each_parameter_of_the_base(peft_model: PeftModel, model_dir: str) -> None:
    base = LlamaForCausalLM.from_pretrained(model_dir)
    assert whole_model_bytes(base) == whole_model_bytes(peft_model) == 4 * base.num_parameters()


# As importance without a move


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_labels_take_the_next_tokens_of_the_text(
    exact_model: PeftModel, model_dir: str, token_ids: Tensor, encoding: str
) -> None:
    sequences = token_ids[:5]
    importance = fisher_of_sequences(exact_model, sequences, SEED, batch_size=2, encoding=encoding, labels="text")
    base = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    weights = [base.get_submodule(name).weight for name in importance.matrices]
    expected = [torch.zeros_like(weight) for weight in weights]
    for sequence in sequences[:, None]:
        likelihood = base(input_ids=sequence).logits[0, :-1].log_softmax(-1)  # Transformers' own loss is in float32
        loss = -likelihood.gather(1, sequence[0, 1:, None]).sum()
        for total, gradient in zip(expected, torch.autograd.grad(loss, weights), strict=True):
            total += gradient**2 / (5 * (sequence.shape[1] - 1))
    for matrix, total in zip(importance.matrices.values(), expected, strict=True):
        if isinstance(matrix.omega, Factored):
            torch.testing.assert_close(matrix.omega.row, total.sum(1))
            torch.testing.assert_close(matrix.omega.column, total.sum(0))
        else:
            torch.testing.assert_close(matrix.omega, total, rtol=1e-9, atol=0)


def test_effective_squares_are_those_of_equation_11_at_the_base_point(
    exact_model: PeftModel, token_ids: Tensor
) -> None:
    sequence = token_ids[:1]
    importance = fisher_of_sequences(exact_model, sequence, SEED, batch_size=1, labels="text", gradient="effective")
    (exact_model(input_ids=sequence, labels=sequence).loss * (sequence.shape[1] - 1)).backward()
    for m in adapted_matrices(exact_model):
        assert m.A.grad is not None and m.B.grad is not None and not m.A.grad.any()
        effective = equations.effective_gradient(m.A, m.B, m.A.grad, m.B.grad, lr=0.0, scale=m.scale)
        torch.testing.assert_close(importance.matrices[m.name].omega, effective.detach() ** 2 / (sequence.shape[1] - 1))


@pytest.mark.parametrize(("d_out", "d_in"), [(7, 13), (13, 7)])
def test_factored_squares_are_the_sums_of_the_dense_ones(d_out: int, d_in: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, d_in, dtype=torch.float64, generator=generator)
    gradient = torch.randn(3, 5, d_out, dtype=torch.float64, generator=generator)
    dense = torch.einsum("bto,bti->boi", gradient, x).square().sum(0)
    kept = Factored(torch.zeros(d_out, dtype=torch.float64), torch.zeros(d_in, dtype=torch.float64))
    add_squares_(kept, x, gradient)
    torch.testing.assert_close(kept.row, dense.sum(1))
    torch.testing.assert_close(kept.column, dense.sum(0))
    total = torch.zeros(d_out, d_in, dtype=torch.float64)
    add_squares_(total, x, gradient)
    torch.testing.assert_close(total, dense)
