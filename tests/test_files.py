"""Outputs are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hlora.errors import ConfigError
from hlora.files import alone, building, write_text


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_write_text_replaces_a_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_text(file, "old")
    write_text(file, "Ω")
    assert file.read_text(encoding="utf-8") == "Ω"
    assert names(tmp_path) == ["results.json"]


def test_a_failed_write_leaves_the_old_text_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "new \ud800")  # half a surrogate pair has no UTF-8
    assert file.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["results.json"]


def test_a_built_directory_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "stale").touch()
    with building(directory) as fresh:
        (fresh / "inner").mkdir()
        (fresh / "inner" / "weights").write_text("new")
        assert names(directory) == ["stale"]
    assert names(directory) == ["inner"]
    assert (directory / "inner" / "weights").read_text() == "new"
    assert names(tmp_path) == ["adapter"]


def test_building_in_a_directory_that_does_not_exist_yet_makes_it(tmp_path: Path) -> None:
    with building(tmp_path / "runs" / "mine" / "adapter") as fresh:
        (fresh / "weights").touch()
    assert names(tmp_path / "runs" / "mine") == ["adapter"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_old_directory_stays_when_building_its_successor_fails(tmp_path: Path, error: type[BaseException]) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "weights").write_text("old")
    with pytest.raises(error), building(directory) as fresh:
        (fresh / "weights").write_text("half")
        raise error
    assert (directory / "weights").read_text() == "old"
    assert names(tmp_path) == ["adapter"]


def test_no_directory_is_left_when_building_the_first_one_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), building(tmp_path / "adapter") as fresh:
        (fresh / "weights").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


def dead_pid() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_what_a_dead_process_left_is_cleared_and_what_it_moved_away_comes_back(tmp_path: Path) -> None:
    dead, mine = dead_pid(), tmp_path / "importance"
    (tmp_path / f".importance.{dead}.tmp").mkdir()
    (tmp_path / f".importance.{dead}.old").mkdir()
    (tmp_path / f".importance.{dead}.old" / "kept").write_text("old")
    (tmp_path / f".note.json.{dead}.tmp").write_text("half")
    with alone(tmp_path):
        assert (mine / "kept").read_text() == "old"
        assert not list(tmp_path.glob(".*.tmp")) and not list(tmp_path.glob(".*.old"))


def test_what_a_living_process_is_building_stays(tmp_path: Path) -> None:
    theirs = tmp_path / f".importance.{os.getppid()}.tmp"
    theirs.mkdir()
    with building(tmp_path / "importance"):
        assert theirs.is_dir()
    assert theirs.is_dir()


def test_a_directory_is_kept_to_one_process_until_it_ends(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match=rf"in use by process {os.getpid()}, started")
    with alone(tmp_path), refused, alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
