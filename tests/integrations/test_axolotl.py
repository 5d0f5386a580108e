"""Axolotl's own training with hlora's plugin: recorded, then protected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from frameworks import STEPS, distance, rows

from hlora import Importance

PLAIN = {
    "system_prompt": "",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "format": "{instruction}",
    "no_input_format": "{instruction}",
}


def train(model_dir: str, tmp_path: Path, name: str, number: int, **settings: Any) -> Path:
    data = rows(tmp_path / f"{name}.json", name)
    output = tmp_path / f"out-{number}"
    fields = {
        "base_model": model_dir,
        "plugins": ["hlora.integrations.axolotl.HloraPlugin"],
        "hlora": settings,
        "datasets": [{"path": str(data), "type": PLAIN, "ds_type": "json"}],
        "dataset_prepared_path": str(tmp_path / f"prepared-{name}"),
        "sequence_len": 128,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_qkv_kernel": False,  # else Axolotl switches all of its kernels on
        "max_steps": STEPS,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "logging_steps": 1,
        "output_dir": str(output),
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "use_cpu": True,
        "attn_implementation": "sdpa",
        "dataset_num_proc": 1,
    }
    config = tmp_path / f"{name}-{number}.yaml"
    config.write_text(yaml.safe_dump(fields), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "axolotl.cli.train", str(config)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return output


def test_axolotl_records_and_is_held_to_what_it_recorded(model_dir: str, tmp_path: Path) -> None:
    importance = str(tmp_path / "importance")
    train(model_dir, tmp_path, "general", 0, record=importance)
    assert Importance.load(importance).provenance["steps"] == STEPS
    far, near = (
        distance(
            model_dir, train(model_dir, tmp_path, "domain", number, importance=importance, phi=phi), Path(importance)
        )
        for number, phi in ((1, 0.0), (2, 50.0))
    )
    print(f"Axolotl: weighted distance {near:.3g} with phi 50, {far:.3g} without")
    assert 0 < near < 0.5 * far
