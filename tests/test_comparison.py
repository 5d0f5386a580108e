"""A small grid on the tiny Llama: every cell once, whatever happens to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hlora import comparison, methods
from hlora.comparison import Grid, choose, compare
from hlora.config import CompareConfig, load_comparison
from hlora.errors import CannotRun, ConfigError
from hlora.recording import claim


@pytest.fixture
def config_file(tmp_path: Path, model_dir: str, general_file: str, questions: tuple[str, str]) -> Path:
    text = Path(general_file).read_text(encoding="utf-8")
    general, other = tmp_path / "general.jsonl", tmp_path / "other.txt"
    general.write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n")), encoding="utf-8")
    other.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20, encoding="utf-8")
    task = {"task": "multiple_choice", "train": questions[0], "test": questions[1]}
    fields = {
        "output": str(tmp_path / "grid"),
        "seeds": [0, 1],
        "model": {"name": model_dir, "device": "cpu"},
        "lora": {"rank": 4, "alpha": 8},
        "general": {"paths": [str(general)]},
        "tasks": {"sums": task},
        "arms": {
            "Base": {"method": "base"},
            "LoRA(μ)": {"method": "lora"},
            "LoRA(ν+μ)": {"method": "lora_after_general"},
            "EWC-LoRA": {"method": "ewc", "strengths": [1, 100]},
            "HLoRA": {"method": "hlora", "strengths": [1, 1000]},
        },
        "fisher": {"examples": 4, "max_length": 16},
        "training": {
            "common": {"learning_rate": 2e-2, "per_device_train_batch_size": 4},
            "record": {"max_steps": 3, "max_length": 32},
            "tune": {"max_steps": 4, "max_length": 64},
        },
        "evaluation": {
            "texts": {"other": str(other)},
            "max_tokens": 200,
            "window": 64,
            "stride": 64,
            "generate": 0,
        },
        "selection": {"rows": 6},
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def config(config_file: Path) -> CompareConfig:
    return load_comparison(config_file)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and figures have tests of their own."""
    monkeypatch.setattr(comparison, "write_report", lambda *arguments: None)


def measured(found: dict[str, Any]) -> dict[tuple[Any, ...], Any]:
    """What a grid found, without what differs from run to run."""
    return {
        (c["arm"], c["task"], c["seed"], c["strength"]): {k: c[k] for k in ("status", "test", "validation", "history")}
        for c in found["cells"]
    }


def test_a_grid_has_every_strength_on_the_first_seed_and_the_chosen_one_on_all(config: CompareConfig) -> None:
    found = compare(config)
    cells = {(c["arm"], c["seed"], c["strength"]): c for c in found["cells"]}
    assert all(cell["status"] == "done" for cell in cells.values())
    phi, weight = found["chosen"]["HLoRA"]["sums"], found["chosen"]["EWC-LoRA"]["sums"]
    assert set(cells) == {
        ("Base", None, None),
        *(("LoRA(μ)", seed, None) for seed in (0, 1)),
        *(("LoRA(ν+μ)", seed, None) for seed in (0, 1)),
        *(("EWC-LoRA", *rest) for rest in ((0, 1), (0, 100), (1, weight))),
        *(("HLoRA", *rest) for rest in ((0, 1), (0, 1000), (1, phi))),
    }
    base = cells["Base", None, None]["test"]["texts"]["other"]
    assert base["forgetting"] == 0
    tuned = cells["LoRA(μ)", 1, None]["test"]["texts"]["other"]
    assert tuned["forgetting"] == pytest.approx(tuned["nll"] - base["nll"]) and tuned["forgetting"] != 0
    assert (Path(config.output) / "report.html").is_file() and list((Path(config.output) / "tables").iterdir())
    assert json.loads((Path(config.output) / "comparison.json").read_text(encoding="utf-8")) == found


