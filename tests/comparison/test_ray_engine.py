"""A grid on Ray's workers ends as it does in one process, whatever happens to a worker.

Two machines are two raylets on this one (ray.cluster_utils). Everything runs `hlora compare` as a user does.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from hlora.cli import main
from hlora.comparison.cells import Cell
from hlora.comparison.grid import Grid
from hlora.comparison.ray_engine import _compute, _open, _Session, _work, engine
from hlora.config.comparison import CompareConfig
from hlora.config.reading import load_comparison
from hlora.system.errors import ClusterError, ConfigError

# By default Ray starts its workers at niceness 15: on a busy machine they starve behind everything else.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
PATIENCE = 600  # seconds, of a hang; a grid took one minute alone, over five at a load of seven


@pytest.fixture
def ray() -> Any:
    return pytest.importorskip("ray", reason="needs Ray: make test-all")


@contextmanager
def started(file: Path, *options: str, tries: int = 4) -> Iterator[subprocess.Popen[str]]:
    """`hlora compare` with so many tries for a cell."""
    code = f"from hlora.comparison import ray_engine; ray_engine._TRIES = {tries}; from hlora.cli import main; main()"
    command = [sys.executable, "-c", code, "compare", str(file), *options]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        for each in reversed(family(process.pid)):
            each.kill()
        process.wait()


def family(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def workers(pid: int, *titles: str) -> list[psutil.Process]:
    """Ray's worker processes below `pid` that have one of the titles."""
    found = []
    for process in family(pid):
        with suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0] in titles:
                found.append(process)
    return found


def stopped_at_work(pid: int) -> psutil.Process | None:
    """A worker below `pid` that has a cell and cannot finish it any more, if one is caught."""
    for process in workers(pid, "ray::_work"):
        with suppress(psutil.NoSuchProcess):
            process.suspend()
            while process.status() != psutil.STATUS_STOPPED:
                time.sleep(0.001)
            if process.cmdline()[0] == "ray::_work":  # the title goes before the result is sent
                return process
            process.resume()
    return None


def change(file: Path, **changes: Any) -> None:
    fields = yaml.safe_load(file.read_text(encoding="utf-8")) | changes
    file.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")


def two_arms(file: Path, second: dict[str, Any]) -> None:
    """Keep of the comparison's arms the base alone, beside another."""
    change(file, arms={"Base": {"method": "base"}, "other": second}, seeds=[0], unprotected="other")


@pytest.fixture
def five_cells(comparison_file: Path) -> Path:
    """The base model once; two arms that share a general phase, on two seeds."""
    arms = {"Base": {"method": "base"}, "LoRA(ν+μ)": {"method": "lora_after_general"}, "HLoRA": {"method": "hlora"}}
    change(comparison_file, arms=arms, unprotected="LoRA(ν+μ)")
    return comparison_file


def cells(output: Path) -> list[Path]:
    return list((output / "cells").glob("*.json"))


def found_in(output: Path) -> Any:
    """comparison.json and the tables, without what differs from run to run."""
    found = json.loads((output / "comparison.json").read_text(encoding="utf-8"))
    for cell in found["cells"]:
        cell.pop("seconds")
        cell["config"].pop("output")
    for name in ("config", "command", "provenance"):
        found.pop(name)
    tables = {}
    for path in (output / "tables").glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as rows:
            tables[path.name] = [{k: v for k, v in row.items() if k != "Train s"} for row in csv.DictReader(rows)]
    assert tables
    return found, tables


