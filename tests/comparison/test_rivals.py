"""Each rival on a tiny model: it trains, it does what it is named for, and it says so where it cannot."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import move_adapter
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainerCallback,
)

from hlora.comparison.rivals.corda import corda
from hlora.comparison.rivals.kl import kl, kl_trainer, summed_kl
from hlora.comparison.rivals.mlp import mlp
from hlora.comparison.rivals.osf import osf
from hlora.comparison.rivals.replay import replay
from hlora.methods import METHODS
from hlora.run.job import Job
from hlora.run.phases import lora
from hlora.system.errors import CannotRun, ConfigError
from hlora.training.train import train

RIVALS: dict[str, dict[str, float]] = {
    "replay": {"strength": 0.25},
    "kl": {"strength": 0.5},
    "general_kl": {"strength": 0.5},
    "eaft": {"strength": 1.0},
    "lalora": {"strength": 1.0},
    "osf": {"strength": 0.5},
    "corda": {},
    "mlp": {},
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])

Open = Callable[..., Job]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `train` is called with, while it trains as ever."""
    seen: list[dict[str, Any]] = []

    def spy(model: Any, tokenizer: Any, dataset: Dataset, output: Any, arguments: Any, seed: int, **rest: Any) -> Any:
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            logits = model.eval()(input_ids=IDS).logits
        history = train(model, tokenizer, dataset, output=output, arguments=arguments, seed=seed, **rest)
        call = {"dataset": dataset, "arguments": arguments, "start": start, "logits": logits, "seed": seed}
        seen.append({**call, "history": history})
        return history

    monkeypatch.setattr("hlora.run.phases.train", spy)
    return seen


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def tiny_gpt2(job: Job) -> Job:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    job.base = GPT2LMHeadModel(config).requires_grad_(False).eval()
    job.config.lora.target_modules = ["c_attn"]
    return job


@pytest.mark.slow
@pytest.mark.parametrize("method", RIVALS)
def test_every_method_trains_the_same_steps_and_moves_what_it_trains(
    open_job: Open, batches: list[dict[str, Any]], method: str
) -> None:
    job = open_job()
    model, history = METHODS[method].function()(job, **RIVALS[method])
    assert isinstance(model, PeftModel)
    assert [entry["step"] for entry in history] == [1, 2, 3]
    assert all(math.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in history)
    (call,) = batches
    if method == "osf":
        assert call["arguments"]["learning_rate"] == 5e-3 / 2
    end = dict(model.named_parameters())
    assert call["start"]
    for name, before in call["start"].items():
        assert not torch.equal(before, end[name]), name
    assert call["seed"] == job.config.seed
    changed = {"osf": {"learning_rate"}, "replay": set()}.get(method, set())
    asked = {**job.config.training.common, **job.config.training.tune}
    assert {name for name, value in asked.items() if call["arguments"][name] != value} == changed
    assert (method != "replay") == (call["dataset"].to_list() == job.domain.dataset(job.tokenizer).to_list())


@pytest.mark.slow
@pytest.mark.parametrize("method", RIVALS)
def test_a_method_is_repeated_exactly_by_its_seed(open_job: Open, method: str) -> None:
    ends = []
    for _ in range(2):
        model, _ = METHODS[method].function()(open_job(), **RIVALS[method])
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", RIVALS)
def test_the_base_comes_back_from_unload_unless_the_method_is_said_to_alter_it(open_job: Open, method: str) -> None:
    job = open_job()
    before = {name: p.detach().clone() for name, p in job.base.named_parameters()}
    model, _ = METHODS[method].function()(job, **RIVALS[method])
    model.unload()
    after = dict(job.base.named_parameters())
    assert after.keys() == before.keys()
    same = all(torch.equal(before[name], after[name]) for name in before)
    assert same != METHODS[method].alters_base


@pytest.mark.parametrize(
    ("method", "strength"),
    [
        *(("replay", strength) for strength in (None, 0.0, 1)),
        *((method, strength) for method in ("kl", "general_kl", "lalora") for strength in (None, -1.0)),
        ("eaft", -1.0),
        ("osf", 1.0),
    ],
)
def test_a_strength_outside_its_range_is_refused(open_job: Open, method: str, strength: float | None) -> None:
    with pytest.raises(ConfigError, match=f"{method}: expected a strength"):
        METHODS[method].function()(open_job(), strength=strength)


