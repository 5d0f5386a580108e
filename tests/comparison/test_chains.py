"""`hlora compare` with domains: every method learns the same rows in the same steps; a chain is computed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hlora.comparison.chains.methods import _overlap
from hlora.config.chains import ChainComparison
from hlora.config.reading import load_chains
from hlora.methods import CHAINS
from hlora.system.errors import ConfigError


@pytest.fixture
def chain_file(job_fields: dict[str, Any], tmp_path: Path) -> Path:
    plus = job_fields.pop("domain")
    rows = [{"prompt": f"What is {n} minus one?", "completion": f" {n - 1}"} for n in range(32)]
    for name, part in (("train", rows[:24]), ("test", rows[24:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"minus-{name}.jsonl").write_text(text, encoding="utf-8")
    minus = {"task": "rows", **{name: str(tmp_path / f"minus-{name}.jsonl") for name in ("train", "test")}}
    evaluation = {"max_tokens": 64, "window": 32, "stride": 32, "accuracy": False, "generate": 0}
    fields = {**job_fields, "domains": [{"name": "plus", **plus}, {"name": "minus", **minus}], "evaluation": evaluation}
    fields |= {"output": str(tmp_path / "chains")}
    for field in ("seed", "baselines"):
        fields.pop(field, None)
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return file


@pytest.mark.slow
def test_the_methods_agree_until_a_second_domain_comes_and_finished_chains_are_kept(
    chain_file: Path, tmp_path: Path, hlora: Any
) -> None:
    cells = tmp_path / "chains" / "cells"
    status, out, err = hlora("compare", chain_file, "--set", "seeds=[0]")
    assert status == 0, err
    found = {path.stem: json.loads(path.read_text(encoding="utf-8"))["chain"] for path in cells.glob("*.json")}
    assert len(found) == 13  # seven methods, six of them in both orders
    for order, first in (("plus-minus", "plus"), ("minus-plus", "minus")):
        alone = found[f"sequential-{order}-0"]
        for other in ("replay", "online_ewc", "olora"):  # their first domain is plain LoRA
            assert found[f"{other}-{order}-0"]["after"][first] == alone["after"][first]
            assert found[f"{other}-{order}-0"]["after"] != alone["after"]
        assert found[f"hlora-{order}-0"]["after"] != found[f"uniform-{order}-0"]["after"]
    own, forward = found["one_each-plus-minus-0"]["after"], found["sequential-plus-minus-0"]["after"]
    assert own["plus"]["plus"] == forward["plus"]["plus"]
    assert own["minus"]["minus"] == found["sequential-minus-plus-0"]["after"]["minus"]["minus"]

    table = (tmp_path / "chains" / "chains.md").read_text(encoding="utf-8")
    assert table.strip() in out and table.count(" ± ") >= 13
    made = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    (cells / "sequential-plus-minus-0.json").unlink()
    assert hlora("compare", chain_file, "--set", "seeds=[0]")[0] == 0
    again = json.loads((cells / "sequential-plus-minus-0.json").read_text(encoding="utf-8"))["chain"]
    assert again == found["sequential-plus-minus-0"]
    kept = [path for path, before in made.items() if path.stat().st_mtime_ns == before]
    assert len(kept) == 12
    assert (tmp_path / "chains" / "chains.md").read_text(encoding="utf-8") == table

    importance = tmp_path / "chains" / "seed-0" / "importance" / "importance.safetensors"
    recorded = importance.read_bytes()
    for path in cells.glob("*.json"):
        path.rename(path.with_suffix(".kept"))
    fewer = ("seeds=[0]", "methods=[hlora]", "orders=given", "training.record.max_steps=2")
    assert hlora("compare", chain_file, *(part for each in fewer for part in ("--set", each)))[0] == 0
    assert importance.read_bytes() != recorded, "an importance of another general phase was used"
    for path in cells.glob("*.kept"):
        path.rename(path.with_suffix(".json"))

    status, _, err = hlora("compare", chain_file, "--set", "seeds=[0]", "--set", "penalty.phi=3")
    assert status == 2 and "has other settings: penalty.phi" in err, err
    (tmp_path / "minus-train.jsonl").write_text('{"prompt": "2 - 1?", "completion": " 1"}\n' * 2, encoding="utf-8")
    status, _, err = hlora("compare", chain_file)  # a second seed, of other data
    assert status == 2 and "has chains of other data: minus" in err, err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["domains=[{task: rows, train: a.jsonl, test: b.jsonl}]"], "domains: expected two or more"),
        (["seed=1"], "seed: a comparison has seeds"),
        (["after=runs/a"], "after: every method starts from the base model"),
        (["methods=[sequental]"], "methods.0: expected one of hlora, .*; got 'sequental'; did you mean 'sequential'"),
        (["baselines=[lora]"], "baselines: methods names what is compared"),
    ],
)
def test_what_a_comparison_of_chains_cannot_have_is_refused_by_name(
    chain_file: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_chains(chain_file, changes)


def test_options_of_a_grid_are_refused_for_chains(chain_file: Path, hlora: Any) -> None:
    status, _, err = hlora("compare", chain_file, "--dry-run")
    assert status == 2 and "without --dry-run" in err


def test_the_configuration_compares_every_method_in_both_orders_by_default(chain_file: Path) -> None:
    config = load_chains(chain_file)
    assert isinstance(config, ChainComparison)
    assert config.methods == list(CHAINS) and config.seeds == [0, 1] and config.orders == "both"


def test_the_overlap_of_orthogonal_rows_is_zero_and_that_of_equal_ones_their_squares() -> None:
    a = torch.eye(4)[:2]
    batch: Any = None
    assert _overlap([], [a], batch) == 0
    assert _overlap([[torch.eye(4)[2:]]], [a], batch) == 0
    assert _overlap([[2 * a], [a]], [a], batch) == 2 * 4 + 2
