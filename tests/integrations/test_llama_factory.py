"""LLaMA-Factory's own training with hlora's callbacks: recorded, then protected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from frameworks import STEPS, distance, rows

from hlora import Importance


def train(model_dir: str, tmp_path: Path, name: str, number: int, *options: str) -> Path:
    rows(tmp_path / f"{name}.json", name)
    known = {each.stem: {"file_name": each.name} for each in tmp_path.glob("*.json") if each.stem != "dataset_info"}
    (tmp_path / "dataset_info.json").write_text(json.dumps(known), encoding="utf-8")
    output = tmp_path / f"out-{number}"
    fields = {
        "model_name_or_path": model_dir,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_alpha": 8,
        "lora_target": "q_proj,v_proj",
        "dataset_dir": str(tmp_path),
        "dataset": name,
        "template": "empty",
        "cutoff_len": 64,
        "output_dir": str(output),
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
    }
    config = tmp_path / f"{name}.yaml"
    config.write_text(yaml.safe_dump(fields), encoding="utf-8")
    command = [sys.executable, "-m", "hlora.integrations.llama_factory", str(config), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_llama_factory_records_and_is_held_to_what_it_recorded(model_dir: str, tmp_path: Path) -> None:
    importance = tmp_path / "importance"
    train(model_dir, tmp_path, "general", 0, "--record", str(importance))
    assert Importance.load(importance).provenance["steps"] == STEPS
    held = ("--importance", str(importance))
    far, near = (
        distance(model_dir, train(model_dir, tmp_path, "domain", number, *held, "--phi", phi), importance)
        for number, phi in ((1, "0"), (2, "50"))
    )
    print(f"LLaMA-Factory: weighted distance {near:.3g} with phi 50, {far:.3g} without")
    assert 0 < near < 0.5 * far
