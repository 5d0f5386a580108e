"""`hlora push`, by the hub's own client, to a hub on this machine; and what then comes from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub import running

from hlora.importance.artefact import Importance

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