# Replay


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_replay_mixes_the_share_asked_for_and_keeps_every_domain_row(
    open_job: Open, batches: list[dict[str, Any]], share: float
) -> None:
    job = open_job()
    replay(job, strength=share)
    rows = batches[0]["dataset"].to_list()
    general = [row for row in rows if all(row["completion_mask"])]
    domain = [row for row in rows if not all(row["completion_mask"])]
    assert len(general) / len(rows) == pytest.approx(share, abs=0.02)
    assert domain == job.domain.dataset(job.tokenizer).to_list()
    text = "\n".join(job.general.train)
    assert all(job.tokenizer.decode(row["input_ids"]) in text for row in general)
    mean = sum(len(row["input_ids"]) for row in domain) / len(domain)
    assert all(len(row["input_ids"]) <= mean + 1 for row in general)


def test_replay_by_epochs_takes_the_steps_of_the_unmixed_rows(open_job: Open) -> None:
    """24 rows by 4 at 2 parts a step are 3 steps an epoch."""
    epochs = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "max_length": 64}
    histories = [
        method(open_job(training__tune=epochs), **s)[1] for method, s in ((mlp, {}), (replay, {"strength": 0.5}))
    ]
    assert [len(history) for history in histories] == [6, 6]


def test_replay_takes_the_loss_on_every_token_of_a_general_row(open_job: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    job = open_job(training__tune={"max_steps": 6, "max_length": 64})
    labels: list[Tensor] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
            labels.extend(torch.tensor(row["labels"]) for row in train_dataloader.dataset)

    def watched(*arguments: Any, **options: Any) -> Any:
        return train(*arguments, **{**options, "callbacks": [Watch()]})

    monkeypatch.setattr("hlora.run.phases.train", watched)
    replay(job, strength=0.5)
    whole = [row for row in labels if bool((row != -100).all())]
    assert len(labels) == 48 and len(whole) == 24


def test_replay_mixes_plain_general_text_among_chat_rows(
    open_job: Open, batches: list[dict[str, Any]], model_dir: str, tmp_path: Path
) -> None:
    chat = shutil.copytree(model_dir, tmp_path / "chat")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (chat / "chat_template.jinja").write_text(template, encoding="utf-8")
    paths = []
    for name, start in (("a", 0), ("b", 50)):
        messages = [
            [{"role": "user", "content": f"{n} plus one?"}, {"role": "assistant", "content": str(n + 1)}]
            for n in range(start, start + 8)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages), encoding="utf-8")
        paths.append(str(path))
    job = open_job(model__name=str(chat), domain__task="rows", domain__train=paths[0], domain__test=paths[1])
    _, history = replay(job, strength=0.5)
    general = [row for row in batches[0]["dataset"] if all(row["completion_mask"])]
    assert "assistant" not in job.tokenizer.decode(general[0]["input_ids"])
    assert len(general) == 8 and math.isfinite(history[-1]["loss"])


# KL to the base