@pytest.mark.slow
def test_a_grid_with_a_killed_worker_ends_as_one_in_process(
    ray: Any, hlora: Any, five_cells: Path, tmp_path: Path
) -> None:
    """Two local workers; one is killed while it computes, once two cells are there. Compared bit by bit.

    What fails inside a cell is said there, and not tried again.
    """
    arms = yaml.safe_load(five_cells.read_text(encoding="utf-8"))["arms"]
    change(five_cells, arms={**arms, "wrong": {"method": "osf", "strengths": [2.0], "seeds": [0]}})
    whole, split = tmp_path / "whole", tmp_path / "split"
    status, _, err = hlora("compare", five_cells, "--set", f"output={whole}")
    assert status == 0, err
    with started(five_cells, "--set", f"output={split}", "--engine", "ray", "--cpus-per-cell", "1") as process:
        while process.poll() is None and len(cells(split)) < 2:
            time.sleep(0.02)
        made = {path: path.stat().st_mtime_ns for path in cells(split)}
        while not (busy := workers(process.pid, "ray::_work")):
            assert process.poll() is None
        busy[0].send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "the worker died" in err and "trying again elsewhere" in err, err
    assert err.count("failed: osf: expected") == 1, err
    assert found_in(split) == found_in(whole)
    assert [cell["arm"] for cell in found_in(split)[0]["cells"] if cell["status"] == "failed"] == ["wrong"]
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    assert len(list((split / "general").glob("*/recording.json"))) == 2, "a recording is made once a seed"
    assert not list(split.glob(".driver-*")) and not list(split.rglob(".*.tmp"))


