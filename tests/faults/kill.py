"""Kills hlora at seeded points of its writing, goes on, and compares the end with that of a run nobody killed.

    OMP_NUM_THREADS=1 python tests/faults/kill.py FIELDS.json [--points 60] [--seed 0]

FIELDS.json: {"run": fields of a run, "compare": fields of a comparison}, of a tiny model. A point is the k-th time that
the process opens a file of the output directory to write, renames, makes or removes one: SIGKILL comes just before it
does. Each process is a fork of this one, which has imported everything and computed nothing. Prints a table, and as
its last line what it found as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has none of its parent's threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from rich.console import Console
from rich.table import Table

from hlora import checkpoint, comparison, pipeline
from hlora.config import CompareConfig, parse_config

torch.set_num_threads(1)
_WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fields", type=Path)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fields = json.loads(options.fields.read_text(encoding="utf-8"))
    table = Table("scenario", "points", "killed", "resumed", "differences", "seconds", title="kill harness")
    found: dict[str, Any] = {}
    checkpoint._EVERY = 0.0  # after each step
    for name, scenario in (("run", run), ("compare", compare)):
        points = options.points * 2 // 3 if name == "run" else options.points - options.points * 2 // 3
        found[name] = harness(name, scenario, fields[name], points, options.seed)
        table.add_row(name, *(str(found[name][key]) for key in ("points", "killed", "resumed")),
                      str(len(found[name]["differences"])), f"{found[name]['seconds']:.0f}")  # fmt: skip
    Console(width=100).print(table)
    print(json.dumps(found))


def harness(
    name: str, scenario: Callable[[dict[str, Any]], Any], fields: dict[str, Any], points: int, seed: int
) -> dict[str, Any]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        whole, count = Path(directory) / "whole", Path(directory) / "count"
        status = in_a_fork(lambda: scenario({**fields, "output": str(whole)}), whole, None, count)
        if status != 0:
            raise RuntimeError(f"{name}: the run that nobody kills ended with status {status}")
        expected, events = result(name, whole), int(count.read_text())
        chosen = sorted(random.Random(seed).sample(range(1, events + 1), min(points, events)))
        killed, resumed, differences = 0, 0, []
        for point in chosen:
            output = Path(directory) / f"at-{point}"
            here = {**fields, "output": str(output)}
            status = in_a_fork(lambda here=here: scenario(here), output, point, count)
            killed += status == -signal.SIGKILL
            status = in_a_fork(lambda here=here: scenario(here), output, None, count)
            resumed += status == 0
            got = result(name, output) if status == 0 else {}
            if got != expected:
                different = [key for key in {**got, **expected} if got.get(key) != expected.get(key)]
                differences.append({"point": point, "status": status, "in": different})
            shutil.rmtree(output)
    return {
        "points": len(chosen),
        "of": events,
        "killed": killed,
        "resumed": resumed,
        "differences": differences,
        "seconds": time.perf_counter() - started,
    }


def in_a_fork(work: Callable[[], Any], output: Path, point: int | None, count: Path) -> int:
    """Status of a fork that does the work, negative for a signal. point: the write that it is killed before."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            writes = watch(output, point)
            work()
            count.write_text(str(writes[0]))
            status = 0
        finally:
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(waited)


def watch(output: Path, point: int | None) -> list[int]:
    """Counts writes below `output`, and ends this process before number `point`."""
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
            if writes[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return writes


def run(fields: dict[str, Any]) -> None:
    """Record, tune, evaluate."""
    pipeline.run(parse_config(fields))


def compare(fields: dict[str, Any]) -> None:
    comparison.compare(parse_config(fields, kind=CompareConfig))


def result(name: str, output: Path) -> dict[str, Any]:
    """What must not depend on an interruption: numbers, and the bytes of ω, Ω and adapters."""
    found: dict[str, Any] = {}
    for path in sorted(output.rglob("*.safetensors")):
        if not any(part.startswith(".") for part in path.relative_to(output).parts):
            found[str(path.relative_to(output))] = hashlib.sha256(path.read_bytes()).hexdigest()
    if name == "run":
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
