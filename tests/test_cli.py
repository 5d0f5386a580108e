"""The command line answers at once, prints paths as they are, and explains itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Invoke

from hlora.config.comparison import CompareConfig
from hlora.config.reading import parse_config

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "lm_eval", "matplotlib", "pandas", "scipy")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["config"],
        ["run", "nofile.yaml"],
        ["run", "run.yaml", "--set", "training.common.learnig_rate=1"],
        ["run", "run.yaml", "--set", "training.common.report_to=wanbd"],
        ["tune", "run.yaml", "--set", "domain.train=missing.jsonl"],
        ["cost", "run.yaml", "--set", "model.device=gpu"],
        ["compare", "run.yaml"],
    ],
    ids=" ".join,
)
def test_help_and_errors_of_the_configuration_import_nothing_heavy(
    arguments: list[str], tmp_path: Path, job_fields: dict[str, Any]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(job_fields), encoding="utf-8")
    program = (
        f"import sys\nfrom hlora.cli import main\nsys.argv = {['hlora', *arguments]!r}\n"
        "try:\n    main()\n"
        f"except SystemExit:\n    print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_h_is_help(hlora: Invoke) -> None:
    for arguments in ((), ("run",), ("compare",)):
        status, out, _ = hlora(*arguments, "-h")
        assert status == 0 and out == hlora(*arguments, "--help")[1]


def test_help_of_compare_names_the_command_that_prints_a_comparison_to_start_from(hlora: Invoke) -> None:
    assert "hlora config --compare" in " ".join(hlora("compare", "--help")[1].replace("│", " ").split())
    printed = hlora("config", "--compare")[1]
    config = parse_config(yaml.safe_load(printed), kind=CompareConfig)
    assert list(config.arms) == ["Base", "LoRA(μ)", "EWC-LoRA", "HLoRA"] and list(config.tasks) == ["mine"]
    for section in (CompareConfig.model_fields["arms"], CompareConfig.model_fields["selection"]):
        assert f"# {section.description}" in printed


def test_a_path_with_brackets_is_printed_as_it_is(
    hlora: Invoke, tmp_path: Path, job_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "[bold]run[1]"
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**job_fields, "output": str(place)}), encoding="utf-8")
    status, out, err = hlora("record", config)
    assert status == 0, err
    assert out.strip() == f"importance: {place}/importance"
    monkeypatch.setattr("hlora.cli.console.width", 400)
    status, out, _ = hlora("inspect", place / "importance", "--figure", place / "map")
    assert status == 0 and f"heat map: {place}/map.png, {place}/map.svg" in out and str(place / "importance") in out
    (place / "results.json").write_text(json.dumps({"arms": {}}), encoding="utf-8")
    assert hlora("report", place)[1].strip() == f"report: {place}/report.html"


def test_output_that_is_ascii_gets_other_characters_escaped() -> None:
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "hlora", "config", "--schema"]
    printed = subprocess.run(command, env=ascii_only, capture_output=True, check=True).stdout
    assert printed.isascii() and b"\\u" in printed
    assert json.loads(printed)["properties"]
