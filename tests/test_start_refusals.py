"""What a library would refuse when a trainer is built is refused as the run opens, by the field that causes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Invoke
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from hlora.config.reading import parse_config
from hlora.run.job import Job
from hlora.run.trial import try_phases
from hlora.training.checkpoint import random_state


@pytest.fixture
def config(tmp_path: Path, job_fields: dict[str, Any]) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(job_fields), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("training.tune.eval_strategy=steps", "training.tune: eval_strategy"),
        ("training.common.load_best_model_at_end=true", "training.common: load_best_model_at_end"),
        ("training.common.resume_from_checkpoint=there", "training.common: resume_from_checkpoint"),
        ("training.common.push_to_hub=true", "training.common: push_to_hub"),
        ("training.tune.assistant_only_loss=true", "training.tune: assistant_only_loss"),
        ("training.common.dataset_text_field=body", "training.common: dataset_text_field"),
        ("training.common.chat_template_path=none.jinja", "training.common: chat_template_path"),
        ("training.tune.optim=adamw_tosrch", "training.tune: optim: expected one of"),
        ("training.tune.optim=galore_adamw", "training.tune.optim: 'galore_adamw' cannot be used here"),
        ("training.tune.padding_free=true", "training.tune.padding_free: True cannot be used here"),
        ("training.common.report_to=comet_ml", "training.common.report_to: 'comet_ml' cannot be used here"),
        ("training.tune.lr_scheduler_type=cosine_with_min_lr", "training.tune.lr_scheduler_type: 'cosine_with_min_lr'"),
        ("training.record.max_length=null", "training.record.max_length: None cannot be used here"),
        (
            "training.tune={dataloader_drop_last: true, max_steps: -1}",
            "training.tune.dataloader_drop_last: 24 training",
        ),
        ("training.tune.save_strategy=best", "training.tune.save_strategy: 'best' cannot be used here"),
        # what Trainer finds only as it trains
        ("training.tune={use_liger_kernel: true}", "training.tune.use_liger_kernel: True cannot be used here"),
        ("training.tune.neftune_noise_alpha=-5", "training.tune.neftune_noise_alpha: -5 cannot be used here"),
        ("training.tune.torch_compile_mode=nope", "training.tune.torch_compile_mode: 'nope' cannot be used here"),
        (
            "training.tune={gradient_checkpointing: true, gradient_checkpointing_kwargs: {nope: 1}}",
            "training.tune.gradient_checkpointing_kwargs: {'nope': 1} cannot be used here",
        ),
        ("training.tune.loss_type=nope", "training.tune.loss_type: 'nope' cannot be used here"),
        ("training.tune.router_aux_loss_coef=0.1", "training.tune.router_aux_loss_coef: 0.1 cannot be used here"),
        ("lora.target_modules=[q_proj, lm_head]", "lora.target_modules: ['q_proj', 'lm_head'] cannot be used here"),
        ("lora.target_modules='(q_proj'", "lora.target_modules: "),
    ],
)
def test_a_refusal_of_a_library_comes_first_and_names_the_field(
    hlora: Invoke, config: Path, tmp_path: Path, override: str, field: str
) -> None:
    settings = ["--set", override, "--set", "training.common.per_device_train_batch_size=64"]
    status, _, err = hlora("run", config, *settings)
    assert status == 2, err
    assert field in err and "Traceback" not in err
    assert not (tmp_path / "out" / "logs").exists() and not (tmp_path / "out" / "config.yaml").exists()


def test_a_metric_that_no_evaluation_has_is_refused_before_the_general_phase(
    hlora: Invoke, config: Path, tmp_path: Path
) -> None:
    best = "training.tune={load_best_model_at_end: true, max_steps: 4, metric_for_best_model: NAME}"
    rows = "domain.validation=0.25"
    status, _, err = hlora("run", config, "--set", rows, "--set", best.replace("NAME", "eval_accuracy"))
    assert status == 2 and "training.tune.metric_for_best_model: 'eval_accuracy' cannot be used here" in err, err
    assert "eval_loss" in err and not (tmp_path / "out" / "logs").exists()
    known = [rows, best.replace("NAME", "mean_token_accuracy")]
    assert Job.open(parse_config(yaml.safe_load(config.read_text(encoding="utf-8")), overrides=known))


def test_a_tracker_without_a_login_is_refused(
    hlora: Invoke, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    status, _, err = hlora("run", config, "--set", "training.common.report_to=wandb")
    assert status == 2 and "training.common.report_to: 'wandb' cannot be used here" in err and "wandb login" in err, err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("domain.task=piqa", "train.jsonl: 24 of 24 rows cannot be used"),
        ("general.paths=[PLACE/train.jsonl]", "train.jsonl: 24 of 24 rows cannot be used"),
        ("evaluation.texts={a: PLACE/test.jsonl}", "test.jsonl: Row 1: missing column: 'text'"),
        ("training.tune.logging_steps=1.5", "training.tune.logging_steps: 1.5 cannot be used here"),
    ],
)
def test_columns_and_arguments_are_checked_before_the_model_is_loaded(
    hlora: Invoke, config: Path, tmp_path: Path, override: str, expected: str
) -> None:
    (tmp_path / "model").mkdir()  # which cannot be loaded
    settings = ["--set", f"model.name={tmp_path}/model", "--set", override.replace("PLACE", str(tmp_path))]
    status, _, err = hlora("run", config, *settings)
    assert status == 2 and expected in err, err


def test_rows_that_the_chat_template_refuses_are_blamed_on_the_data(
    hlora: Invoke, config: Path, tmp_path: Path, model_dir: str
) -> None:
    strict = "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    strict += "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = strict
    shutil.copytree(model_dir, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [{"role": role, "content": f"{role} says"} for role in ("user", "assistant", "assistant")]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 9, encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": turns[:2]}) + "\n", encoding="utf-8")
    fields = [f"model.name={tmp_path}/model", "domain.task=rows", f"domain.train={tmp_path}/chat.jsonl"]
    status, _, err = hlora("run", config, *(part for field in fields for part in ("--set", field)))
    assert status == 2 and "Conversation roles must alternate" in err and "Traceback" not in err, err
    assert "domain.train" in err or "chat.jsonl" in err, err


def test_the_arm_of_a_comparison_that_changes_a_refused_argument_is_named(
    hlora: Invoke, comparison_file: Path, tmp_path: Path
) -> None:
    changes = 'arms.EWC-LoRA.settings={"training.tune": {"optim": "galore_adamw"}}'
    status, _, err = hlora("compare", comparison_file, "--set", changes)
    assert status == 2 and "arms.EWC-LoRA: training.tune.optim: 'galore_adamw' cannot be used here" in err, err
    assert not (tmp_path / "grid" / "cells").exists()


def snapshot(job: Job) -> Iterator[Any]:
    """What a trial must leave as it was."""
    for part in (*job.base.modules(), job.base.config, job.base.generation_config):
        yield {name: str(value) for name, value in vars(part).items()}
    yield {name: (id(p), p._version, p.data_ptr()) for name, p in job.base.named_parameters()}
    yield AutoTokenizer.from_pretrained(job.config.model.name).special_tokens_map == job.tokenizer.special_tokens_map
    yield json.dumps(random_state(), default=lambda tensor: tensor.tolist())


def mixture_of_experts(model_dir: str, to: Path) -> str:
    """A tiny Mixtral with the tiny Llama's tokenizer."""
    shutil.copytree(model_dir, to)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    vocabulary = AutoConfig.from_pretrained(model_dir).vocab_size
    MixtralForCausalLM(MixtralConfig(**sizes, **experts, vocab_size=vocabulary)).save_pretrained(to)
    return str(to)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_trial_changes_neither_random_numbers_nor_model_nor_disk(
    job_fields: dict[str, Any], tmp_path: Path, model_dir: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "mixtral":
        job_fields["model"]["name"] = mixture_of_experts(model_dir, tmp_path / "mixtral")
    changes = ["training.common.gradient_checkpointing=true", "training.common.neftune_noise_alpha=5"]
    with monkeypatch.context() as untried:
        untried.setattr("hlora.run.job.try_phases", lambda job: None)
        job = Job.open(parse_config(job_fields, overrides=changes))
    torch.manual_seed(7)
    before, files = list(snapshot(job)), sorted(tmp_path.rglob("*"))
    try_phases(job)
    assert list(snapshot(job)) == before
    assert sorted(tmp_path.rglob("*")) == files
    assert not isinstance(job.base, PeftModel) and not any("lora" in name for name, _ in job.base.named_modules())