@pytest.mark.slow
def test_a_grid_on_two_machines_of_which_one_dies_is_finished_by_the_other(
    ray: Any, five_cells: Path, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        for name, value in ENVIRONMENT.items():
            environment.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            second = cluster.add_node(num_cpus=1)
            address = ("--engine", "ray", "--ray-address", cluster.address)
            with started(five_cells, *address) as process:
                raylet = second.all_processes["raylet"][0].process.pid
                while not (busy := cells(tmp_path / "grid") and stopped_at_work(raylet)):
                    assert process.poll() is None, "the grid has ended, and no cell was seen to run on the second node"
                    time.sleep(0.02)
                cluster.remove_node(second, allow_graceful=False)
                busy.kill()  # as the machine's end would; stopped, it cannot see that its raylet is gone
                _, err = process.communicate(timeout=PATIENCE)
        finally:
            cluster.shutdown()
    assert process.returncode == 0, err
    found, _ = found_in(tmp_path / "grid")
    assert {cell["status"] for cell in found["cells"]} == {"done"} and len(found["cells"]) == 5
    assert "the worker died (NodeDiedError" in err and "trying again elsewhere" in err, err


@pytest.mark.slow
def test_workers_that_all_die_end_in_one_message(ray: Any, comparison_file: Path, tmp_path: Path) -> None:
    change(comparison_file, arms={"Base": {"method": "base"}}, seeds=[0], unprotected=None)
    with started(comparison_file, "--engine", "ray", tries=2) as process:  # each has to import for 12 s
        while process.poll() is None:
            # Not idle ones: Ray waits a minute for each that is killed as it starts, and ray.init may never end.
            for worker in workers(process.pid, "ray::_work"):
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
            time.sleep(0.02)
        _, err = process.communicate()
    assert process.returncode == 2, err
    *_, last = err.strip().splitlines()
    assert last.startswith("hlora: 1 of 1 cells are not computed, since workers died again and again"), err
    assert err.count("trying again elsewhere") == 1 and "Traceback" not in err, err
    assert not cells(tmp_path / "grid") and not list((tmp_path / "grid").glob(".driver-*"))


@pytest.mark.slow
def test_an_address_without_a_cluster_and_more_than_the_machine_has_are_refused(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match=r"--cpus-per-cell"), engine(cpus=1000):
        pass
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")
    with pytest.raises(ClusterError, match=r"--ray-address auto: .*`ray start --head`"), engine("auto"):
        pass


def compute_with(ray: Any, grid: Grid, *ends: Exception) -> None:
    """As the driver, with a Ray whose first tasks end so, one each, and whose others are done in this process."""
    left = list(ends)

    def get(task: Callable[[], str]) -> str:
        if left:
            raise left.pop(0)
        return task()

    stub = SimpleNamespace(put=lambda it: it, wait=lambda refs: (refs[:1], []), get=get, exceptions=ray.exceptions)
    _compute(stub, SimpleNamespace(remote=partial(partial, _work)), grid, grid.first_cells())


@pytest.mark.slow
def test_cells_that_die_with_their_machine_are_not_workers_that_keep_dying(
    ray: Any, comparison_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a machine of many cores has more cells than the deaths in a row that end a run."""
    two_arms(comparison_file, {"method": "lora"})
    monkeypatch.setattr("hlora.comparison.ray_engine._DEATHS_IN_A_ROW", 2)
    grid = Grid.open(load_comparison(comparison_file))
    crashed = ray.exceptions.WorkerCrashedError
    with pytest.raises(ClusterError, match="2 of 2 cells are not computed"):
        compute_with(ray, grid, crashed(), crashed())
    compute_with(ray, grid, *(ray.exceptions.NodeDiedError("gone") for _ in range(4)))
    assert {cell["status"] for cell in grid.results(grid.first_cells())} == {"done"}


@pytest.mark.slow
def test_a_cell_that_the_file_system_shows_late_is_waited_for(
    ray: Any, comparison_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_arms(comparison_file, {"method": "lora"})
    grid, read, asked = Grid.open(load_comparison(comparison_file)), Grid.read, Counter[str]()

    def late(self: Grid, cell: Cell) -> Any:
        asked[cell.key] += 1  # before it is computed, after, and again
        return read(self, cell) if asked[cell.key] > 3 else None

    monkeypatch.setattr(Grid, "read", late)
    compute_with(ray, grid)
    assert {cell["status"] for cell in grid.results(grid.first_cells())} == {"done"}

    monkeypatch.setattr(Grid, "read", lambda self, cell: None)
    monkeypatch.setattr("hlora.comparison.ray_engine._LATE", 0)
    with pytest.raises(ClusterError, match=r"Base, .*: machine \S+ has computed it, but this one does not see it"):
        compute_with(ray, grid)


def test_options_of_ray_without_it_are_refused(
    comparison_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hlora", "compare", str(comparison_file), "--cpus-per-cell", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "--engine ray" in capsys.readouterr().err


def test_one_gpu_and_a_half_is_refused_before_ray_starts() -> None:
    with pytest.raises(ConfigError, match=r"--gpus-per-cell 1\.5: expected a whole number"), engine(gpus=1.5):
        pass


def test_without_ray_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[ray\]'"), engine():
        pass


def test_a_machine_that_does_not_see_the_drivers_directories_refuses(
    comparison_config: CompareConfig, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "grid" / ".driver-0"
    with pytest.raises(ClusterError, match=r"machine \S+ does not see the driver's output directory, .*grid"):
        _open(_Session(str(Path.cwd()), str(elsewhere), comparison_config))
    with pytest.raises(ClusterError, match=rf"{tmp_path}/absent, No such file"):
        _open(_Session(str(tmp_path / "absent"), str(elsewhere), comparison_config))


def test_a_machine_that_lacks_the_data_is_named(comparison_config: CompareConfig, tmp_path: Path) -> None:
    mark = tmp_path / "grid" / ".driver-0"
    mark.parent.mkdir()
    mark.touch()
    Path(comparison_config.tasks["sums"].train).unlink()
    with pytest.raises(ClusterError, match=r"machine \S+ cannot begin: .*train\.jsonl"):
        _open(_Session(str(Path.cwd()), str(mark), comparison_config))


def test_a_worker_drops_the_grid_before_it_opens_the_next(
    comparison_config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command has two sessions, and memory need not hold two models."""
    marks = [tmp_path / "grid" / f".driver-{n}" for n in range(2)]
    marks[0].parent.mkdir()
    for mark in marks:
        mark.touch()
    model = weakref.ref(_open(_Session(str(Path.cwd()), str(marks[0]), comparison_config)).base)
    assert model()
    monkeypatch.setattr(Grid, "open", lambda config: model())
    assert _open(_Session(str(Path.cwd()), str(marks[1]), comparison_config)) is None


def test_a_machine_with_other_data_than_the_driver_refuses(comparison_config: CompareConfig, tmp_path: Path) -> None:
    cell, *_ = Grid.open(comparison_config).first_cells()
    questions = Path(comparison_config.tasks["sums"].train)
    questions.write_text("".join(questions.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]))
    mark = tmp_path / "grid" / ".driver-0"
    mark.touch()
    with pytest.raises(ClusterError, match="sees other data than the driver"):
        _work(_Session(str(Path.cwd()), str(mark), comparison_config), cell, again=False, shared=False)
    assert not cells(tmp_path / "grid")
