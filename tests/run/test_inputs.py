"""A finished run is recognised by what its files hold, wherever their clocks stand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hlora.config.reading import parse_config
from hlora.run.inputs import KEPT, changed_since, inputs_of
from hlora.system.files import write_json


@pytest.fixture
def made(tmp_path: Path, job_fields: dict[str, Any], model_dir: str) -> Any:
    """A configuration whose files are all on this machine, and an output with the record of them."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("a", "b"):
        shutil.copy(job_fields["domain"]["train"], shards / f"{name}.jsonl")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "importance.json").write_text('{"recorded": 1}', encoding="utf-8")
    shutil.copytree(model_dir, tmp_path / "base")
    job_fields["model"]["name"] = str(tmp_path / "base")
    job_fields["domain"]["train"] = str(shards)
    job_fields["importance"] = {"use": str(tmp_path / "used")}
    config = parse_config(job_fields)
    output = Path(config.output)
    output.mkdir()
    (output / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    write_json(output / KEPT, inputs_of(config))
    return config


def older(path: Path) -> None:
    """Another file of the same size moved into the place, which is older than the run."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-2] + b"#\n")
    os.utime(other, (1e9, 1e9))
    other.replace(path)


@pytest.mark.parametrize(
    ("field", "path", "change"),
    [
        ("general.paths", "general.txt", older),
        ("domain.test", "test.jsonl", older),
        ("domain.train", "shards/b.jsonl", older),
        ("domain.train", "shards/b.jsonl", Path.unlink),
        ("model.name", "base/model.safetensors", older),
        ("model.name", "base/tokenizer.json", older),
        ("importance.use", "used/importance.json", older),
    ],
)
def test_another_content_of_any_file_is_named_by_its_field(
    made: Any, tmp_path: Path, field: str, path: str, change: Callable[[Path], None]
) -> None:
    if path.endswith("model.safetensors"):  # weights are read in parts, the first one among them
        weights = tmp_path / path
        weights.write_bytes(weights.read_bytes()[:1000] + bytes(1000) + weights.read_bytes()[2000:])
    else:
        change(tmp_path / path)
    assert changed_since(tmp_path / "out", made) == [field]


def test_files_that_were_only_touched_or_copied_have_not_changed(made: Any, tmp_path: Path) -> None:
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.parent != tmp_path / "out":
            os.utime(path)
    assert changed_since(tmp_path / "out", made) == []


def test_a_run_inside_the_model_directory_is_no_change_of_the_model(made: Any, tmp_path: Path) -> None:
    (tmp_path / "base" / "runs").mkdir()
    (tmp_path / "base" / "runs" / "results.json").write_text("{}", encoding="utf-8")
    (tmp_path / "base" / ".gitattributes").write_text("", encoding="utf-8")
    assert changed_since(tmp_path / "out", made) == []


@pytest.mark.parametrize("kept", [None, "[]", '{"domain.test": 3}', "{"])
def test_without_a_record_files_newer_than_the_run_have_changed(made: Any, tmp_path: Path, kept: str | None) -> None:
    (tmp_path / "out" / KEPT).unlink()
    if kept is not None:
        (tmp_path / "out" / KEPT).write_text(kept, encoding="utf-8")
    os.utime(tmp_path / "out" / "config.yaml", (2e9, 2e9))
    assert changed_since(tmp_path / "out", made) == []
    os.utime(tmp_path / "test.jsonl", (2.1e9, 2.1e9))
    assert changed_since(tmp_path / "out", made) == ["domain.test"]


def test_a_run_keeps_the_record_beside_its_configuration(tuned_run: Path) -> None:
    kept = json.loads((tuned_run / KEPT).read_text(encoding="utf-8"))
    assert {"model.name", "general.paths", "domain.train", "domain.test"} == kept.keys()
    assert {"config.json", "model.safetensors"} <= kept["model.name"].keys()
