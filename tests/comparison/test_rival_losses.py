"""Rivals that change the loss, each against a slow computation of its own in float64: general_kl, EAFT, LaLoRA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import move_adapter
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer, TrainerCallback

from hlora.comparison.rivals.added_term import trainer_adding
from hlora.comparison.rivals.eaft import eaft_trainer, gated_losses
from hlora.comparison.rivals.general_kl import divergence_on, general_kl, general_rows
from hlora.comparison.rivals.lalora import curvature, lalora, sum_of_blocks
from hlora.methods import METHODS
from hlora.model.adapters import adapted_matrices
from hlora.run.job import Job
from hlora.training import checkpoint
from hlora.training.train import train

Open = Callable[..., Job]
SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True}
ROWS = [("2 + 2 =", " 4"), ("A longer question: what is 3 + 4?", " seven, which is 7")]


def one_step(
    model: PeftModel, model_dir: str, output: Path, **options: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The log entry of one step of SGD at rate 1 on ROWS, which is padded, and by how much it moved each parameter."""
    data = Dataset.from_dict({"prompt": [row[0] for row in ROWS], "completion": [row[1] for row in ROWS]})
    arguments = {**SGD, "max_steps": 1, "per_device_train_batch_size": 2, "report_to": []}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    (entry,) = train(model, tokenizer, data, output=output, arguments=arguments, seed=0, **options)
    after = dict(model.named_parameters())
    return entry, {name: value - after[name].detach() for name, value in before.items()}


def answers(model: Any, tokenizer: Any) -> list[tuple[Tensor, Tensor]]:
    """Logits (tokens, vocabulary) and targets (tokens,) of the trained tokens of each of ROWS, row by row."""
    found = []
    for prompt, completion in ROWS:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]])
        found.append((model(input_ids=ids).logits[0, start - 1 : -1], ids[0, start:]))
    return found


def task_loss(model: Any, tokenizer: Any) -> Tensor:
    parts = [(-log_softmax(logits, -1)).gather(1, ids[:, None]) for logits, ids in answers(model, tokenizer)]
    return torch.cat(parts).mean()


def assert_is_gradient(moved: dict[str, Tensor], loss: Tensor, model: PeftModel) -> None:
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0
            torch.testing.assert_close(moved[name], parameter.grad.float(), rtol=1e-3, atol=1e-5)


# general_kl


def test_general_kl_is_the_divergence_on_general_rows_of_any_length(
    peft_model: PeftModel, model_dir: str, tmp_path: Path
) -> None:
    move_adapter(peft_model)
    other, tokenizer = copy.deepcopy(peft_model).double(), AutoTokenizer.from_pretrained(model_dir)
    rows = [torch.randint(3, 384, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 4, 30)]
    entry, moved = one_step(peft_model, model_dir, tmp_path, trainer_class=trainer_adding(0.7, divergence_on(rows)))
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows[:2]:  # as many as the domain batch has
        log_q = log_softmax(other(input_ids=row[None]).logits, -1)[0, :-1]
        with torch.no_grad(), other.disable_adapter():
            log_p = log_softmax(other(input_ids=row[None]).logits, -1)[0, :-1]
        total, count = total + (log_p.exp() * (log_p - log_q)).sum(), count + len(row) - 1
    task = task_loss(other, tokenizer)
    loss = task + 0.7 * total / count
    assert entry["loss"] == pytest.approx(float(task.detach()), rel=1e-4)
    assert entry["regularisation_loss"] == pytest.approx(float(total.detach() / count), rel=1e-4)
    assert_is_gradient(moved, loss, other)


def test_general_kl_reads_the_blocks_of_the_general_phase_in_an_order_of_the_seed(open_job: Open) -> None:
    job = open_job()
    blocks = job.general.dataset(job.tokenizer, job.config.training.record_arguments())["input_ids"]
    rows = [row.tolist() for row in general_rows(job)]
    assert sorted(rows) == sorted(map(list, blocks)) and rows != list(map(list, blocks))
    job.config.seed += 1
    assert sorted(row.tolist() for row in general_rows(job)) == sorted(rows)
    assert [row.tolist() for row in general_rows(job)] != rows


