"""A grid on Ray's workers ends as it does in one process, whatever happens to a worker.

Two machines are two raylets on this one (ray.cluster_utils). Everything runs `hlora compare` as a user does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from hlora import ray_engine
from hlora.config import load_comparison
from hlora.errors import ConfigError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def ray() -> Any:
    return pytest.importorskip("ray", reason="needs Ray: pip install 'hlora[ray]'")


def command(file: Path, *options: str) -> list[str]:
    return [sys.executable, "-c", "from hlora.cli import main; main()", "compare", str(file), *options]


def run(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(file, *options), env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@contextmanager
def started(file: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command(file, *options), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
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


def workers_at_work(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        try:
            if process.cmdline()[:1] == ["ray::_work"]:
                found.append(process)
        except psutil.Error:
            pass
    return found


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
    tables = {path.name: path.read_bytes() for path in (output / "tables").iterdir() if "seconds" not in path.name}
    return found, tables


@pytest.mark.slow
def test_a_grid_with_a_killed_worker_ends_as_one_in_process(ray: Any, comparison_file: Path, tmp_path: Path) -> None:
    """Two local workers; one is killed while it computes, once two cells are there. Compared bit by bit."""
    whole, split = tmp_path / "whole", tmp_path / "split"
    done = run(comparison_file, "--set", f"output={whole}")
    assert done.returncode == 0, done.stderr
    with started(comparison_file, "--set", f"output={split}", "--engine", "ray", "--cpus-per-cell", "1") as process:
        while process.poll() is None and len(cells(split)) < 2:
            time.sleep(0.02)
        made = {path: path.stat().st_mtime_ns for path in cells(split)}
        while not (busy := workers_at_work(family(process.pid))):
            assert process.poll() is None
        busy[0].send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "the worker died" in err and "trying again elsewhere" in err, err
    assert found_in(split) == found_in(whole)
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    assert len(list((split / "general").glob("*/recording.json"))) == 2, "a recording is made once a seed"
    assert not list(split.glob(".driver-*")) and not list(split.rglob(".*.tmp"))
