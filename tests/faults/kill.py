"""Kills hlora at seeded points of its writing, or fails the disk there; goes on, and compares the end with that of a
run to which nothing happened.

    OMP_NUM_THREADS=1 python tests/faults/kill.py FIELDS.json [--points 60] [--failures 24] [--seed 0]

FIELDS.json: {"run": fields of a run, "compare": fields of a comparison}, of a tiny model. A point is the k-th time that
the process opens a file of the output directory to write, renames, makes or removes one. SIGKILL comes just before it
does; or from there on every such call fails, as on a full disk (ENOSPC), a broken one (EIO) or one that has become
read-only (EROFS): then the command has to end with status 2 and one message. Each process is a fork of this one, which
has imported everything and computed nothing. Prints a table, and as its last line what it found as JSON.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has none of its parent's threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import yaml
from rich.console import Console
from rich.table import Table

from hlora import checkpoint, cli, comparison, pipeline  # noqa: F401  # all that a fork would import by itself

torch.set_num_threads(1)
_WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fields", type=Path)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--failures", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fields = json.loads(options.fields.read_text(encoding="utf-8"))
    table = Table("scenario", "points", "as expected", "resumed", "differences", "seconds", title="kill harness")
    found: dict[str, Any] = {}
    checkpoint._EVERY = 0.0  # after each step
    kills, most = [signal.SIGKILL.value], options.points * 2 // 3
    for name, command, points, ends in (
        ("run, killed", "run", most, kills),
        ("compare, killed", "compare", options.points - most, kills),
        ("run, disk fails", "run", options.failures, [errno.ENOSPC, errno.EIO, errno.EROFS]),
    ):
        found[name] = harness(command, fields[command], points, ends, options.seed)
        shown = [found[name][key] for key in ("points", "as_expected", "resumed")]
        table.add_row(name, *map(str, shown), str(len(found[name]["differences"])), f"{found[name]['seconds']:.0f}")
    Console(width=100).print(table)
    print(json.dumps(found))


def harness(command: str, fields: dict[str, Any], points: int, ends: list[int], seed: int) -> dict[str, Any]:
    """ends: SIGKILL, or numbers of errors of the disk, in turn."""
    started, killing = time.perf_counter(), ends == [signal.SIGKILL.value]
    with tempfile.TemporaryDirectory() as directory:
        log, whole = Path(directory) / "log", Path(directory) / "whole"
        status, events = in_a_fork(command, {**fields, "output": str(whole)}, log)
        if status != 0:
            raise RuntimeError(f"{command}: the run that nothing happens to ended with {status}\n{log.read_text()}")
        expected = result(command, whole)
        chosen = sorted(random.Random(seed).sample(range(1, events + 1), min(points, events)))
        as_expected, resumed, differences = 0, 0, []
        for number, point in enumerate(chosen):
            output, end = Path(directory) / f"at-{point}", ends[number % len(ends)]
            here = {**fields, "output": str(output)}
            status, _ = in_a_fork(command, here, log, point, end)
            said = log.read_text(encoding="utf-8")
            good = status == -end if killing else status == 2 and "Traceback" not in said and "hlora: " in said
            if status == 0:  # only clearing away failed, after the last result was written
                good = result(command, output) == expected
            status, _ = in_a_fork(command, here, log)
            got = result(command, output) if status == 0 else {}
            as_expected, resumed = as_expected + good, resumed + (status == 0)
            if got != expected or not good:
                different = [key for key in {**got, **expected} if got.get(key) != expected.get(key)]
                differences.append({"point": point, "end": end, "status": status, "in": different, "said": said[-600:]})
            shutil.rmtree(output)
    return {
        "points": len(chosen),
        "of": events,
        "as_expected": as_expected,
        "resumed": resumed,
        "differences": differences,
        "seconds": time.perf_counter() - started,
    }


def in_a_fork(
    command: str, fields: dict[str, Any], log: Path, point: int | None = None, end: int = 0
) -> tuple[int, int]:
    """Status of a fork that runs the command, negative for a signal, and how many writes it got to.

    point: the write at which it is killed, or from which on writes fail. log: what it prints.
    """
    config, count = log.with_name("config.yaml"), log.with_name("count")
    config.write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8")
    count.write_text("0", encoding="utf-8")
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(printed, 1), os.dup2(printed, 2)
            sys.argv = ["hlora", command, str(config)]
            writes = watch(Path(fields["output"]), point, end)
            try:
                cli.main()
            except SystemExit as ended:
                status = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            count.write_text(str(writes[0]), encoding="utf-8")
        finally:
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(waited), int(count.read_text(encoding="utf-8"))


def watch(output: Path, point: int | None, end: int) -> list[int]:
    """Counts writes below `output`; kills this process at number `point`, or fails that one and all that follow."""
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
            if point is not None and writes[0] >= point:
                if end == signal.SIGKILL.value:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(end, os.strerror(end), os.fspath(path))

    sys.addaudithook(hook)
    return writes


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
