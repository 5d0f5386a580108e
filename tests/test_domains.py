"""`domains` in a configuration: several domains, one after another, each a run that goes on from the one before."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hlora import pipeline
from hlora.config.data_files import named_files
from hlora.config.reading import parse_config
from hlora.run.chain import steps_of
from hlora.system.errors import ConfigError

FILES = ("adapter/adapter_model.safetensors", "importance-after/importance.safetensors")

KILLED = """
import os, signal, sys
from hlora.training import checkpoint

complete = checkpoint.complete_checkpoint

def then_die(directory):
    complete(directory)
    if directory.match("minus/logs/tune/checkpoint-2"):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint._EVERY, checkpoint.complete_checkpoint = 0.0, then_die
from hlora.cli import main
main()
"""


@pytest.fixture
def chain(job_fields: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a chain of two domains, plus and minus."""
    for name, start, count in (("train", 0, 24), ("test", 100, 8)):
        rows = [{"prompt": f"What is {n} minus one?", "completion": f" {n - 1}"} for n in range(start, start + count)]
        path = tmp_path / f"minus-{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plus = job_fields.pop("domain")
    minus = {"task": "rows", **{name: str(tmp_path / f"minus-{name}.jsonl") for name in ("train", "test")}}
    evaluation = {"max_tokens": 64, "window": 32, "stride": 32, "accuracy": False, "generate": 0}
    domains = [{"name": "plus", **plus}, {"name": "minus", **minus}]
    return {**job_fields, "evaluation": evaluation, "domains": domains}


def test_each_domain_is_a_run_after_the_one_before(chain: dict[str, Any]) -> None:
    out = chain["output"]
    first, second = steps_of(
        parse_config({**chain, "importance": {"method": "path_integral", "encoding": "float32", "xi": 1e-4}})
    )
    assert (first.output, first.after) == (f"{out}/plus", None)
    assert (second.output, second.after) == (f"{out}/minus", f"{out}/plus")
    assert [step.domain.task for step in (first, second)] == ["multiple_choice", "rows"]
    assert first.importance.encoding == "float32" and second.importance.xi == 1e-4
    for step in (first, second):
        parse_config(step.model_dump())  # a run of its own, which the user can repeat


def test_a_given_importance_serves_the_first_domain_and_a_chain_can_come_after_a_run(chain: dict[str, Any]) -> None:
    first, second = steps_of(parse_config({**chain, "importance": {"use": "ann/x", "encoding": "float32"}}))
    assert first.importance.use == "ann/x"
    assert second.importance.use is None and "encoding" not in second.importance.model_fields_set
    first, _ = steps_of(parse_config({**chain, "after": "runs/a"}))
    assert first.after == "runs/a"


def test_a_single_domain_is_the_configuration_itself(job_fields: dict[str, Any]) -> None:
    config = parse_config(job_fields)
    assert steps_of(config) == [config]


def test_the_files_of_every_domain_are_looked_for(chain: dict[str, Any]) -> None:
    fields = [field for field, _ in named_files(parse_config(chain))]
    assert {"domains.0.train", "domains.0.test", "domains.1.train", "domains.1.test"} <= {*fields}
    assert not any(field.startswith("domain.") for field in fields)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"domain": {"task": "rows", "train": "a.jsonl", "test": "b.jsonl"}}, "domains names every domain"),
        ({"domains": []}, "domain: required, but missing"),
        ({"penalty": {"anchor": "base"}}, "set penalty.anchor to general"),
        ({"domains": [{"task": "rows", "train": "a", "test": "b", "name": "x"}] * 2}, "x is a duplicate"),
        ({"domains": [{"task": "rows", "train": "a", "test": "b", "name": "../x"}]}, "domains.0.name"),
        ({"domains": [{"task": "rows", "train": "a", "test": "b", "tset": "c"}]}, "tset: unknown field"),
    ],
)
def test_a_chain_that_cannot_be_meant_is_refused(chain: dict[str, Any], change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_config({**chain, **change})


def test_domains_without_names_are_numbered(chain: dict[str, Any]) -> None:
    for domain in chain["domains"]:
        del domain["name"]
    assert [Path(step.output).name for step in steps_of(parse_config(chain))] == ["domain-1", "domain-2"]


def test_a_command_for_one_domain_names_the_run_to_use(chain: dict[str, Any]) -> None:
    for command in (pipeline.record, pipeline.tune, pipeline.evaluate_output):
        with pytest.raises(ConfigError, match=r"out/minus/config\.yaml"):
            command(parse_config(chain))


def test_a_later_domain_is_checked_before_the_first_is_tuned(chain: dict[str, Any], tmp_path: Path, hlora: Any) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(chain), encoding="utf-8")
    (tmp_path / "minus-train.jsonl").write_text('{"prompt": "What is one minus one?"}\n', encoding="utf-8")
    status, _, err = hlora("run", path)
    assert status == 2 and "minus-train.jsonl" in err, err
    assert not list((tmp_path / "out").rglob("importance.json"))


@pytest.mark.slow
def test_a_chain_killed_in_its_second_domain_resumes_to_the_same_bytes(
    chain: dict[str, Any], tmp_path: Path, hlora: Any
) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(chain), encoding="utf-8")
    status, out, err = hlora("check", path)
    assert status == 0 and "then minus: 24 training rows, 8 test rows" in out, err
    path.write_text(yaml.safe_dump({**chain, "domains": chain["domains"][:1]}), encoding="utf-8")
    assert hlora("run", path)[0] == 0
    path.write_text(yaml.safe_dump(chain), encoding="utf-8")
    assert hlora("run", path)[0] == 0  # goes on with the domain that was added
    again = {**chain, "output": str(tmp_path / "again")}
    path.write_text(yaml.safe_dump(again), encoding="utf-8")
    killed = subprocess.run([sys.executable, "-c", KILLED, "run", str(path)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "again" / "minus" / "adapter").exists()
    resumed = pipeline.run(parse_config(again))
    for name in ("plus", "minus"):
        for file in FILES:
            whole, other = ((tmp_path / run / name / file).read_bytes() for run in ("out", "again"))
            assert whole == other, f"{name}/{file}"
    there = json.loads((tmp_path / "out" / "minus" / "results.json").read_text(encoding="utf-8"))
    assert resumed["chain"] == there["chain"] and resumed["chain"]["domains"] == ["plus", "minus"]
    assert pipeline.run(parse_config(again)) == resumed  # finished
    with pytest.raises(ConfigError, match=r"after \(changed since\)"):
        changed = tmp_path / "again" / "plus" / "importance-after" / "importance.json"
        changed.write_text(changed.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        pipeline.run(parse_config(again))
