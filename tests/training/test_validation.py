"""Validation rows are evaluated while the domain phase trains, with forgetting beside; the best checkpoint is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY  # noqa: F401
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState

from hlora import pipeline
from hlora.config.data_files import named_files
from hlora.config.reading import parse_config
from hlora.data.domain import TokenLimits
from hlora.data.validation import rows_of_run
from hlora.model.base import load_base
from hlora.report.run.while_training import learning_and_forgetting
from hlora.run import phases
from hlora.system.errors import ConfigError, DataError
from hlora.training import checkpoint
from hlora.training.validation import StopWithoutGain

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def fields(job_fields: dict[str, Any]) -> dict[str, Any]:
    """A run with validation rows; at this learning rate the validation loss rises after a few steps."""
    job_fields["domain"]["validation"] = 0.25
    job_fields["training"]["tune"] = {"max_steps": 8, "max_length": 64, "eval_steps": 2, "learning_rate": 0.2}
    job_fields["evaluation"] = {"max_tokens": 64, "window": 32, "stride": 32, "accuracy": False, "generate": 0}
    return job_fields


def rows(fields: dict[str, Any]) -> Any:
    config = parse_config(fields)
    base, tokenizer = load_base(config.model)
    return rows_of_run(config, TokenLimits.of(base, tokenizer, config.training.tune_arguments()))


def test_validation_rows_are_a_share_that_is_not_trained_on(fields: dict[str, Any]) -> None:
    found = rows(fields)
    assert (len(found.train), len(found.validation)) == (18, 6)
    assert not {example.prompt for example in found.train} & {example.prompt for example in found.validation}
    assert (found.facts["train_rows"], found.facts["validation_rows"]) == (18, 6)


def test_validation_rows_come_from_a_file_and_their_prompts_leave_the_training_rows(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    train = Path(fields["domain"]["train"]).read_text(encoding="utf-8").splitlines()
    file = tmp_path / "validation.jsonl"
    file.write_text("\n".join(train[:5]), encoding="utf-8")
    fields["domain"]["validation"] = str(file)
    found = rows(fields)
    assert (len(found.train), len(found.validation)) == (19, 5)
    assert ("domain.validation", str(file)) in named_files(parse_config(fields))
    file.write_text("\n".join(train), encoding="utf-8")
    with pytest.raises(DataError, match=r"domain\.validation.*leaves none of 24 rows"):
        rows(fields)
    fields["domain"]["validation"] = str(tmp_path / "none.jsonl")
    (tmp_path / "none.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"domain\.validation: .*none\.jsonl: no rows left \(0 read"):
        rows(fields)
    fields["domain"]["validation"] = fields["domain"]["test"]  # as people evaluate on it elsewhere
    with pytest.raises(DataError, match=r"domain\.validation: .*no rows left \(8 read, 8 of them in the test set\)"):
        rows(fields)


def test_validation_rows_beside_a_hub_data_set_are_a_split_of_it_or_a_file(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    domain = fields["domain"]
    lines = Path(domain["train"]).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "set").mkdir()  # a directory of files is read as the hub's data sets are
    for name, part in (("train", lines[:16]), ("validation", lines[16:]), ("test", lines[:2])):
        (tmp_path / "set" / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    domain |= {"train": str(tmp_path / "set"), "test": "test", "validation": "validation"}
    found = rows(fields)
    assert (len(found.train), len(found.validation), len(found.test)) == (14, 8, 2)
    domain["validation"] = str(tmp_path / "set" / "validation.jsonl")
    assert rows(fields).validation == found.validation


@pytest.mark.parametrize(
    ("domain", "training", "problem"),
    [
        ({"validation": 1.5}, {}, "between 0 and 1"),
        ({"validation": None, "patience": 2}, {}, "Set validation too"),
        (
            {"validation": None},
            {"tune": {"eval_strategy": "steps"}},
            "eval_strategy cannot be set here: set domain",
        ),
        ({"validation": None}, {"tune": {"load_best_model_at_end": True}}, "load_best_model_at_end cannot be set here"),
        ({}, {"common": {"eval_strategy": "steps"}}, "only the domain phase evaluates"),
    ],
)
def test_evaluation_without_rows_is_refused(
    fields: dict[str, Any], domain: dict[str, Any], training: dict[str, Any], problem: str
) -> None:
    fields["domain"] |= domain
    with pytest.raises(ConfigError, match=re.escape(problem)):
        parse_config({**fields, "training": training})


def test_a_phase_with_rows_is_evaluated_ten_times_and_saved_where_the_best_is_kept(fields: dict[str, Any]) -> None:
    fields["training"]["tune"] = {"load_best_model_at_end": True}
    arguments = parse_config(fields).training.tune_arguments()
    assert (arguments["eval_strategy"], arguments["eval_steps"]) == ("steps", 0.1)
    assert (arguments["save_strategy"], arguments["save_steps"]) == ("steps", 0.1)


def test_training_stops_after_so_many_evaluations_without_a_lower_loss_also_when_resumed() -> None:
    stop, control = StopWithoutGain(2), TrainerControl()
    for number, (loss, stops) in enumerate([(3.0, False), (2.0, False), (2.1, False), (2.0, True)], 1):
        log = [{"eval_loss": each} for each in (3.0, 2.0, 2.1, 2.0)[:number]]  # as a checkpoint brings it back
        StopWithoutGain(2).on_evaluate(None, TrainerState(log_history=log), control)  # type: ignore[arg-type]
        assert control.should_training_stop is stops, (loss, stop.patience)


def test_the_figure_has_learning_on_one_axis_and_forgetting_on_the_other() -> None:
    entries = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_loss": 2.0, "probe_rise": 0.0, "probe_stderr": 0.01},
        {"step": 4, "eval_loss": 1.5, "probe_rise": 0.1, "probe_stderr": 0.01},
        {"step": 6, "eval_loss": 1.8, "probe_rise": 0.3, "probe_stderr": 0.01},
    ]
    learned, forgotten = learning_and_forgetting(entries).axes
    assert list(learned.lines[0].get_ydata()) == [2.0, 1.5, 1.8]
    assert list(learned.lines[1].get_xdata()) == [4]  # the ring
    assert list(forgotten.lines[0].get_ydata()) == [0.0, 0.1, 0.3]
    assert len(learning_and_forgetting([{"step": 2, "eval_loss": 2.0}]).axes) == 1


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_a_resumed_run_ends_with_the_same_bytes(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields["training"]["tune"]["load_best_model_at_end"] = True
    whole = pipeline.run(parse_config(fields))
    evaluated = [entry for entry in whole["history"]["tune"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4, 6, 8]
    assert all({"probe_rise", "probe_stderr"} <= set(entry) for entry in evaluated)
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "While it trained" in report and "The budget of" not in report
    (events,) = (tmp_path / "out" / "logs" / "tune").rglob("events.out.*")
    tags = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"eval/loss", "train/probe_rise"} <= set(tags)
    best = min(evaluated, key=lambda entry: entry["eval_loss"])["step"]
    assert best < 8  # so that the last step is not the best one

    class Cut(Exception): ...

    monkeypatch.setattr(checkpoint, "_EVERY", 0.0)  # after each step
    kept: dict[str, Any] = {}
    complete = checkpoint.complete_checkpoint

    def complete_or_cut(directory: Path) -> None:
        complete(directory)
        if "tune" in directory.parts:
            cut = directory.name == "checkpoint-5" and directory.name not in kept
            kept[directory.name] = load_file(directory / "adapter_model.safetensors")
            if cut:
                raise Cut

    again = {**fields, "output": str(tmp_path / "again")}
    monkeypatch.setattr(checkpoint, "complete_checkpoint", complete_or_cut)
    with pytest.raises(Cut):
        pipeline.run(parse_config(again))
    resumed = pipeline.run(parse_config(again))
    for file in (ADAPTER, "importance-after/importance.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert resumed["history"] == whole["history"] and resumed["arms"] == whole["arms"]
    saved = load_file(tmp_path / "out" / ADAPTER)
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept[f"checkpoint-{best}"].items())


@pytest.mark.slow
def test_the_patience_ends_the_domain_phase(fields: dict[str, Any]) -> None:
    fields["domain"]["patience"] = 1
    fields["training"]["tune"] |= {"max_steps": 40, "eval_steps": 1}
    config = parse_config(fields)
    with pipeline._locked(config):
        job = pipeline._open(config)
        model, history = phases.lora(job)
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) < 40 and losses[-1] >= min(losses[:-1])
    assert json.dumps(history) and model is not None
