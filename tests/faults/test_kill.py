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
POINTS = int(os.environ.get("HLORA_KILL_POINTS", "9"))  # of run, with its evaluation, and compare
FAILURES = max(3, POINTS // 4)


# The longest first. Each is a process of its own, so that pytest-xdist can divide them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "points"),
    [
        ("compare, killed", math.ceil(POINTS / 3)),
        ("run, killed", math.ceil(POINTS * 2 / 3)),
        ("run, disk fails", FAILURES),
        ("run, short writes", math.ceil(FAILURES * 2 / 3)),
        ("run, output vanishes", math.ceil(FAILURES / 3)),
    ],
)
def test_whatever_happens_to_its_writing_the_same_command_ends_afterwards_without_a_difference(
    scenario: str,
    points: int,
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
    (tmp_path / "fields.json").write_text(json.dumps(fields), encoding="utf-8")
    command = [sys.executable, str(HARNESS), str(tmp_path / "fields.json"), scenario, str(points)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    tally(f"{scenario}, and resumed", cases=found["points"], good=found["as_expected"], bad=len(found["differences"]))
    assert found["differences"] == []
    assert found["points"] == found["as_expected"] == found["resumed"] == min(points, found["of"])
