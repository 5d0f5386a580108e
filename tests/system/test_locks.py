"""One process at a time has an output directory, or a cell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hlora.system.errors import ConfigError
from hlora.system.files import atomic_directory
from hlora.system.locks import lock_directory, try_lock

HOLD = """
import sys, time
from pathlib import Path
from hlora.system.locks import lock_directory
with lock_directory(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_directory_is_kept_to_one_process_until_it_ends(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match=rf"in use by process {os.getpid()}, started")
    with lock_directory(tmp_path), refused, lock_directory(tmp_path):
        pass
    with lock_directory(tmp_path):
        pass


@pytest.mark.parametrize("made_again", [False, True])
def test_a_directory_that_is_taken_away_meanwhile_is_an_error_at_the_end(tmp_path: Path, made_again: bool) -> None:
    output = tmp_path / "output"
    with (
        pytest.raises(ConfigError, match=r"was taken away while this ran.*start the same command again"),
        lock_directory(output),
    ):
        output.rename(tmp_path / "gone")
        if made_again:
            with atomic_directory(output / "importance"):
                pass
            (output / ".lock").touch()
    with lock_directory(tmp_path / "gone"):
        pass


def test_the_lock_of_a_killed_process_is_free_and_that_of_a_living_one_names_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=rf"in use by process {other.pid}, started"), lock_directory(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with lock_directory(tmp_path):
            assert f"process {os.getpid()}" in (tmp_path / ".lock.owner").read_text(encoding="utf-8")


def test_a_lock_is_refused_to_another_thread_and_to_the_same_one_again(tmp_path: Path) -> None:
    found: list[bool] = []

    def try_it() -> None:
        with try_lock(tmp_path / "cell.lock") as mine:
            found.append(mine)

    with try_lock(tmp_path / "cell.lock"):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        try_it()
    try_it()
    assert found == [False, False, True]


def test_a_link_in_place_of_the_owner_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock.owner").symlink_to(tmp_path / "mine")
    with lock_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


IMPORTED_AGAIN = """
import importlib, os, pkgutil, signal, sys

import hlora, hlora.cli

found = [module.name for module in pkgutil.walk_packages(hlora.__path__, "hlora.")]
# hlora.integrations: each module is imported by the framework that it is for.
names = ["hlora", *(name for name in found if name != "hlora.__main__" and ".integrations." not in name)]
for name in names:
    importlib.import_module(name)  # and with them all other packages, which go their own ways on Windows
for name in [name for name in sys.modules if name.partition(".")[0] == "hlora"]:
    del sys.modules[name]
for name in ("fcntl", "resource", "pwd", "grp", "termios", "pty"):
    sys.modules[name] = None
for attribute in ("O_NOFOLLOW", "getuid", "geteuid", "fork", "uname"):
    delattr(os, attribute)
del signal.SIGKILL, signal.SIGUSR1
for name in names:
    importlib.import_module(name)
print(len(names))
"""


@pytest.mark.slow
def test_every_module_imports_where_there_is_no_fcntl() -> None:
    """Nor another module or name that Windows lacks."""
    done = subprocess.run([sys.executable, "-c", IMPORTED_AGAIN], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40
