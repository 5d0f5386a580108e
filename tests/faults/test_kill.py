"""Whenever a run is killed or its disk fails, the same command ends afterwards as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

HARNESS = Path(__file__).with_name("kill.py")
POINTS = 400 if "HLORA_LONG" in os.environ else 6  # of run, with its evaluation, and compare
FAILURES = max(3, POINTS // 4)
SCENARIOS = {
    "run": {
        "killed": math.ceil(POINTS * 2 / 3),
        "disk fails": FAILURES,
        "short writes": math.ceil(FAILURES * 2 / 3),
        "vanishes": math.ceil(FAILURES / 3),
    },
    "compare": {"killed": math.ceil(POINTS / 3)},
}


@pytest.mark.slow
@pytest.mark.parametrize("command", SCENARIOS)
def test_whatever_happens_to_its_writing_the_same_command_ends_afterwards_without_a_difference(
    command: str,
    tmp_path: Path,
    job_fields: dict[str, Any],
    comparison_file: Path,
    tally: Callable[..., None],
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
            "baselines": ["lora_after_general"],
        },
        "compare": {
            **compared,
            "seeds": [0],
            "training": training,
            "evaluation": {**compared["evaluation"], **evaluation},
            "arms": {"Base": {"method": "base"}, "HLoRA": {"method": "hlora", "strengths": [1]}},
        },
    }  # fmt: skip
    file, wanted = tmp_path / "fields.json", SCENARIOS[command]
    file.write_text(json.dumps(fields[command]), encoding="utf-8")
    line = [sys.executable, str(HARNESS), str(file), command, *(f"{name}={points}" for name, points in wanted.items())]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    each = json.loads(done.stdout)
    assert each.keys() == wanted.keys()
    for name, found in each.items():
        what = f"{command}, {name}, and resumed"
        tally(what, cases=found["points"], good=found["as_expected"], bad=len(found["differences"]))
    for name, found in each.items():
        assert found["differences"] == [], name
        assert found["points"] == found["as_expected"] == found["resumed"] == min(wanted[name], found["of"]), name
