"""ms-swift's own training with hlora's callbacks: recorded, then protected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from frameworks import STEPS, distance, rows

from hlora import Importance


def train(model_dir: str, tmp_path: Path, name: str, number: int, callback: str) -> Path:
    data = rows(tmp_path / f"{name}.json", name)
    plugin = tmp_path / f"{name}_plugin.py"
    lines = ("import hlora", "from hlora.integrations.ms_swift import register", f"register(hlora.{callback})")
    plugin.write_text("\n".join(lines), encoding="utf-8")
    output = tmp_path / f"out-{number}"
    fields = {
        "model": model_dir,
        "model_type": "llama",
        "template": "default",
        "tuner_type": "lora",
        "lora_rank": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.0,
        "dataset": data,
        "max_length": 250,
        "output_dir": output,
        "add_version": "false",
        "max_steps": STEPS,
        "save_steps": STEPS,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": "true",
        "torch_dtype": "float32",
        "external_plugins": plugin,
        "callbacks": "hlora",
    }
    options = []
    for field, value in fields.items():
        options += [f"--{field}", *map(str, value if isinstance(value, list) else [value])]
    start = "from swift.pipelines import sft_main; sft_main()"
    environment = {**os.environ, "USE_HF": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", start, *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return output / f"checkpoint-{STEPS}"


def test_ms_swift_records_and_is_held_to_what_it_recorded(model_dir: str, tmp_path: Path) -> None:
    importance = tmp_path / "importance"
    train(model_dir, tmp_path, "general", 0, f"RecordCallback({str(importance)!r})")
    assert Importance.load(importance).provenance["steps"] == STEPS
    far, near = (
        distance(
            model_dir,
            train(model_dir, tmp_path, "domain", number, f"ProtectCallback({str(importance)!r}, {phi})"),
            importance,
        )
        for number, phi in ((1, 0.0), (2, 50.0))
    )
    print(f"ms-swift: weighted distance {near:.3g} with phi 50, {far:.3g} without")
    assert 0 < near < 0.5 * far
