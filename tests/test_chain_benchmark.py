"""benchmarks/chain.py: every method learns the same domains in the same steps, and a cell is computed once."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY


@pytest.mark.slow
def test_the_methods_agree_until_a_second_domain_comes_and_cells_are_kept(
    job_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plus = job_fields.pop("domain")
    rows = [{"prompt": f"What is {n} minus one?", "completion": f" {n - 1}"} for n in range(32)]
    for name, part in (("train", rows[:24]), ("test", rows[24:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"minus-{name}.jsonl").write_text(text, encoding="utf-8")
    minus = {"task": "rows", **{name: str(tmp_path / f"minus-{name}.jsonl") for name in ("train", "test")}}
    evaluation = {"max_tokens": 64, "window": 32, "stride": 32, "accuracy": False, "generate": 0}
    fields = {**job_fields, "domains": [{"name": "plus", **plus}, {"name": "minus", **minus}], "evaluation": evaluation}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    cells = tmp_path / "runs" / "cells"

    def benchmark(*arguments: str) -> list[str]:
        """The lines that it prints, without those of progress bars."""
        monkeypatch.setattr(sys, "argv", ["chain.py", *arguments])
        runpy.run_path(str(REPOSITORY / "benchmarks" / "chain.py"), run_name="__main__")
        return [line for line in capsys.readouterr().out.splitlines() if line.strip()]

    command = ["--config", str(tmp_path / "chain.yaml"), "--output", str(tmp_path / "runs"), "--seeds", "0"]
    assert len(benchmark(*command)) == 13  # seven methods, six of them in both orders
    found = {path.stem: json.loads(path.read_text(encoding="utf-8"))["chain"] for path in cells.glob("*.json")}
    for order, first in (("plus-minus", "plus"), ("minus-plus", "minus")):
        alone = found[f"sequential-{order}-0"]
        for other in ("replay", "online_ewc", "olora"):  # their first domain is plain LoRA
            assert found[f"{other}-{order}-0"]["after"][first] == alone["after"][first]
            assert found[f"{other}-{order}-0"]["after"] != alone["after"]
        assert found[f"hlora-{order}-0"]["after"] != found[f"uniform-{order}-0"]["after"]
    own, forward = found["one_each-plus-minus-0"]["after"], found["sequential-plus-minus-0"]["after"]
    assert own["plus"]["plus"] == forward["plus"]["plus"]
    assert own["minus"]["minus"] == found["sequential-minus-plus-0"]["after"]["minus"]["minus"]
    assert benchmark(*command) == []  # all are there
    table = benchmark("table", str(cells))
    assert len(table) == 2 + 13 and all(" ± " in row for row in table[2:])
