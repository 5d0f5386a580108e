"""An adapter from elsewhere is measured as it is, and beside it the base model as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Invoke
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hlora.model.saved_adapter import changes_base, check_adapter
from hlora.system.errors import ArtifactError

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "embeddings": {},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "token rows": {"trainable_token_indices": [5, 6, 7, 300]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.fixture(scope="module")
def biased_model(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama, with biases in its attention."""
    directory = str(tmp_path_factory.mktemp("biased"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(model_dir, attention_bias=True)).save_pretrained(directory)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(directory)
    return directory


def trained(model: str, kind: str, directory: Path, text: str) -> None:
    """An adapter of a kind, trained by plain PEFT with everything that it makes trainable, and saved."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(model), LoraConfig(**settings, **KINDS[kind]))
    if kind == "embeddings":  # as after new tokens were added: PEFT saves the whole embedding
        tuned.get_input_embeddings().weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-2)
    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt")["input_ids"][:, 64:128]
    for _ in range(6):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(str(directory), save_embedding_layers=kind == "embeddings")


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_adapter_have_the_perplexities_that_plain_transformers_gives(
    kind: str, hlora: Invoke, biased_model: str, job_fields: dict[str, Any], tmp_path: Path, general_file: str
) -> None:
    text, adapter = Path(general_file).read_text(encoding="utf-8"), tmp_path / "out" / "adapter"
    trained(biased_model, kind, adapter, text)
    job_fields["model"]["name"] = biased_model
    measured = tmp_path / "measured.txt"
    measured.write_text(text[:600], encoding="utf-8")
    job_fields["evaluation"] = {"texts": {"text": str(measured)}, "max_tokens": 64, "window": 64, "max_rows": 2}
    job_fields["evaluation"] |= {"accuracy": False, "generate": 0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(job_fields), encoding="utf-8")
    status, _, err = hlora("evaluate", tmp_path / "run.yaml")
    assert status == 0, err
    arms = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["arms"]

    ids = AutoTokenizer.from_pretrained(biased_model)(text[:600], return_tensors="pt")["input_ids"][:, :64]
    fresh = AutoModelForCausalLM.from_pretrained(biased_model)
    with torch.no_grad():
        expected = {"base": float(fresh(input_ids=ids, labels=ids).loss.exp())}
        tuned = PeftModel.from_pretrained(fresh, str(adapter)).eval()
        expected["hlora"] = float(tuned(input_ids=ids, labels=ids).loss.exp())
    assert expected["hlora"] != pytest.approx(expected["base"], rel=1e-3)
    for arm, perplexity in expected.items():
        assert arms[arm]["texts"]["text"]["perplexity"] == pytest.approx(perplexity, rel=1e-4), arm
    assert changes_base(adapter) is (kind not in ("plain", "gaussian"))


def test_a_saved_head_of_another_vocabulary_is_named(biased_model: str, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(biased_model, vocab_size=390)
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM(config), settings).save_pretrained(str(tmp_path / "adapter"))
    base = LlamaForCausalLM.from_pretrained(biased_model)
    with pytest.raises(ArtifactError, match=r"adapter: lm_head\.weight is 390 × 32, that of \S+ is 384 × 32"):
        check_adapter(base, tmp_path / "adapter")


def test_a_directory_without_an_adapter_says_how_to_make_one(biased_model: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no adapter there.*`hlora tune`"):
        check_adapter(LlamaForCausalLM.from_pretrained(biased_model), tmp_path)
