"""The adapters that hlora writes, used where hlora cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import move_adapter, record
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from hlora.config.sections import LoraSettings, ModelConfig
from hlora.model import embedded
from hlora.model.base import load_base
from hlora.model.lora import attach_lora

CONSUMER = """
import sys
sys.modules["hlora"] = None  # any import of it is an error
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

base, *adapters = sys.argv[1:]
for adapter in adapters:
    known = load_file(f"{adapter}.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(known["ids"]).logits, known["logits"], rtol=0, atol=0)
        torch.testing.assert_close(model.merge_and_unload()(known["ids"]).logits, known["logits"], rtol=1e-5, atol=1e-5)
print("read", len(adapters))
"""


@pytest.mark.slow
def test_plain_peft_loads_and_merges_what_hlora_saved(
    peft_model: PeftModel, token_ids: Tensor, model_dir: str, tmp_path: Path
) -> None:
    record(peft_model, token_ids).save(tmp_path / "importance")
    for what in ("importance", "adapter"):
        if what == "adapter":
            move_adapter(peft_model)
            peft_model.save_pretrained(tmp_path / what)
        with torch.no_grad():
            logits = peft_model.eval()(token_ids).logits
        save_file({"ids": token_ids.clone(), "logits": logits}, tmp_path / f"{what}.safetensors")
    command = [sys.executable, "-c", CONSUMER, model_dir, str(tmp_path / "importance"), str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "read 2" in done.stdout, done.stderr[-2000:]


def test_an_adapter_names_its_base_as_the_configuration_does(
    model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the directory of a cache, which is another on the next machine."""
    monkeypatch.setattr(embedded, "model_directory", lambda: Path(model_dir))
    base, _ = load_base(ModelConfig(name=embedded.MODEL_NAME, device="cpu"))
    attach_lora(base, LoraSettings(rank=2), 0).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == embedded.MODEL_NAME
