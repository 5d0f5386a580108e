"""`hlora push`, by the hub's own client, to a hub on this machine; and what then comes from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub import Hub, running
from peft import PeftModel

from hlora.importance.artefact import Importance
from hlora.report.card import named_card, public_card

USE = """
import sys
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
import hlora
from hlora import cli

base, output, *commands = sys.argv[1:]
for command in commands:
    sys.argv = ["hlora", "push", *command.split()]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
args = SFTConfig(output, max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no")
rows = Dataset.from_dict({"text": ["One and one is two."] * 8})
trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(base))
penalty = hlora.protect(trainer, "ann/importance", phi=1.0)
trainer.train()
print("held", len(penalty.matrices), float(penalty()) > 0)
"""


@pytest.mark.slow
def test_what_is_pushed_is_complete_and_protects_from_the_hub_on_a_fresh_cache(
    tuned_run: Path, model_dir: str, tmp_path: Path
) -> None:
    with running() as hub:
        token = "hf_" + "plantedpush" * 2
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "fresh"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token,
            "NO_PROXY": "127.0.0.1",
        }

        (tmp_path / "use.py").write_text(USE, encoding="utf-8")
        commands = f"{tuned_run}/importance ann/importance --license mit", f"{tuned_run}/adapter ann/adapter --private"
        script = [sys.executable, "use.py", model_dir, str(tmp_path / "trained"), *commands]
        done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"uploaded: {hub.address}/ann/importance" in done.stdout and "held 4 True" in done.stdout
        assert any("GET /ann/importance/resolve" in request for request in hub.seen)
        assert hub.private == {"ann/adapter"} and f"Bearer {token}" in hub.tokens

        importance, adapter = hub.repos["ann/importance"], hub.repos["ann/adapter"]
        written = {path.name: path.read_bytes() for path in (tuned_run / "importance").iterdir()}
        assert importance.keys() == written.keys()
        assert importance["importance.safetensors"] == written["importance.safetensors"]
        assert adapter.keys() == {path.name for path in (tuned_run / "adapter").iterdir()}
        for files in (importance, adapter):
            assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".md", ".jinja"}
            for name, content in files.items():
                assert str(tuned_run.parent).encode() not in content, f"{name} holds a path of this machine"
                assert str(Path(model_dir).parent).encode() not in content and token.encode() not in content, name
        head = yaml.safe_load(importance["README.md"].decode().split("---")[1])
        assert head["license"] == "mit" and "hlora" in head["tags"]
        assert 'hlora.protect(trainer, "ann/importance", phi=1.0)' in importance["README.md"].decode()
        assert "| answer NLL, nats |" in adapter["README.md"].decode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process uploads to."""
    with running() as found:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield found


@pytest.mark.parametrize("licence", [(), ("--license", "mit")])
def test_nothing_of_this_machine_is_in_what_a_script_saved(
    peft_model: PeftModel, model_dir: str, tuned_run: Path, tmp_path: Path, hub: Hub, hlora: Any, licence: Any
) -> None:
    """The card is PEFT's own, with what TRL adds; a checkpoint has the state of its Trainer beside it."""
    saved = tmp_path / "checkpoint-2"
    peft_model.save_pretrained(str(saved), save_embedding_layers=False)
    card = (saved / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == model_dir and f"base_model:adapter:{model_dir}" in head["tags"]
    seen = f"\nSee [the log]({tmp_path}/log), <b>bold</b> <br/> and https://example.org/a/b.\n"
    card = card.replace("tags:", f"datasets:\n- {tmp_path}/rows.jsonl\ntags:")
    (saved / "README.md").write_text(card + seen, encoding="utf-8")
    shutil.copy(tuned_run / "adapter" / "tokenizer.json", saved)
    settings = {"special_tokens_map_file": f"{tmp_path}/map.json", "chat_template": "{{ '/x' }}"}
    (saved / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (saved / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(saved)}), encoding="utf-8")

    assert hlora("push", saved, "ann/adapter", *licence)[0] == 0
    sent = hub.repos["ann/adapter"]
    assert "trainer_state.json" not in sent and {"tokenizer.json", "adapter_model.safetensors"} <= sent.keys()
    for name, content in sent.items():
        assert str(tmp_path.parent).encode() not in content, f"{name} holds a path of this machine"
    written = sent["README.md"].decode()
    head = yaml.safe_load(written.split("---")[1])
    assert (
        "base_model" not in head and head["datasets"] == ["rows.jsonl"] and {"lora", "transformers"} <= {*head["tags"]}
    )
    assert head.get("license") == (licence[1] if licence else None)
    assert "[the log](log), <b>bold</b> <br/> and https://example.org/a/b." in written
    assert json.loads(sent["tokenizer_config.json"])["chat_template"] == "{{ '/x' }}"


def test_a_base_model_of_the_hub_stays_in_the_head_of_a_card() -> None:
    tags = "- base_model:adapter:ann/base\n- license:mit\n- base_model:adapter:C:\\models\\base"
    head = f"base_model: ann/base\ntags:\n{tags}"
    public = yaml.safe_load(public_card(f"---\n{head}\n---\n\n# Mine\n").split("---")[1])
    assert public == {"base_model": "ann/base", "tags": ["base_model:adapter:ann/base", "license:mit"]}


@pytest.mark.parametrize("card", ["# Mine\n\n---\n\nText.\n", "---\n[\n---\nText.\n", ""])
def test_a_card_without_fields_in_its_head_is_text(card: str) -> None:
    assert public_card(card) == card and named_card(card, "ann/x", "mit") == f"---\nlicense: mit\n---\n{card}"


def test_a_hub_that_cannot_be_reached_is_one_message(
    tuned_run: Path, hlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    status, _, err = hlora("push", tuned_run / "importance", "ann/importance")
    assert status == 2 and "ann/importance: could not be uploaded" in err and "hf auth login" in err


@pytest.mark.parametrize("repo", ["importance", "a/b/c", "../x/y", "ann/im portance"])
def test_a_repository_is_user_and_name(tuned_run: Path, hlora: Any, repo: str) -> None:
    status, _, err = hlora("push", tuned_run / "importance", repo)
    assert status == 2 and "REPO: expected user/name" in err


def test_what_is_neither_importance_nor_adapter_is_refused_with_both_places(tuned_run: Path, hlora: Any) -> None:
    status, _, err = hlora("push", tuned_run, "ann/run")
    assert status == 2 and str(tuned_run / "adapter") in err and str(tuned_run / "importance") in err


def test_the_card_of_an_importance_says_what_was_recorded_and_measured(tuned_run: Path) -> None:
    card = (tuned_run / "importance" / "README.md").read_text(encoding="utf-8")
    facts = json.loads((tuned_run / "importance" / "importance.json").read_text(encoding="utf-8"))
    assert (
        "Recorded by squared gradients" in card
        and "2 optimizer steps." in card
        and "r 4, lora_alpha 8.0, target_modules q_proj, v_proj" in card
    )
    assert "| perplexity, general (held out) |" in card
    assert facts["provenance"]["recorded_with"]["training"]["max_steps"] == 2
    assert Importance.load(tuned_run / "importance").matrices