def test_a_second_run_computes_nothing(config: CompareConfig, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(config)

    def measure(self: Grid, cell: Any) -> dict[str, Any]:
        raise AssertionError(f"{cell.arm} was computed again")

    monkeypatch.setattr(Grid, "_measure", measure)
    assert compare(config)["cells"] == first["cells"]


def test_cells_are_told_apart_by_everything_that_determines_them(config_file: Path, tmp_path: Path) -> None:
    def keys(*overrides: str) -> set[str]:
        return {cell.key for cell in Grid.open(load_comparison(config_file, list(overrides))).first_cells()}

    before = keys()
    assert keys(f"output={tmp_path / 'elsewhere'}") == before
    for change in ("training.tune.max_steps=5", "lora.rank=2", "evaluation.max_tokens=100", "selection.rows=5"):
        assert not keys(change) & before, change
    questions = Path(load_comparison(config_file).tasks["sums"].train)
    questions.write_text("".join(questions.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]))
    assert not keys() & before


def test_an_interrupted_grid_ends_as_an_uninterrupted_one(config_file: Path, tmp_path: Path, no_report: None) -> None:
    """SIGKILL as soon as two cells are there; the same command goes on and computes neither again."""
    whole = compare(load_comparison(config_file, [f"output={tmp_path / 'whole'}"]))
    command = [sys.executable, "-c", "from hlora.cli import main; main()", "compare", str(config_file)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    cells = tmp_path / "grid" / "cells"
    while process.poll() is None and len(list(cells.glob("*.json"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    made = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert 2 <= len(made) < len(whole["cells"])

    resumed = compare(load_comparison(config_file))
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    assert measured(resumed) == measured(whole)


def test_a_failed_cell_is_reported_and_computed_again_on_request_only(
    config: CompareConfig, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.arms = {name: config.arms[name] for name in ("Base", "LoRA(μ)", "LoRA(ν+μ)")}
    with monkeypatch.context() as broken:

        def fail(job: Any, strength: float | None) -> Any:
            raise RuntimeError("out of memory")

        broken.setitem(methods.METHODS, "lora", fail)
        found = compare(config)
    status = {(c["arm"], c["seed"]): (c["status"], c["error"]) for c in found["cells"]}
    assert status["LoRA(μ)", 0] == ("failed", "RuntimeError: out of memory")
    assert status["LoRA(ν+μ)", 1] == ("done", None)
    assert any("--retry" in line for line in comparison.summary(found))
    assert {c["status"] for c in compare(config)["cells"]} == {"done", "failed"}
    assert {c["status"] for c in compare(config, retry=True)["cells"]} == {"done"}


def test_a_method_that_cannot_run_says_so_in_its_cell(
    config: CompareConfig, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.arms = {name: config.arms[name] for name in ("Base", "LoRA(μ)", "LoRA(ν+μ)")}

    def refuse(job: Any, strength: float | None) -> Any:
        raise CannotRun("no MLP in this model")

    monkeypatch.setitem(methods.METHODS, "lora", refuse)
    found = compare(config)
    cells = {(c["arm"], c["seed"]): c for c in found["cells"]}
    assert cells["LoRA(μ)", 0]["status"] == "cannot" and cells["LoRA(μ)", 0]["error"] == "no MLP in this model"
    assert "cannot: LoRA(μ), sums: no MLP in this model" in comparison.summary(found)


def test_a_method_that_altered_the_base_leaves_the_next_cell_a_fresh_one(
    config: CompareConfig, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.arms = {name: config.arms[name] for name in ("Base", "LoRA(μ)")}
    clean = measured(compare(config.model_copy(update={"output": f"{config.output}-clean"})))

    def spoil(job: Any, strength: float | None) -> Any:
        with torch.no_grad():
            for parameter in job.base.parameters():
                parameter.zero_()
        raise RuntimeError("half done")

    monkeypatch.setitem(methods.METHODS, "l2", spoil)
    config.arms = {"spoiler": config.arms["LoRA(μ)"].model_copy(update={"method": "l2"}), **config.arms}
    found = measured(compare(config))
    assert found["spoiler", "sums", 0, None]["status"] == "failed"
    assert {place: cell for place, cell in found.items() if place[0] != "spoiler"} == clean


def test_two_processes_share_a_grid(config: CompareConfig, no_report: None) -> None:
    """While another holds a cell it is left to the end; it is not computed twice."""
    config.arms = {name: config.arms[name] for name in ("Base", "LoRA(μ)")}
    grid = Grid.open(config)
    mine, *_ = grid.first_cells()
    with claim(grid._path(mine)) as held:
        assert held
        worker = threading.Thread(target=lambda: Grid.open(config).compute(grid.first_cells()))
        worker.start()
        while grid.read(grid.first_cells()[1]) is None:
            time.sleep(0.05)
        assert grid.read(mine) is None
        marked = {**grid.read(grid.first_cells()[1]), "status": "done", "made": "by the other process"}
        grid._path(mine).write_text(json.dumps(marked), encoding="utf-8")
    worker.join()
    assert grid.read(mine)["made"] == "by the other process"


def result(arm: str, strength: float | None, answers: float, *general: float) -> dict[str, Any]:
    texts = {str(number): {"nll": nll} for number, nll in enumerate(general)}
    validation = {"texts": texts, "domain": {"answer_nll": answers}}
    return {"arm": arm, "task": "sums", "strength": strength, "status": "done", "validation": validation}


def test_the_strength_that_keeps_most_general_ability_among_those_that_learned_is_chosen(config: CompareConfig) -> None:
    known = [result("Base", None, 10.0, 3.0, 3.0), result("LoRA(μ)", None, 5.0, 4.0, 4.0)]
    weak, strong = result("HLoRA", 1, 5.4, 3.2, 3.4), result("HLoRA", 1000, 5.6, 3.0, 3.0)
    # 90 % of the five nats learned is an NLL of 5.5, which 5.6 misses.
    assert choose(config, [*known, weak, strong])["HLoRA"]["sums"] == 1
    strong = result("HLoRA", 1000, 5.5, 3.0, 3.0)
    assert choose(config, [*known, weak, strong])["HLoRA"]["sums"] == 1000
    worse_on_one = result("HLoRA", 1000, 5.4, 3.1, 3.6)
    assert choose(config, [*known, weak, worse_on_one])["HLoRA"]["sums"] == 1
    neither = [result("HLoRA", 1, 6.5, 3.1, 3.1), result("HLoRA", 1000, 8.0, 3.0, 3.0)]
    assert choose(config, [*known, *neither])["HLoRA"]["sums"] == 1
    assert choose(config, known)["HLoRA"]["sums"] == 1
    assert choose(config, known)["LoRA(μ)"]["sums"] is None


def test_held_out_rows_and_documents_are_trained_on_by_no_arm(config: CompareConfig) -> None:
    grid = Grid.open(config)
    for cell in grid.first_cells():
        job = grid.job(cell)
        held_out = {example.prompt for example in grid.domain(cell.config)[1]}
        assert len(held_out) == 6 and not held_out & {example.prompt for example in job.domain.train}
        text = grid.held_out_texts(cell.config)["general (held out)"]
        assert text and not any(document in text for document in job.general.train)


def test_an_arm_that_names_an_unknown_task_is_refused(config_file: Path) -> None:
    fields = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    fields["arms"]["HLoRA"]["tasks"] = ["poems"]
    config_file.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match="'HLoRA' names the task 'poems'; tasks has sums"):
        load_comparison(config_file)


def test_a_wrong_setting_of_an_arm_is_named_before_anything_is_computed(config_file: Path) -> None:
    fields = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    fields["arms"]["HLoRA"]["settings"] = {"importance.encodin": 1}
    config_file.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"arms.HLoRA: importance.encodin: unknown field; did you mean 'encoding'"):
        Grid.open(load_comparison(config_file))
