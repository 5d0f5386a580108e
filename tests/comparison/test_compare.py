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

from hlora.comparison.cells import Cell, cell_config
from hlora.comparison.choosing import choose
from hlora.comparison.compare import compare, summary
from hlora.comparison.grid import Grid
from hlora.config.comparison import CompareConfig
from hlora.config.reading import load_comparison
from hlora.system.errors import CannotRun, ConfigError, DataError
from hlora.system.locks import try_lock


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and figures have tests of their own."""
    monkeypatch.setattr("hlora.comparison.compare.write_report", lambda *arguments: None)


@pytest.fixture
def four_cells(comparison_file: Path) -> Path:
    """The base model, and three arms of one seed, two of which share a general phase."""
    fields = yaml.safe_load(comparison_file.read_text(encoding="utf-8"))
    arms = {name: fields["arms"][name] for name in ("Base", "LoRA(μ)", "LoRA(ν+μ)")}
    fields |= {"arms": {**arms, "HLoRA": {"method": "hlora"}}, "seeds": [0]}
    comparison_file.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return comparison_file


@pytest.mark.parametrize("content", ["null", "[]", "{}", "", '{"status"'])
def test_a_file_that_holds_no_cell_is_named(comparison_config: CompareConfig, tmp_path: Path, content: str) -> None:
    cell = Cell("LoRA(μ)", "sums", 0, None, cell_config(comparison_config, "LoRA(μ)", "sums", 0, None), "0123")
    path = tmp_path / "cells" / "0123.json"
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"0123\.json: not readable .*Delete it to compute the cell again"):
        Grid(comparison_config, tmp_path, None, None).read(cell)


def measured(found: dict[str, Any]) -> dict[tuple[Any, ...], Any]:
    """What a grid found, without what differs from run to run."""
    return {
        (c["arm"], c["task"], c["seed"], c["strength"]): {k: c[k] for k in ("status", "test", "validation", "history")}
        for c in found["cells"]
    }


@pytest.mark.slow
def test_a_grid_has_every_strength_on_the_first_seed_and_the_chosen_one_on_all(
    comparison_config: CompareConfig,
) -> None:
    found = compare(comparison_config)
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
    for (arm, *_), cell in cells.items():
        text = cell["test"]["texts"]["other"]
        assert ("kl_from_base" in text) == (arm != "Base"), arm
        assert ("kl_from_general" in text) == (arm in ("HLoRA", "LoRA(ν+μ)")), arm
    assert (Path(comparison_config.output) / "report.html").is_file() and list(
        (Path(comparison_config.output) / "tables").iterdir()
    )
    assert found["provenance"]["data"]["domain"]["sums"]["train_rows"] == 18
    assert json.loads((Path(comparison_config.output) / "comparison.json").read_text(encoding="utf-8")) == found


@pytest.mark.slow
def test_a_second_run_computes_nothing(four_cells: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(load_comparison(four_cells))

    def run_again(job: Any, *arguments: Any) -> dict[str, Any]:
        raise AssertionError(f"{job.config.method} was computed again")

    monkeypatch.setattr("hlora.comparison.grid.run_cell", run_again)
    assert compare(load_comparison(four_cells))["cells"] == first["cells"]


def test_cells_are_told_apart_by_everything_that_determines_them(comparison_file: Path, tmp_path: Path) -> None:
    def keys(*overrides: str) -> set[str]:
        return {cell.key for cell in Grid.open(load_comparison(comparison_file, list(overrides))).first_cells()}

    before = keys()
    assert keys(f"output={tmp_path / 'elsewhere'}") == before
    for change in ("training.tune.max_steps=5", "lora.rank=2", "evaluation.max_tokens=100", "selection.rows=5"):
        assert not keys(change) & before, change
    questions = Path(load_comparison(comparison_file).tasks["sums"].train)
    questions.write_text("".join(questions.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]))
    assert not keys() & before


def test_arms_that_share_a_cell_both_have_it_and_it_is_computed_once(comparison_file: Path) -> None:
    one = 'arms.HLoRA at 1={"method": "hlora", "strengths": [1]}'
    grid = Grid.open(load_comparison(comparison_file, [one]))
    found = [(cell["arm"], cell["strength"]) for cell in grid.results(grid.first_cells() * 2)]
    assert found[-3:] == [("HLoRA", 1), ("HLoRA", 1000), ("HLoRA at 1", 1)] and len(found) == len(set(found))
    assert len(grid.to_compute(grid.first_cells(), retry=False)) == len(found) - 1


@pytest.mark.slow
def test_an_interrupted_grid_ends_as_an_uninterrupted_one(four_cells: Path, tmp_path: Path, no_report: None) -> None:
    """SIGKILL as soon as two cells are there; the same command goes on and computes neither again."""
    whole = compare(load_comparison(four_cells, [f"output={tmp_path / 'whole'}"]))
    command = [sys.executable, "-c", "from hlora.cli import main; main()", "compare", str(four_cells)]
    threads = str(torch.get_num_threads())  # the sums of another number of threads differ in the last digits
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads}, stderr=subprocess.DEVNULL)
    cells = tmp_path / "grid" / "cells"
    while process.poll() is None and len(list(cells.glob("*.json"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    made = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert 2 <= len(made) < len(whole["cells"])

    resumed = compare(load_comparison(four_cells))
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    assert measured(resumed) == measured(whole)


@pytest.mark.slow
def test_a_failed_cell_is_reported_and_computed_again_on_request_only(
    comparison_config: CompareConfig, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison_config.arms = {name: comparison_config.arms[name] for name in ("Base", "LoRA(μ)", "LoRA(ν+μ)")}
    with monkeypatch.context() as broken:

        def fail(job: Any) -> Any:
            raise RuntimeError("out of memory")

        broken.setattr("hlora.run.phases.lora", fail)
        found = compare(comparison_config)
    status = {(c["arm"], c["seed"]): (c["status"], c["error"]) for c in found["cells"]}
    assert status["LoRA(μ)", 0] == ("failed", "RuntimeError: out of memory")
    assert status["LoRA(ν+μ)", 1] == ("done", None)
    assert any("--retry" in line for line in summary(found))
    assert {c["status"] for c in compare(comparison_config)["cells"]} == {"done", "failed"}
    assert {c["status"] for c in compare(comparison_config, retry=True)["cells"]} == {"done"}


@pytest.mark.slow
def test_a_method_that_cannot_run_says_so_in_its_cell(
    comparison_config: CompareConfig, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison_config.arms = {name: comparison_config.arms[name] for name in ("Base", "LoRA(μ)", "LoRA(ν+μ)")}

    def refuse(job: Any) -> Any:
        raise CannotRun("no MLP in this model")

    monkeypatch.setattr("hlora.run.phases.lora", refuse)
    found = compare(comparison_config)
    cells = {(c["arm"], c["seed"]): c for c in found["cells"]}
    assert cells["LoRA(μ)", 0]["status"] == "cannot" and cells["LoRA(μ)", 0]["error"] == "no MLP in this model"
    assert "cannot: LoRA(μ), sums: no MLP in this model" in summary(found)


@pytest.mark.slow
def test_a_method_that_altered_the_base_leaves_the_next_cell_a_fresh_one(
    comparison_config: CompareConfig, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison_config.arms = {name: comparison_config.arms[name] for name in ("Base", "LoRA(μ)")}
    clean = measured(compare(comparison_config.model_copy(update={"output": f"{comparison_config.output}-clean"})))

    def spoil(job: Any) -> Any:
        with torch.no_grad():
            for parameter in job.base.parameters():
                parameter.zero_()
        raise RuntimeError("half done")

    monkeypatch.setattr("hlora.comparison.paper.rslora", spoil)
    comparison_config.arms = {
        "spoiler": comparison_config.arms["LoRA(μ)"].model_copy(update={"method": "rslora"}),
        **comparison_config.arms,
    }
    found = measured(compare(comparison_config))
    assert found["spoiler", "sums", 0, None]["status"] == "failed"
    assert {place: cell for place, cell in found.items() if place[0] != "spoiler"} == clean


@pytest.mark.slow
def test_two_processes_share_a_grid(comparison_config: CompareConfig, no_report: None) -> None:
    """While another holds a cell it is left to the end; it is not computed twice."""
    comparison_config.arms = {name: comparison_config.arms[name] for name in ("Base", "LoRA(μ)")}
    grid = Grid.open(comparison_config)
    mine, *_ = grid.first_cells()
    path = grid._path(mine)
    path.parent.mkdir(parents=True)
    with try_lock(path.with_name(f"{path.name}.lock")) as held:
        assert held
        worker = threading.Thread(target=lambda: Grid.open(comparison_config).compute(grid.first_cells()))
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


def test_the_strength_that_keeps_most_general_ability_among_those_that_learned_is_chosen(
    comparison_config: CompareConfig,
) -> None:
    known = [result("Base", None, 10.0, 3.0, 3.0), result("LoRA(μ)", None, 5.0, 4.0, 4.0)]
    weak, strong = result("HLoRA", 1, 5.4, 3.2, 3.4), result("HLoRA", 1000, 5.6, 3.0, 3.0)
    # 90 % of the five nats learned is an NLL of 5.5, which 5.6 misses.
    assert choose(comparison_config, [*known, weak, strong])["HLoRA"]["sums"] == 1
    strong = result("HLoRA", 1000, 5.5, 3.0, 3.0)
    assert choose(comparison_config, [*known, weak, strong])["HLoRA"]["sums"] == 1000
    worse_on_one = result("HLoRA", 1000, 5.4, 3.1, 3.6)
    assert choose(comparison_config, [*known, weak, worse_on_one])["HLoRA"]["sums"] == 1
    neither = [result("HLoRA", 1, 6.5, 3.1, 3.1), result("HLoRA", 1000, 8.0, 3.0, 3.0)]
    assert choose(comparison_config, [*known, *neither])["HLoRA"]["sums"] == 1
    assert choose(comparison_config, known)["HLoRA"]["sums"] == 1
    assert choose(comparison_config, known)["LoRA(μ)"]["sums"] is None


def test_an_arm_whose_strength_could_not_be_chosen_is_named(
    comparison_config: CompareConfig, caplog: pytest.LogCaptureFixture
) -> None:
    tried = [result("Base", None, 10.0, 3.0, 3.0), result("HLoRA", 1, 5.4, 3.2, 3.4), result("HLoRA", 1000, 5.6, 3, 3)]
    choose(comparison_config, [])
    assert not caplog.records
    assert choose(comparison_config, tried)["HLoRA"]["sums"] == 1
    assert "no strength could be chosen, as Base, LoRA(μ) or the arm has no result there" in caplog.text
    assert "HLoRA on sums: 1" in caplog.text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("arms.HLoRA.seeds=[1]", "strengths of 'HLoRA' are chosen on seed 0 (selection.seeds)"),
        ("arms.LoRA(μ).seeds=[1]", "which the seeds of 'LoRA(μ)' leave out"),
        ("selection.seeds=2", ""),
        ("selection.texts={a: OTHER}", "selection.texts: 'a' is the evaluation text 'other'"),
    ],
)
def test_strengths_that_could_not_be_chosen_honestly_are_refused(
    comparison_file: Path, tmp_path: Path, change: str, problem: str
) -> None:
    changes = [change.replace("OTHER", str(tmp_path / "other.txt"))]
    if not problem:
        load_comparison(comparison_file, changes)
        return
    with pytest.raises(ConfigError) as refused:
        load_comparison(comparison_file, changes)
    assert problem in str(refused.value)


def test_an_arm_of_several_strengths_needs_plain_lora_on_its_tasks(comparison_file: Path) -> None:
    more = "tasks.more={task: rows, train: a.jsonl, test: b.jsonl}"
    with pytest.raises(ConfigError, match="on 'more' are chosen by what 'LoRA"):
        load_comparison(comparison_file, [more, "arms.LoRA(μ).tasks=[sums]"])


def test_held_out_rows_and_documents_are_trained_on_by_no_arm(comparison_config: CompareConfig) -> None:
    grid = Grid.open(comparison_config)
    for cell in grid.first_cells():
        job = grid.job(cell)
        held_out = {example.prompt for example in grid.domain(cell.config)[1]}
        assert len(held_out) == 6 and not held_out & {example.prompt for example in job.domain.train}
        text = grid.held_out_texts(cell.seed)["general (held out)"]
        assert text and not any(document in text for document in job.general.train)


def test_rows_that_cannot_be_used_are_left_out_of_every_arm_and_those_that_one_arm_cuts_off_of_that_one(
    comparison_file: Path,
) -> None:
    fields = yaml.safe_load(comparison_file.read_text(encoding="utf-8"))
    with Path(fields["tasks"]["sums"]["train"]).open("a", encoding="utf-8") as file:
        for row in ({"question": "no label?"}, {"question": "long? " * 30, "choices": ["1", "2"], "label": 0}):
            file.write(json.dumps(row) + "\n")
    fields["tasks"]["sums"]["max_unusable"] = 2
    fields["arms"]["LoRA(μ)"]["settings"] = {"training.tune.max_length": 200}
    comparison_file.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
    grid = Grid.open(load_comparison(comparison_file))
    for cell in grid.first_cells():
        (found,) = grid.domain(cell.config)[0].facts["unusable"].values()
        assert found["rows"] == (1 if cell.arm == "LoRA(μ)" else 2), cell.arm


def test_an_arm_that_names_an_unknown_task_is_refused(comparison_file: Path) -> None:
    fields = yaml.safe_load(comparison_file.read_text(encoding="utf-8"))
    fields["arms"]["HLoRA"]["tasks"] = ["poems"]
    comparison_file.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match="'HLoRA' names the task 'poems'; tasks has sums"):
        load_comparison(comparison_file)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("domains", [{"train": "a.jsonl"}], r"domains: with tasks, each method is tuned on single domains"),
        ("domain", {"train": "a.jsonl"}, r"domain: a comparison names its domains under tasks"),
        ("after", "runs/mine", r"after: .* from the base model\. Use `hlora run`"),
        ("baselines", ["lora"], r"baselines: .* Add one of method lora"),
        ("tasks.sums.validation", 0.1, r"tasks\.sums\.validation: .* selection\.rows training rows\. Leave it out"),
        ("tasks.sums.patience", 2, r"tasks\.sums\.patience: .* Leave it out"),
    ],
)
def test_a_field_of_a_run_is_refused_and_the_message_says_what_to_do_instead(
    comparison_file: Path, path: str, value: Any, expected: str
) -> None:
    with pytest.raises(ConfigError, match=rf"compare\.yaml: {expected}"):
        load_comparison(comparison_file, [f"{path}={json.dumps(value)}"])


def test_validation_rows_in_the_settings_of_an_arm_are_refused_by_name(comparison_file: Path) -> None:
    fields = yaml.safe_load(comparison_file.read_text(encoding="utf-8"))
    fields["arms"]["HLoRA"]["settings"] = {"domain.validation": 0.1}
    comparison_file.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"arms.HLoRA: domain.validation: .* selection.rows training rows"):
        Grid.open(load_comparison(comparison_file))


def test_a_wrong_setting_of_an_arm_is_named_before_anything_is_computed(comparison_file: Path) -> None:
    fields = yaml.safe_load(comparison_file.read_text(encoding="utf-8"))
    fields["arms"]["HLoRA"]["settings"] = {"importance.encodin": 1}
    comparison_file.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"arms.HLoRA: importance.encodin: unknown field; did you mean 'encoding'"):
        Grid.open(load_comparison(comparison_file))


@pytest.mark.slow
def test_an_arm_with_another_general_text_is_chosen_on_the_same_texts_and_trains_on_none_of_them(
    comparison_config: CompareConfig, tmp_path: Path, no_report: None
) -> None:
    line = "A line of the arm's own general text, long enough to be told apart from any other line of text at all. "
    own = tmp_path / "own.txt"
    own.write_text("\n\n".join(f"{n} {line}" for n in range(400)), encoding="utf-8")
    both = [{"paths": comparison_config.general.paths, "weight": 1}, {"paths": [str(own)], "weight": 1}]
    mixed = {"method": "hlora", "settings": {"general": {"mixture": both}}}
    squares = {"importance.method": "squared_gradients", "importance.sequences": 2, "importance.sequence_length": 16}
    at_base = {"method": "hlora", "settings": {**squares, "penalty.anchor": "base"}}
    arms = {"Base": {"method": "base"}, "mixed": mixed, "at base": at_base}
    roles = dict.fromkeys(("ours", "rival", "unprotected"))
    fields = {**comparison_config.model_dump(), **roles, "arms": arms, "seeds": [0]}
    grid = Grid.open(CompareConfig.model_validate(fields))
    cells = {cell.arm: cell for cell in grid.first_cells()}
    held_out = grid.held_out_texts(0)["general (held out)"]
    trained = grid.general(cells["mixed"].config).train
    assert any("own general text" in document for document in trained)
    assert any(document in grid.general(cells["at base"].config).train for document in trained)
    assert not any(document.strip() in held_out for document in trained)
    grid.compute(list(cells.values()))
    results = {result["arm"]: result for result in grid.results(cells.values())}
    assert {result["status"] for result in results.values()} == {"done"}
    assert {tuple(result["validation"]["texts"]) for result in results.values()} == {("general (held out)",)}
    assert results["at base"]["importance"]["method"] == "squared_gradients"
