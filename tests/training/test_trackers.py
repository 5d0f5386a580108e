"""What experiment trackers hold after `hlora run`, read back from where each keeps it, without a network."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hlora.training.trackers import run_of_its_own

Scalars = dict[str, dict[str, dict[int, float]]]
"""Run → name of a value → step → value."""


def environment(directory: Path) -> dict[str, str]:
    """Every tracker writes below `directory` and reaches no network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(directory),
        "WANDB_CACHE_DIR": str(directory),
        "WANDB_CONFIG_DIR": str(directory),
        "WANDB_DATA_DIR": str(directory),
        "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": str(directory / "trackio"),
    }


def run(fields: dict[str, Any], directory: Path, *names: str) -> subprocess.CompletedProcess[str]:
    fields["training"]["common"]["report_to"] = list(names)
    fields["evaluation"] = {"max_tokens": 64, "window": 32, "stride": 32, "generate": 0, "accuracy": False}
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    command = [sys.executable, "-c", "from hlora.cli import main; main()", "run", str(file)]
    where = environment(directory)
    return subprocess.run(command, env=where, cwd=directory, capture_output=True, text=True, timeout=240)


def add(found: Scalars, run: str, name: str, step: int, value: float) -> None:
    found.setdefault(run, {}).setdefault(name.removeprefix("train/"), {})[step] = value


def read_tensorboard(directory: Path) -> Scalars:
    found: Scalars = {}
    for file in directory.glob("out/logs/*/**/events.*"):
        phase = file.relative_to(directory / "out" / "logs").parts[0]
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                add(found, f"out/{phase}", name, event.step, event.value)
    return found


def records(log: bytes) -> Iterator[bytes]:
    """What a .wandb file holds: LevelDB's log format behind 7 bytes. wandb 0.31 reads it in its Go binary alone."""
    place, record = 7, b""
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:  # no room for a header: the rest of a block is padding
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", log[place + 4 : place + 7])  # behind a checksum
        record += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def read_wandb(directory: Path) -> Scalars:
    from wandb.proto import wandb_internal_pb2

    found: Scalars = {}
    for file in directory.glob("wandb/offline-run-*/*.wandb"):
        run = ""
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                run = record.run.display_name
            elif record.HasField("history"):
                row = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                values = {name: json.loads(text) for name, text in row.items()}
                for name, value in values.items():
                    if "train/global_step" in values and isinstance(value, int | float):
                        add(found, run, name, values["train/global_step"], value)
    return found


def read_mlflow(directory: Path) -> Scalars:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    found: Scalars = {}
    for run in client.search_runs(["0"]):
        for name in run.data.metrics:
            for metric in client.get_metric_history(run.info.run_id, name):
                add(found, run.info.run_name, name, metric.step, metric.value)
    return found


def read_trackio(directory: Path) -> Scalars:
    found: Scalars = {}
    for file in directory.glob("trackio/*.db"):
        with sqlite3.connect(file) as database:
            for run, text in database.execute("SELECT run_name, metrics FROM metrics"):
                values = json.loads(text)
                for name, value in values.items():
                    if isinstance(value, int | float):
                        add(found, run, name, values["train/global_step"], value)
    return found


READ = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


@pytest.mark.slow
def test_trackers_have_losses_phi_and_layer_coefficients_a_run_for_each_phase(
    job_fields: dict[str, Any], tmp_path: Path
) -> None:
    """One run tells them all: a process imports for 12 s."""
    installed = [name for name in READ if find_spec(name)]
    done = run({**job_fields, "baselines": ["lora"]}, tmp_path, *installed)
    assert done.returncode == 0, done.stderr
    assert not any(other in done.stderr for other in ("torchao", "_pytree", "bitsandbytes")), done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert "layer_coefficient" not in json.dumps(results["history"]), "they are for trackers alone"
    for name in installed:
        check_told(READ[name](tmp_path), results)
    if missing := READ.keys() - installed:
        pytest.skip(f"needs {', '.join(missing)}: pip install")


def check_told(found: Scalars, results: dict[str, Any]) -> None:
    """What a tracker was told is what results.json holds of the run."""
    assert set(found) == {"out/record", "out/tune", "out/lora"}
    losses = ("loss", "regularisation_loss", "weighted_regularisation_loss", "total_loss", "phi")
    assert all(set(losses) <= set(entry) for entry in results["history"]["tune"])
    for phase, history in results["history"].items():
        logged = {key: {entry["step"]: entry[key] for entry in history if key in entry} for key in losses}
        for key, values in logged.items():
            assert found[f"out/{phase}"].get(key, {}) == pytest.approx(values, rel=1e-6), (phase, key)
    coefficients = {f"layer_coefficient/{k}": {0: v} for k, v in results["importance"]["layer_weights"].items()}
    assert len(coefficients) == 4
    for phase, values in found.items():
        told = {key: steps for key, steps in values.items() if key.startswith("layer_coefficient/")}
        assert set(told) == (set(coefficients) if phase == "out/tune" else set()), phase
        assert all(steps == pytest.approx(coefficients[key], rel=1e-6) for key, steps in told.items())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow: pip install")
def test_a_phase_that_fails_ends_its_run_as_failed(job_fields: dict[str, Any], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    job_fields["training"]["tune"] |= {"learning_rate": 1e30, "max_grad_norm": 0.0}
    done = run(job_fields, tmp_path, "mlflow")
    assert done.returncode == 2, done.stderr
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["0"])
    assert {run.info.run_name: run.info.status for run in runs} == {"out/record": "FINISHED", "out/tune": "FAILED"}


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    yield module
    module.teardown()


@pytest.mark.slow
def test_a_run_that_was_open_before_stays_open(wandb: Any) -> None:
    with run_of_its_own():
        wandb.init(project="hlora", name="a phase's")
    assert wandb.run is None
    mine = wandb.init(project="hlora", name="the user's")
    with run_of_its_own():
        pass
    assert wandb.run is mine
    wandb.finish()
