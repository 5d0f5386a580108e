"""Kills hlora at seeded points of its writing, or fails the disk there; resumes, and compares the end with that of a
run to which nothing happened.

    OMP_NUM_THREADS=1 python tests/faults/kill.py FIELDS.json COMMAND SCENARIO=POINTS … [--seed 0]

FIELDS.json: fields of a run or of a comparison (COMMAND), of a tiny model. A point is the k-th time that the process
opens a file of the output directory to write, renames, makes or removes one. What happens there:

    killed         SIGKILL, just before it
    disk fails     from there on every such call fails, as on a disk that is full (ENOSPC), broken (EIO) or has become
                   read-only (EROFS), or in a directory that has (EACCES)
    short writes   from there on no file grows beyond a seeded size: the kernel writes what fits, then fails
    vanishes       the output directory is moved away, as a mount that is lost

In all but the first the command has to end with status 2 and one message. Each process is a fork of this one, which has
imported everything and computed nothing. Prints what it found of each scenario as JSON.
"""

from __future__ import annotations

import argparse
import errno
import gc
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has none of its parent's threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import torch.utils.tensorboard
import yaml
from trl import SFTTrainer  # noqa: F401  # all that a fork would import by itself

from hlora import cli, pipeline  # noqa: F401
from hlora.comparison import compare  # noqa: F401
from hlora.report.comparison import figures, page, table_formats, tables  # noqa: F401
from hlora.training import checkpoint

torch.set_num_threads(1)
_WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
_DISK = ("ENOSPC", "EIO", "EROFS", "EACCES")
SCENARIOS = {  # name: what happens at its points, in turn
    "killed": ("SIGKILL",),
    "disk fails": _DISK,
    "short writes": ("short",),
    "vanishes": ("gone",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fields", type=Path)
    parser.add_argument("command", choices=("run", "compare"))
    parser.add_argument("scenarios", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    points = {name: int(count) for name, count in (each.split("=") for each in options.scenarios)}
    fields = json.loads(options.fields.read_text(encoding="utf-8"))
    checkpoint._EVERY = 0.0  # after each step
    gc.freeze()  # or each fork goes through all that was imported whenever Accelerate collects: 0.7 s a phase
    print(json.dumps(harness(options.command, fields, points, options.seed)))


def harness(command: str, fields: dict[str, Any], points: dict[str, int], seed: int) -> dict[str, Any]:
    """What each scenario found, of so many points; all are compared with one run that nothing happened to."""
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory) / "whole"
        status, events, said = in_a_fork(command, {**fields, "output": str(whole)})
        if status != 0:
            raise RuntimeError(f"{command}: the run that nothing happens to ended with {status}\n{said}")
        expected = result(command, whole)
        found = {}
        for name, count in points.items():
            chosen = sorted(random.Random(seed).sample(range(1, events + 1), min(count, events)))
            found[name] = {"of": events, **scenario(command, fields, chosen, SCENARIOS[name], expected)}
    return found


def scenario(
    command: str, fields: dict[str, Any], chosen: Sequence[int], ends: Sequence[str], expected: dict[str, Any]
) -> dict[str, Any]:
    """What came of each point: the command ended there as it should, and resumed to what is expected."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        as_expected, resumed, differences = 0, 0, []
        for number, point in enumerate(chosen):
            output, end = Path(directory) / f"at-{point}", ends[number % len(ends)]
            here = {**fields, "output": str(output)}
            first, _, said = in_a_fork(command, here, point, end)
            good = first == -signal.SIGKILL if end == "SIGKILL" else _said_once(first, said)
            if aside(output).exists():  # the mount is back
                shutil.rmtree(output, ignore_errors=True)
                aside(output).rename(output)
            if first == 0:  # only clearing away failed, after the last result was written
                good = result(command, output) == expected
            status, _, then = in_a_fork(command, here)
            got = result(command, output) if status == 0 else {}
            as_expected, resumed = as_expected + good, resumed + (status == 0)
            if got != expected or not good:
                different = [key for key in {**got, **expected} if got.get(key) != expected.get(key)]
                differences.append({"point": point, "end": end, "status": [first, status], "in": different})
                differences[-1]["said"] = [said[-600:], then[-600:] if status else ""]
            shutil.rmtree(output)
    return {
        "points": len(chosen),
        "as_expected": as_expected,
        "resumed": resumed,
        "differences": differences,
        "seconds": time.perf_counter() - started,
    }


def _said_once(status: int, said: str) -> bool:
    return status == 2 and said.count("hlora: ") == 1 and "Traceback" not in said


def in_a_fork(command: str, fields: dict[str, Any], point: int | None = None, end: str = "") -> tuple[int, int, str]:
    """Status of a fork that runs the command, negative for a signal; how many writes it got to; and what it printed.

    point: the write at which `end` happens.
    """
    config = Path(fields["output"]).with_name("config.yaml")
    config.write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8")
    sys.stdout.flush(), sys.stderr.flush()
    reading, writing = os.pipe()  # no file: its writes are not to be short
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.dup2(writing, 1), os.dup2(writing, 2)
            sys.argv = ["hlora", command, str(config)]
            writes = watch(Path(fields["output"]), point, end)
            try:
                cli.main()
            except SystemExit as ended:
                status = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            print(f"writes: {writes[0]}", flush=True), sys.stderr.flush()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read()
    _, waited = os.waitpid(child, 0)
    found = re.search(r"writes: (\d+)\n", said)  # a thread may write behind it
    return os.waitstatus_to_exitcode(waited), int(found[1]) if found else 0, said


def watch(output: Path, point: int | None, end: str) -> list[int]:
    """Counts writes below `output`; from number `point` on, `end` happens to this process."""
    writes, below = [0], output.absolute()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in _WRITES:
            path = arguments[0]
        else:
            return
        if isinstance(path, str | os.PathLike) and below in Path(path).absolute().parents:
            writes[0] += 1
            if point is None or writes[0] < point:
                return
            if end == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            elif end == "short":  # Python ignores SIGXFSZ, so that writes fail with EFBIG
                size = int(2 ** random.Random(point).uniform(0, 16))
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            elif end == "gone":
                if writes[0] == point:
                    output.rename(aside(output))
            else:
                number = getattr(errno, end)
                raise OSError(number, os.strerror(number), os.fspath(path))

    sys.addaudithook(hook)
    return writes


def aside(output: Path) -> Path:
    return output.with_name(f"{output.name}.gone")


def result(command: str, output: Path) -> dict[str, Any]:
    """What must not depend on an interruption: numbers, and the bytes of ω, Ω and adapters."""
    found: dict[str, Any] = {}
    for path in sorted(output.rglob("*.safetensors")):
        if not any(part.startswith(".") for part in path.relative_to(output).parts):
            found[str(path.relative_to(output))] = hashlib.sha256(path.read_bytes()).hexdigest()
    if command == "run":
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
        found |= {"arms": results["arms"], "history": results["history"], "importance": results["importance"]}
        found["files"] = sorted(str(path.relative_to(output)) for path in output.glob("*"))
    else:
        cells = json.loads((output / "comparison.json").read_text(encoding="utf-8"))["cells"]
        kept = ("arm", "task", "seed", "strength", "status", "test", "validation", "history")
        found["cells"] = [{key: cell[key] for key in kept} for cell in cells]
    return found


if __name__ == "__main__":
    main()
