"""`hlora merge`: the merged model is the tuned one, or there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import move_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from hlora.after.merge import BOUNDS, _savable, merge
from hlora.system.errors import ArtifactError

IDS = torch.arange(3, 60)[None]


def test_a_merged_model_has_the_adapters_logits_and_its_tokenizer(
    tuned_run: Path, model_dir: str, tmp_path: Path, hlora: Any
) -> None:
    status, out, err = hlora("merge", tuned_run, tmp_path / "merged")
    assert status == 0, err
    assert f"merged model: {tmp_path / 'merged'}" in out and "bound 1e-04, float32" in out
    base = LlamaForCausalLM.from_pretrained(model_dir)
    before = base(input_ids=IDS).logits
    tuned = PeftModel.from_pretrained(base, str(tuned_run / "adapter"))(input_ids=IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=IDS).logits
    assert torch.allclose(merged, tuned, atol=1e-5) and not torch.allclose(merged, before, atol=1e-2)
    text = "What is 7 plus one?"
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (model_dir, tmp_path / "merged")]
    assert len({str(tokenizer(text)["input_ids"]) for tokenizer in tokenizers}) == 1
    suffixes = {path.suffix for path in (tmp_path / "merged").iterdir()}
    assert suffixes <= {".safetensors", ".json", ".md", ".jinja"}
    assert "merged into it" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")


def test_a_merged_model_stops_where_the_chat_template_ends_a_turn(
    tuned_run: Path, model_dir: str, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(model_dir, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<bos>{% endfor %}"
    tokenizer.save_pretrained(base)
    merge(tuned_run, tmp_path / "merged", [f"model.name={base}"])
    ends = GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    assert ends == [tokenizer.eos_token_id, tokenizer.bos_token_id]
    merge(tuned_run, tmp_path / "plain")
    assert GenerationConfig.from_pretrained(tmp_path / "plain").eos_token_id == tokenizer.eos_token_id


def test_a_tuning_that_rounding_would_swallow_is_not_merged(tuned_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "weak"
    shutil.copytree(tuned_run, run)
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: 0.03 * factor for name, factor in load_file(path).items()}, path)
    with pytest.raises(ArtifactError, match=r"rounding the merged weights to bfloat16.*model.dtype=float32"):
        merge(run, tmp_path / "merged", ["model.dtype=bfloat16"])
    assert not (tmp_path / "merged").exists()
    found = merge(run, tmp_path / "merged")
    assert found.error <= BOUNDS["float32"] and found.error < found.effect


def test_a_merge_that_changes_another_weight_with_it_is_refused(model_dir: str, tmp_path: Path) -> None:
    """LoRA on an output that shares its weight with the embedding, which the merge changes too."""
    base = LlamaForCausalLM.from_pretrained(model_dir)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "tied")
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    model = get_peft_model(tied, LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    move_adapter(model, deviation=0.5)
    model.save_pretrained(tmp_path / "run" / "adapter", save_embedding_layers=False)
    fields = {"model": {"name": str(tmp_path / "tied"), "device": "cpu"}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"above the bound of 0\.0001 for float32\. Nothing was written"):
        merge(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("run", "target", "problem"),
    [
        ("nothing", "merged", "config.yaml is missing"),
        ("run/adapter", "merged", "expected the output directory of a run"),
        ("run", "full", "full: not empty"),
        ("run", "full/file", "cannot be used"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    tuned_run: Path, tmp_path: Path, hlora: Any, run: str, target: str, problem: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine", encoding="utf-8")
    status, _, err = hlora("merge", tuned_run.parent / run, tmp_path / target)
    assert status == 2 and problem in err and "Traceback" not in err
    assert (tmp_path / "full" / "file").read_text(encoding="utf-8") == "mine"


def test_the_adapter_of_a_run_carries_tokenizer_and_card_and_names_its_base(tuned_run: Path, model_dir: str) -> None:
    adapter = tuned_run / "adapter"
    assert AutoTokenizer.from_pretrained(adapter).get_vocab() == AutoTokenizer.from_pretrained(model_dir).get_vocab()
    assert yaml.safe_load((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == model_dir
    assert "More Information Needed" not in (adapter / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),  # as Llama-2-chat
        ({"do_sample": False, "top_k": 20}, {"do_sample": True, "top_k": 20}),
        ({"do_sample": True, "temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"repetition_penalty": 1.3}, {"do_sample": None, "repetition_penalty": 1.3}),
        ({"num_beams": 1, "length_penalty": 2.0, "pad_token_id": -1}, {"length_penalty": None, "pad_token_id": None}),
    ],
)
def test_the_authors_generation_settings_are_written_as_transformers_takes_them(
    settings: dict[str, Any], kept: dict[str, Any], tmp_path: Path
) -> None:
    written = _savable(GenerationConfig(bos_token_id=0, eos_token_id=[1, 4], **settings))
    written.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again.bos_token_id == 0 and again.eos_token_id == [1, 4]
    assert {name: getattr(again, name) for name in kept} == kept


def test_a_temperature_without_sampling_is_merged_too(tuned_run: Path, model_dir: str, tmp_path: Path) -> None:
    base = Path(shutil.copytree(model_dir, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "generation_config.json").unlink()  # in config.json, as models of 2023 have it
    (base / "config.json").write_text(json.dumps({**config, "temperature": 0.6, "top_p": 0.9}), encoding="utf-8")
    merge(tuned_run, tmp_path / "merged", [f"model.name={base}"])
    found = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (found.do_sample, found.temperature, found.top_p) == (True, 0.6, 0.9)