def test_general_kl_of_a_large_beta_stays_near_the_base_on_general_text(open_job: Open) -> None:
    ends = []
    for beta in (0.0, 1e3):
        _, history = general_kl(open_job(training__tune={"max_steps": 6, "max_length": 64}), strength=beta)
        ends.append(history[-1]["regularisation_loss"])
        assert history[0]["regularisation_loss"] == pytest.approx(0.0, abs=1e-6)
    assert ends[1] < 0.5 * ends[0]


# EAFT


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("vocabulary", [7, 50])
def test_gated_losses_equal_a_loop_over_tokens_in_float64(alpha: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, vocabulary, dtype=torch.float64, generator=generator)
    targets = torch.randint(vocabulary, (6,), generator=generator)
    losses = gated_losses(logits.requires_grad_(), targets, alpha)
    losses.sum().backward()
    assert logits.grad is not None
    for t, target in enumerate(targets.tolist()):
        values = logits.detach()[t].tolist()
        largest = sorted(math.exp(value) for value in values)[-20:]
        entropy = -sum(p / sum(largest) * math.log(p / sum(largest)) for p in largest)
        gate, total = (entropy / 3.0) ** alpha, sum(map(math.exp, values))
        assert losses[t].item() == pytest.approx(gate * (math.log(total) - values[target]))
        for v, value in enumerate(values):  # the gate has no gradient
            assert logits.grad[t, v].item() == pytest.approx(gate * (math.exp(value) / total - (v == target)))


def test_the_eaft_trainer_takes_the_mean_over_the_trained_tokens(
    peft_model: PeftModel, model_dir: str, tmp_path: Path
) -> None:
    move_adapter(peft_model)
    peft_model.get_output_embeddings().weight.data *= 10  # surer of some tokens than of others
    other, tokenizer = copy.deepcopy(peft_model).double(), AutoTokenizer.from_pretrained(model_dir)
    entry, moved = one_step(peft_model, model_dir, tmp_path, trainer_class=eaft_trainer(2.0))
    loss = torch.cat([gated_losses(*row, 2.0) for row in answers(other, tokenizer)]).mean()
    assert entry["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert float(loss.detach()) < 0.99 * float(task_loss(other, tokenizer).detach())
    assert_is_gradient(moved, loss, other)


def test_eaft_without_a_strength_is_at_1(open_job: Open) -> None:
    losses = [
        [entry["loss"] for entry in METHODS["eaft"].function()(open_job(), strength=alpha)[1]] for alpha in (None, 1.0)
    ]
    assert losses[0] == losses[1]


# LaLoRA


def blocks_of(model: PeftModel, ids: Tensor, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """X and G of every A and B by parameter name, one token at a time, for one sequence."""
    inputs: dict[str, Tensor] = {}
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hooks = [
        module.register_forward_hook(
            lambda module, args, output, name=f"{name}.weight": inputs.update({name: (args[0], output)})
        )
        for name, module in model.named_modules()
        if f"{name}.weight" in factors
    ]
    logits = model(input_ids=ids).logits[0, :-1]
    for hook in hooks:
        hook.remove()
    draw = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)
    loss = -log_softmax(logits, -1).gather(1, labels).sum()
    gradients = torch.autograd.grad(loss, [output for _, output in inputs.values()])
    found = {}
    for (name, (x, _)), gradient in zip(inputs.items(), gradients, strict=True):
        x, g = x[0].detach(), gradient[0]
        X = sum(torch.outer(each, each) for each in x) / ids.numel()
        G = sum(torch.outer(each, each) for each in g) / (ids.numel() - 1)
        found[name] = X, G
    return found


@pytest.mark.parametrize("fresh", [True, False])
def test_curvature_and_penalty_equal_kronecker_products_token_by_token(peft_model: PeftModel, fresh: bool) -> None:
    model = peft_model.double().eval()
    if not fresh:
        move_adapter(model)
    names = {id(p): name for name, p in model.named_parameters()}
    ids = torch.randint(3, 384, (1, 12), generator=torch.Generator().manual_seed(0))
    blocks = curvature(model, ids, 3)
    expected = blocks_of(model.eval(), ids, 3)
    kept = {names[id(block.factor)]: block for block in blocks}
    zero = {name for name, (_, G) in expected.items() if not G.any()}
    assert zero == ({name for name in expected if ".lora_A." in name} if fresh else set())
    assert kept.keys() == expected.keys() - zero and kept
    assert all(p.grad is None for p in model.parameters())
    move_adapter(model)
    total = torch.zeros((), dtype=torch.float64)
    for name, block in kept.items():
        X, G = expected[name]
        torch.testing.assert_close(block.X, X)
        torch.testing.assert_close(block.G, G)
        moved = (block.factor - block.start).flatten()  # row by row, so the rows' G comes first
        total = total + 0.5 * moved @ torch.kron(G, X) @ moved
    value = sum_of_blocks(blocks)
    torch.testing.assert_close(value, total)
    factors = [block.factor for block in blocks]
    for one, two in zip(torch.autograd.grad(value, factors), torch.autograd.grad(total, factors), strict=True):
        torch.testing.assert_close(one, two)


def test_curvature_is_that_of_all_sequences_however_they_are_batched(peft_model: PeftModel) -> None:
    """On a model that is sure of each label, since labels are drawn batch by batch."""
    model = peft_model.double().eval()
    move_adapter(model)
    ids = torch.randint(3, 384, (5, 10), generator=torch.Generator().manual_seed(0))
    model.get_output_embeddings().weight.data *= 1e4  # every draw is the likeliest token
    one, two = curvature(model, ids, 0, batch_size=5), curvature(model, ids, 1, batch_size=2)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a.X, b.X)
        torch.testing.assert_close(a.G, b.G)


