"""`hlora cost` on the tiny Llama: the right work is timed, counted and written."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from hlora.cli import main
from hlora.comparison import cost as cost_module
from hlora.comparison.clock import Clock, Elapsed
from hlora.comparison.cost import cost_tables, measure_cost
from hlora.config.reading import parse_config
from hlora.config.run import RunConfig
from hlora.run.job import Job
from hlora.system.errors import ConfigError, DataError

LENGTH = 16
Q_AND_V = 2 * (32 * 32 + 16 * 32)  # elements of the adapted matrices, two layers


@pytest.fixture
def fields(job_fields: dict[str, Any]) -> dict[str, Any]:
    # What a run sets for itself must not reach the measurement.
    job_fields["training"]["common"] |= {"max_steps": 1, "gradient_accumulation_steps": 2}
    job_fields["training"]["record"] = {"max_length": LENGTH, "per_device_train_batch_size": 3}
    return job_fields


@pytest.fixture
def config(fields: dict[str, Any]) -> RunConfig:
    return parse_config(fields)


def rows_of(cost: dict[str, Any], method: str, counting: str) -> list[dict[str, Any]]:
    return [row for row in cost["rows"] if (row["method"], row["counting"]) == (method, counting)]


@pytest.mark.slow
def test_rows_say_what_was_measured_and_are_written_and_shown(config: RunConfig) -> None:
    cost = measure_cost(config, scale=0.001, nu_samples=22_000)
    assert json.loads((Path(config.output) / "cost.json").read_text(encoding="utf-8")) == cost
    assert cost["scale"] == 0.001 and cost["provenance"]["sequence_length"] == LENGTH
    assert cost["samples"]["EWC-LoRA"] == {"paper": 20_000, "measured": 20}
    assert cost["samples"]["HLoRA"] == {"assumed": 22_000, "measured": 22, "scale": 0.001}
    for counting, samples, epochs, batch in (("paper", 22, 5, 20), ("equal", 20, 1, 8)):
        (ewc,) = rows_of(cost, "EWC-LoRA", counting)
        assert (ewc["samples"], ewc["epochs"], ewc["tokens"], ewc["batch_size"]) == (20, 1, 20 * (LENGTH - 1), 8)
        assert ewc["bytes"] == 4 * Q_AND_V and ewc["whole_model_bytes"] == 4 * cost["provenance"]["parameters"]
        ours = rows_of(cost, "HLoRA", counting)
        assert [row["encoding"] for row in ours] == ["float32", "factored"]
        assert [row["bytes"] for row in ours] == [4 * Q_AND_V, 4 * 2 * (32 + 32 + 16 + 32)]
        for row in ours:
            assert (row["samples"], row["epochs"], row["batch_size"]) == (samples, epochs, batch)
            assert row["tokens"] == samples * epochs * (LENGTH - 1)
            assert 0 < row["seconds_beyond_training"] < row["seconds"] and row["cpu_seconds"] > 0
            ratios = cost["ratios"][counting][row["encoding"]]
            assert ratios["time"] == ewc["seconds"] / row["seconds"]
            assert ratios["cpu_time"] == ewc["cpu_seconds"] / row["cpu_seconds"]
            assert ratios["time_beyond_training"] == ewc["seconds"] / row["seconds_beyond_training"]
            assert ratios["bytes_whole_model"] == ewc["whole_model_bytes"] / row["bytes"]
            assert ratios["bytes_same_matrices"] == ewc["bytes"] / row["bytes"]
    measured, ratios = cost_tables(cost)
    assert list(measured.columns[4].cells) == [f"{row['seconds']:.2f}" for row in cost["rows"]]
    times = [ratio["time"] for encodings in cost["ratios"].values() for ratio in encodings.values()]
    assert list(ratios.columns[2].cells) == [f"{time:.3g}" for time in times] and len(times) == 4


@pytest.mark.slow
def test_equal_counting_is_one_pass_over_the_very_sequences_of_ewc(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fisher, trained = [], []

    def fisher_of(model: Any, sequences: Tensor, *rest: Any, **options: Any) -> Any:
        fisher.append(sequences)
        return real_fisher(model, sequences, *rest, **options)

    def train(*arguments: Any, **options: Any) -> Any:
        trained.append((arguments[2]["input_ids"], real_train(*arguments, **options)))
        return trained[-1][1]

    real_fisher, real_train = cost_module.fisher_of_sequences, cost_module.train
    monkeypatch.setattr(cost_module, "fisher_of_sequences", fisher_of)
    monkeypatch.setattr(cost_module, "train", train)
    measure_cost(config, sequences=20, nu_samples=22_000)
    (warm_up, ewc), (ours_warm_up, *ours) = fisher, trained
    assert ewc.shape == (20, LENGTH) and len(warm_up) == 8 and len(ours_warm_up[0]) == 8
    for sequences, history in ours[2:]:
        assert list(sequences) == ewc.tolist()
        assert len(history) == math.ceil(20 / 8)
    for sequences, history in ours[:2]:  # counting as the paper: five epochs, the last batch of each not full
        assert list(sequences)[:20] == ewc.tolist() and len(sequences) == 22
        assert len(history) == 5 * 2


def test_the_clock_does_not_change_the_importance_and_misses_no_step(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.open(config)
    ids = torch.randint(3, 384, (10, LENGTH), generator=torch.Generator().manual_seed(0))
    timed, whole, recording = cost_module._recording(job, ids, "float32", epochs=2, batch_size=4)
    assert timed.provenance["steps"] == 2 * math.ceil(10 / 4)
    assert 0 < recording.wall < whole.wall
    monkeypatch.setattr(Clock, "inside", lambda self, call: call)
    plain, _, recording = cost_module._recording(job, ids, "float32", epochs=2, batch_size=4)
    assert recording == Elapsed(0.0, 0.0)
    for name, matrix in plain.matrices.items():
        assert isinstance(matrix.omega, Tensor) and matrix.omega.any()
        torch.testing.assert_close(timed.matrices[name].omega, matrix.omega)


def test_clock_adds_up_training_and_the_calls_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0, 1, 3, 10, 14, 20])  # begin, call, call's end, …, end
    monkeypatch.setattr("hlora.comparison.clock.now", lambda: Elapsed(float(value := next(readings)), 2.0 * value))
    clock = Clock()
    state: Any = None
    clock.on_train_begin(state, state, state)
    call = clock.inside(lambda x, y=0: x + y)
    assert (call(1, y=2), call(5)) == (3, 5)
    clock.on_train_end(state, state, state)
    assert clock.training == Elapsed(20.0, 40.0)
    assert clock.recording == Elapsed(2.0 + 4.0, 12.0)


def test_notes_state_the_scale_and_the_assumption_and_warn_of_a_scale_too_small() -> None:
    notes = " ".join(cost_module._notes(1 / 5000, ewc=4, nu=1, nu_samples=4_000, length=LENGTH, whole=12_300_000))
    assert "Measured at 1/5,000 of the paper's sequences, not extrapolated" in notes
    assert "on 4 of 20,000, HLoRA's 5 epochs of 1 of 4,000; 16 tokens each" in notes
    assert "4,000 is an assumption: 5 epochs of them are as many passes as EWC's" in notes
    assert "1 is 1/4,000 of 4,000, so the ratios of the paper's counting are not at one scale" in notes
    assert "by the whole model, they are 12.3 MB" in notes
    assert "An epoch of 1 fills no batch of 20" in notes
    notes = " ".join(cost_module._notes(0.01, ewc=200, nu=40, nu_samples=4_000, length=LENGTH, whole=12_300_000))
    assert "1/100 of" in notes and "not at one scale" not in notes and "fills no batch" not in notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, r"scale: expected above 0 and at most 1, which is 20,000 sequences; got 0\. Try --scale"),
        ({"sequences": 30_000}, r"scale: expected .* got 1\.5"),
        ({"sequences": 4, "nu_samples": 0}, "nu-samples: expected at least 1 sequence an epoch, got 0"),
    ],
)
def test_a_scale_out_of_range_is_refused_before_the_model_is_loaded(
    config: RunConfig, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_cost(config, **options)
    assert not Path(config.output).exists()


def test_a_text_too_short_for_the_scale_is_refused_with_what_it_has(config: RunConfig) -> None:
    with pytest.raises(DataError, match=r"sequences of 16 tokens, expected 20000"):
        measure_cost(config, scale=1)


def test_an_open_sequence_length_is_refused_by_field(fields: dict[str, Any]) -> None:
    fields["training"]["record"]["max_length"] = None
    with pytest.raises(ConfigError, match=r"training\.record\.max_length: None cannot be used here"):
        measure_cost(parse_config(fields), sequences=4)


@pytest.mark.slow
def test_command_writes_the_figure_beside_the_numbers(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    arguments = ["hlora", "cost", str(path), "--sequences", "4", "--nu-samples", "8000", "--set", "seed=3"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert not ended.value.code, captured.err
    output = tmp_path / "out" / "cost"
    cost = json.loads((output / "cost.json").read_text(encoding="utf-8"))
    assert cost["command"].startswith("hlora cost") and cost["provenance"]["seed"] == 3
    assert cost["samples"]["HLoRA"]["assumed"] == 8000
    assert "8,000 is an assumption; the time ratio" in " ".join(captured.out.split())
    assert (output / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (output / "cost.svg").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "config.yaml").exists()
