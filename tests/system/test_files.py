"""Outputs are whole or absent."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from hlora.system.files import atomic_directory, is_io_error, temporary_name, write_text
from hlora.system.locks import lock_directory


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
    with atomic_directory(directory) as fresh:
        (fresh / "inner").mkdir()
        (fresh / "inner" / "weights").write_text("new")
        assert names(directory) == ["stale"]
    assert names(directory) == ["inner"]
    assert (directory / "inner" / "weights").read_text() == "new"
    assert names(tmp_path) == ["adapter"]


def test_building_in_a_directory_that_does_not_exist_yet_makes_it(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "runs" / "mine" / "adapter") as fresh:
        (fresh / "weights").touch()
    assert names(tmp_path / "runs" / "mine") == ["adapter"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_old_directory_stays_when_building_its_successor_fails(tmp_path: Path, error: type[BaseException]) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "weights").write_text("old")
    with pytest.raises(error), atomic_directory(directory) as fresh:
        (fresh / "weights").write_text("half")
        raise error
    assert (directory / "weights").read_text() == "old"
    assert names(tmp_path) == ["adapter"]


def test_no_directory_is_left_when_building_the_first_one_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "adapter") as fresh:
        (fresh / "weights").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


def names_of_a_dead_process(*wanted: tuple[Path, str]) -> list[Path]:
    """As a process that is no more has named what it left."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, "\n".join(str(temporary_name(path, kind)) for path, kind in wanted).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        return [Path(line) for line in pipe.read().splitlines()]


def test_what_a_dead_process_left_is_cleared_and_what_it_moved_away_comes_back(tmp_path: Path) -> None:
    mine, note = tmp_path / "importance", tmp_path / "note.json"
    half, moved, text = names_of_a_dead_process((mine, "tmp"), (mine, "old"), (note, "tmp"))
    half.mkdir()
    moved.mkdir()
    (moved / "kept").write_text("old")
    text.write_text("half")
    with lock_directory(tmp_path):
        assert (mine / "kept").read_text() == "old"
        assert not list(tmp_path.glob(".*.tmp")) and not list(tmp_path.glob(".*.old"))


def test_what_a_living_process_is_building_stays(tmp_path: Path) -> None:
    mine = temporary_name(tmp_path / "importance", "tmp")
    theirs = mine.with_name(mine.name.replace(f".{os.getpid()}-", f".{os.getppid()}-"))
    theirs.mkdir()
    with atomic_directory(tmp_path / "importance", locked=True):
        assert theirs.is_dir()
    assert theirs.is_dir()


def test_what_another_machine_is_building_stays_unless_the_directory_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "node-7.cluster")
        theirs, *_ = names_of_a_dead_process((tmp_path / "importance", "tmp"))
    theirs.mkdir()
    with atomic_directory(tmp_path / "importance"):
        assert theirs.is_dir()
    with atomic_directory(tmp_path / "importance", locked=True):
        assert not theirs.exists()


def test_two_machines_and_two_threads_name_what_they_write_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = temporary_name(tmp_path / "cell.json", "tmp")
    assert temporary_name(tmp_path / "cell.json", "tmp") != here
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7.cluster")
    assert temporary_name(tmp_path / "cell.json", "tmp").name.split("-", 2)[2] == "node-7_cluster.tmp"


def save_a_tokenizer(path: Path) -> None:
    Tokenizer(WordLevel({str(number): number for number in range(1000)}, "0")).save(str(path))


@pytest.mark.parametrize(
    "save",
    [
        lambda path: path.write_bytes(bytes(10_000)),
        lambda path: save_file({"a": torch.zeros(2500)}, path),
        lambda path: torch.save(torch.zeros(2500), path),
        save_a_tokenizer,
    ],
)
@pytest.mark.parametrize("size", [0, 100, 4096])
def test_a_short_write_of_any_library_is_known_for_one_is_io_error(
    tmp_path: Path, save: Callable[[Path], Any], size: int
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(Exception) as caught:  # each its own
            save(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_io_error(caught.value), caught.value
    assert not is_io_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