def test_the_penalty_forecasts_the_divergence_on_the_text_it_was_taken_from(peft_model: PeftModel) -> None:
    """At λ = 1 it is in nats per token: within a factor of 3 of the measured KL, over small random moves."""
    model = peft_model.double().eval()
    ids = torch.randint(3, 384, (32, 24), generator=torch.Generator().manual_seed(0))
    blocks = curvature(model, ids, 0)
    model.eval()
    forecast, measured = 0.0, 0.0
    with torch.no_grad():
        log_p = log_softmax(model(input_ids=ids).logits, -1)[:, :-1]
        for n in range(6):
            generator = torch.Generator().manual_seed(n)
            for matrix in adapted_matrices(model):
                matrix.B.copy_(1e-3 * torch.randn(matrix.B.shape, generator=generator, dtype=torch.float64))
            log_q = log_softmax(model(input_ids=ids).logits, -1)[:, :-1]
            measured += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            forecast += float(sum_of_blocks(blocks))
    assert 1 / 3 < forecast / measured < 3


def test_a_large_lambda_holds_what_the_curvature_weighs(open_job: Open) -> None:
    moved = []
    for weight in (0.0, 1e6):
        _, history = lalora(open_job(training__tune={"max_steps": 6, "max_length": 64}), strength=weight)
        moved.append(history[-1]["regularisation_loss"])
        assert history[0]["regularisation_loss"] == 0.0 and math.isfinite(history[-1]["total_loss"])
    assert 0 < moved[1] < 0.2 * moved[0]


# Resuming


@pytest.mark.parametrize(("method", "parts"), [("general_kl", 1), ("general_kl", 2), ("eaft", 1), ("lalora", 1)])
def test_a_training_interrupted_after_two_of_four_steps_ends_where_it_would_have(
    peft_model: PeftModel, model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, parts: int
) -> None:
    """And general_kl reads the rows that it would have, since each batch keeps its number."""
    monkeypatch.setattr(checkpoint, "_EVERY", 0.0)
    rows = torch.randint(3, 384, (11, 12), generator=torch.Generator().manual_seed(0))
    numbers: list[int] = []

    def counted(batch: Any) -> Tensor:
        numbers.append(batch.number)
        return divergence_on(list(rows))(batch)

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    def trained(output: Path, *callbacks: TrainerCallback) -> PeftModel:
        model = copy.deepcopy(peft_model)
        blocks = curvature(model, rows, 0)
        losses = {
            "general_kl": trainer_adding(2.0, counted),
            "eaft": eaft_trainer(2.0),
            "lalora": trainer_adding(2.0, lambda batch: sum_of_blocks(blocks)),
        }
        data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
        arguments = {
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 5e-2,
            "report_to": [],
            "gradient_accumulation_steps": parts,
        }
        options: dict[str, Any] = {"output": output, "arguments": arguments, "seed": 0, "resumable": True}
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        train(model, tokenizer, data, callbacks=callbacks, trainer_class=losses[method], **options)
        return model

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", Stop())
    resumed, whole = trained(tmp_path / "cut"), trained(tmp_path / "whole")
    assert numbers == ([*range(4 * parts)] * 2 if method == "general_kl" else [])
    for (name, one), two in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
