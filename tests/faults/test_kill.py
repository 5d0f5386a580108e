"""Whenever a run is killed or its disk fails, the same command ends afterwards as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

HARNESS = Path(__file__).with_name("kill.py")
POINTS = int(os.environ.get("HLORA_KILL_POINTS", "50"))


@pytest.mark.slow
def test_killed_or_without_a_disk_at_any_point_and_resumed_there_is_no_difference(
    tmp_path: Path, job_fields: dict[str, Any], comparison_file: Path
) -> None:
    evaluation = {"max_tokens": 64, "window": 32, "stride": 32, "generate": 0, "accuracy": False, "max_rows": 4}
    training = {
        "common": {"learning_rate": 5e-3, "per_device_train_batch_size": 4},
        "record": {"max_steps": 3, "max_length": 32},
        "tune": {"max_steps": 3, "max_length": 32},
    }
    compared = yaml.safe_load(comparison_file.read_text(encoding="utf-8"))
    fields = {
        "run": {
            **job_fields,
            "domain": {"task": "multiple_choice", "train": str(tmp_path / "train.jsonl"),
                       "test": str(tmp_path / "test.jsonl")},
            "training": training,
            "evaluation": evaluation,
            "baselines": ["lora_nu_mu"],
        },
        "compare": {
            **compared,
            "seeds": [0],
            "training": training,
            "evaluation": {**compared["evaluation"], **evaluation},
            "arms": {"Base": {"method": "base"}, "HLoRA": {"method": "hlora", "strengths": [1]}},
        },
    }  # fmt: skip
    (tmp_path / "fields.json").write_text(json.dumps(fields), encoding="utf-8")
    command = [
        sys.executable,
        str(HARNESS),
        str(tmp_path / "fields.json"),
        "--points",
        str(POINTS),
        "--failures",
        str(max(2, POINTS // 4)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(scenario["as_expected"] for name, scenario in found.items() if "killed" in name) >= min(50, POINTS)
    for name, scenario in found.items():
        assert scenario["differences"] == [], name
        assert scenario["as_expected"] == scenario["resumed"] == scenario["points"] > 0