@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_summed_kl_and_its_gradient_equal_plain_torch_in_float64(tokens: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(5, 11).double().requires_grad_(False)
    hidden = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(tokens, 5, dtype=torch.float64)
    value = summed_kl(hidden, reference, head)
    (3 * value).backward()
    other = hidden.detach().clone().requires_grad_()
    log_p, log_q = log_softmax(head(reference), -1), log_softmax(head(other), -1)
    expected = nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    (3 * expected).backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(hidden.grad, other.grad)


def test_loss_and_gradient_of_the_kl_trainer_equal_plain_torch(
    peft_model: PeftModel, model_dir: str, tmp_path: Path
) -> None:
    """Rows of different lengths, so that padding would show; SGD, so that one step is the gradient."""
    move_adapter(peft_model)
    other = copy.deepcopy(peft_model).double()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts, completions = ["2 + 2 =", "A longer question: what is 3 + 4?"], [" 4", " seven, which is 7"]
    data = Dataset.from_dict({"prompt": prompts, "completion": completions})
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    options |= {"optim": "sgd", "max_grad_norm": 0.0, "report_to": [], "use_cpu": True}
    before = {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}
    (entry,) = train(
        peft_model, tokenizer, data, output=tmp_path, arguments=options, seed=0, trainer_class=kl_trainer(0.7)
    )

    task, task_tokens, kl, tokens = torch.zeros((), dtype=torch.float64), 0, torch.zeros((), dtype=torch.float64), 0
    for prompt, completion in zip(prompts, completions, strict=True):
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]])
        log_q = log_softmax(other(input_ids=ids).logits, -1)[0, :-1]
        with torch.no_grad(), other.disable_adapter():
            log_p = log_softmax(other(input_ids=ids).logits, -1)[0, :-1]
        task = task - log_q[start - 1 :].gather(1, ids[0, start:, None]).sum()
        kl = kl + (log_p.exp() * (log_p - log_q)).sum()
        task_tokens, tokens = task_tokens + ids.shape[1] - start, tokens + ids.shape[1] - 1
    loss = task / task_tokens + 0.7 * kl / tokens
    loss.backward()
    assert entry["loss"] == pytest.approx(float(task.detach() / task_tokens), rel=1e-4)
    assert entry["weighted_regularisation_loss"] == pytest.approx(0.7 * float(kl.detach() / tokens), rel=1e-4)
    assert entry["total_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    gradients = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    after = dict(peft_model.named_parameters())
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 0
        torch.testing.assert_close(before[name] - after[name], gradient.float(), rtol=1e-3, atol=1e-5)


def test_kl_counts_once_however_a_batch_is_accumulated(peft_model: PeftModel, model_dir: str, tmp_path: Path) -> None:
    """Rows of one length, where the mean of the parts' means is the mean."""
    move_adapter(peft_model)
    ids = torch.randint(3, 384, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    ends, losses = [], []
    for batch, parts in ((8, 1), (2, 4)):
        model = copy.deepcopy(peft_model)
        options = {"max_steps": 1, "per_device_train_batch_size": batch, "gradient_accumulation_steps": parts}
        options |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "report_to": [], "use_cpu": True}
        (entry,) = train(
            model,
            AutoTokenizer.from_pretrained(model_dir),
            Dataset.from_dict({"input_ids": ids, "labels": ids}),
            output=tmp_path,
            arguments=options,
            seed=0,
            trainer_class=kl_trainer(2.0),
        )
        ends.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
        losses.append([entry["loss"], entry["weighted_regularisation_loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][1] > 0
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=1e-6)


def test_kl_is_zero_before_the_first_step_and_a_large_beta_stays_near_the_base(open_job: Open) -> None:
    distances, histories = [], []
    for beta in (0.0, 1e3):
        job = open_job(training__tune={"max_steps": 8, "max_length": 64})
        base = logits_of(job.base)
        model, history = kl(job, strength=beta)
        distances.append(float((logits_of(model) - base).norm()))
        histories.append(history)
    assert histories[1][0]["regularisation_loss"] == pytest.approx(0.0, abs=1e-6)
    assert histories[0][-1]["regularisation_loss"] > 10 * histories[1][-1]["regularisation_loss"]
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize("method", ["kl", "general_kl", "eaft", "lalora"])
def test_at_strength_0_it_is_plain_lora(open_job: Open, method: str) -> None:
    ours, _ = METHODS[method].function()(open_job(), strength=0.0)
    plain, _ = lora(open_job())
    others = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, others[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_rivals_that_read_hidden_states_cannot_run_where_logits_are_changed_after_the_output_layer(
    open_job: Open,
) -> None:
    job = open_job()
    job.base.lm_head.register_forward_hook(lambda module, args, output: output)  # harmless
    original = job.base.forward

    def scaled(*arguments: Any, **options: Any) -> Any:
        outputs = original(*arguments, **options)
        outputs.logits = outputs.logits * 3
        return outputs

    job.base.forward = scaled
    for method in ("kl", "general_kl", "eaft"):
        with pytest.raises(CannotRun, match="straight from the output layer"):
            METHODS[method].function()(job, strength=1.0)


# OSF


def kept_part_of_the_change(model: PeftModel, weights: dict[str, Tensor], share: float) -> float:
    """The largest part, of all matrices, of the change that lies in the directions that OSF keeps; relative."""
    parts = []
    for name, before in weights.items():
        change = model.get_base_model().get_submodule(name).get_delta_weight("default").detach()
        U, _, V = torch.linalg.svd(before, full_matrices=False)
        kept = int(min(before.shape) * share)
        assert change.norm() > 0
        parts += [(U[:, :kept].T @ change).norm() / change.norm(), (change @ V[:kept].T).norm() / change.norm()]
    return float(max(parts))


@pytest.mark.parametrize(("optimizer", "rate", "bound"), [("sgd", 100.0, 1e-4), ("adamw_torch", 0.5, 0.2)])
def test_osf_leaves_the_largest_singular_directions_as_they_were(
    open_job: Open, monkeypatch: pytest.MonkeyPatch, optimizer: str, rate: float, bound: float
) -> None:
    """PEFT projects the gradient: what SGD does with it stays outside; AdamW rescales it and strays a little."""
    monkeypatch.setattr("hlora.comparison.rivals.osf.OSF_LEARNING_RATE", rate)
    job = open_job(training__tune={"max_steps": 8, "max_length": 64, "optim": optimizer})
    weights = {n: m.weight.detach().clone() for n, m in job.base.named_modules() if n.endswith(("q_proj", "v_proj"))}
    model, _ = osf(job, strength=0.5)
    assert len(weights) == 4
    assert kept_part_of_the_change(model, weights, 0.5) < bound


def test_osf_starts_as_the_base_model(open_job: Open, batches: list[dict[str, Any]]) -> None:
    job = open_job()
    base = logits_of(job.base)
    osf(job, strength=0.5)
    torch.testing.assert_close(batches[0]["logits"], base, rtol=0, atol=1e-5)


def test_osf_cannot_run_on_conv1d_or_quantised_weights_and_leaves_the_model_whole(open_job: Open) -> None:
    job = tiny_gpt2(open_job())
    before = [name for name, _ in job.base.named_modules()]
    with pytest.raises(CannotRun, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        osf(job, strength=0.5)
    assert [name for name, _ in job.base.named_modules()] == before
    job = open_job()
    job.base.is_quantized = True
    for method in ("osf", "corda"):
        with pytest.raises(CannotRun, match="quantised"):
            METHODS[method].function()(job, **RIVALS[method])


def test_osf_cannot_keep_less_than_one_direction(open_job: Open) -> None:
    with pytest.raises(CannotRun, match="effective_rank"):
        osf(open_job(), strength=0.01)


# CorDA


def test_corda_starts_as_the_base_model_with_an_adapter_that_is_not_zero(
    open_job: Open, batches: list[dict[str, Any]]
) -> None:
    job = open_job()
    base = logits_of(job.base)
    corda(job)
    torch.testing.assert_close(batches[0]["logits"], base, rtol=0, atol=1e-4)
    assert all(value.abs().max() > 0 for value in batches[0]["start"].values())


def test_corda_takes_the_directions_that_matter_least_to_general_text(
    open_job: Open, batches: list[dict[str, Any]]
) -> None:
    """On general text the adapter's share of a layer's output is far below that of as many random directions."""
    job = open_job()
    reference = LlamaForCausalLM.from_pretrained(job.config.model.name)
    layer = "model.layers.0.self_attn.q_proj"
    inputs: list[Tensor] = []
    reference.get_submodule(layer).register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    ids = job.tokenizer(job.general.train[0])["input_ids"][:200]
    with torch.no_grad():
        reference(input_ids=torch.tensor([ids]))
    corda(job)
    start = batches[0]["start"]
    A, B = (start[f"base_model.model.{layer}.lora_{f}.default.weight"] for f in "AB")
    adapter = 2 * inputs[0] @ (B @ A).T
    output = inputs[0] @ reference.get_submodule(layer).weight.detach().T
    assert A.shape[0] / 32 > 0.1  # directions taken, of all
    assert adapter.norm() ** 2 < 0.02 * output.norm() ** 2


def test_corda_runs_on_conv1d(open_job: Open) -> None:
    _, history = corda(tiny_gpt2(open_job()))
    assert all(math.isfinite(entry["loss"]) for entry in history)


def test_corda_cannot_run_where_a_layer_sees_nothing_but_zeros(open_job: Open) -> None:
    job = open_job()
    job.base.model.layers[1].input_layernorm.weight.data.zero_()
    with pytest.raises(CannotRun, match="CorDA cannot decompose"):
        corda(job)


# MLP


def test_mlp_adapts_every_matrix_of_the_mlp_and_nothing_else(open_job: Open) -> None:
    model, _ = mlp(open_job())
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    kinds = ("gate_proj", "up_proj", "down_proj")
    assert trained == {f"base_model.model.model.layers.{n}.mlp.{kind}" for n in (0, 1) for kind in kinds}


def test_mlp_finds_the_layers_of_gpt2_too(open_job: Open) -> None:
    model, _ = mlp(tiny_gpt2(open_job()))
    trained = {name.split(".lora_")[0].rsplit(".", 2)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"c_fc", "c_proj"}
    assert not any("attn" in name for name, p in model.named_parameters() if p.requires_grad)


def test_mlp_cannot_run_on_a_model_without_one(open_job: Open) -> None:
    job = open_job()
    job.base = OPTForCausalLM(
        OPTConfig(vocab_size=384, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(CannotRun, match="no linear layer of this model lies in a module named"):
        mlp(job)
