"""`hlora compare --engine ray`: the cells of a grid as Ray tasks, on this machine or on a cluster.

This process, the driver, decides which cells are computed, and first of all what several cells share. A worker computes
a cell as the in-process engine does, and writes the same file into the same output directory. So every machine needs
that directory, and the data, at the same path. If a worker is killed, its cell is given to another. A failure inside a
cell is its result, and is not retried.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hlora.comparison.cells import Cell
from hlora.comparison.grid import Grid, log_progress
from hlora.comparison.shared import Busy, shared_importance, shared_key, shared_part
from hlora.config.comparison import CompareConfig
from hlora.system.errors import ClusterError, ConfigError, HloraError, first_line, how_to_install

logger = logging.getLogger("hlora")

_TRIES = 4  # attempts at a cell whose worker dies
_DEATHS_IN_A_ROW = 3 * _TRIES  # with nothing finished in between; then all stops
_LATE = 120  # seconds until a network file system shows another machine's writes; NFS takes up to 60
_STORE = 100_000_000  # bytes of Ray's object store on this machine; only a configuration is sent


@contextmanager
def engine(
    address: str | None = None, gpus: float | None = None, cpus: float = 1
) -> Iterator[Callable[[Grid, list[Cell], bool], None]]:
    """Start or join Ray, and yield the function by which `compare` computes cells.

    Args:
        address: A running cluster, HOST:PORT or auto. None starts Ray on this machine and stops it afterwards.
        gpus: GPUs for each cell; by default 1 if there are any, else 0.
        cpus: CPU cores for each cell.

    Raises:
        ConfigError: Ray is not installed, or cannot give that many GPUs.
        ClusterError: No cluster answers, or this machine has too little for a cell.
    """
    if gpus is not None and gpus > 1 and gpus % 1:
        raise ConfigError(f"--gpus-per-cell {gpus:g}: expected a whole number, or below 1 for several cells on one.")
    ray = _ray()
    try:
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            here: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE}
            ray.init("local", log_to_driver=False, logging_level=logging.ERROR, **here)
        else:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises many types
        raise ClusterError(
            f"--ray-address {address or '(none: this machine)'}: Ray does not start or answer there "
            f"({first_line(error)}). `ray start --head` starts a cluster, `ray status` shows one; the same versions of "
            "Ray and Python are needed on all machines."
        ) from None
    try:
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        asked = {"CPU": cpus, "GPU": gpus}
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(has.get(kind, 0) >= amount for kind, amount in asked.items()) for has in machines):
            said = f"no machine has {cpus:g} CPU cores and {gpus:g} GPUs, which a cell asks for"
            if address is None:
                raise ClusterError(f"{said}; lower --cpus-per-cell or --gpus-per-cell.")
            logger.warning("%s; waiting for one to join the cluster", said)
        # Ray does not count retries after running out of memory, so its own would never end.
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0, "scheduling_strategy": "SPREAD"}
        yield partial(_compute, ray, ray.remote(**options)(_work))
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class _Session:
    """What a worker needs to open the grid."""

    directory: str
    """Where the driver runs: paths of a configuration are relative to it."""
    mark: str
    """A file that the driver wrote into the output directory."""
    config: CompareConfig = field(compare=False)


@dataclass
class _Order:
    """A cell to compute, or what several cells share."""

    cell: Cell
    again: bool = False
    shared: bool = False
    deaths: int = 0

    @property
    def name(self) -> str:
        if not self.shared:
            return self.cell.name
        return f"what {self.cell.name} and others need ({shared_part(self.cell.config)})"


def _compute(ray: Any, task: Any, grid: Grid, cells: list[Cell], retry: bool = False) -> None:
    """Compute the missing cells. Raises ClusterError if workers see other files or keep dying."""
    with _marked(grid.output) as mark:
        session = ray.put(_Session(str(Path.cwd()), str(mark), grid.config))
        running: dict[Any, _Order] = {}

        def submit(order: _Order) -> None:
            running[task.remote(session, order.cell, order.again, order.shared)] = order

        waiting: dict[str, list[_Order]] = {}
        orders = [_Order(cell, again) for cell, again in grid.to_compute(cells, retry)]
        for order in orders:
            if shared_part(order.cell.config):
                waiting.setdefault(shared_key(order.cell.config), []).append(order)
        for first, *_ in waiting.values():
            submit(_Order(first.cell, shared=True))
        for order in orders:
            if not shared_part(order.cell.config):
                submit(order)

        started = time.perf_counter()
        done, lost, deaths, reason = 0, 0, 0, ""
        while running:
            (ended,), _ = ray.wait(list(running))
            order = running.pop(ended)
            try:
                machine = ray.get(ended)
            except ray.exceptions.RayTaskError as error:  # raised by our code there
                cause = error.cause
                said = str(cause) if isinstance(cause, HloraError) else first_line(cause)
                raise ClusterError(f"{order.name}: {said}") from None
            except ray.exceptions.RayError as error:  # the process or the machine is gone
                order.deaths, reason = order.deaths + 1, first_line(error)
                # A lost machine takes any number of workers with it at once, which predicts nothing.
                deaths += not isinstance(error, ray.exceptions.NodeDiedError)
                if deaths >= _DEATHS_IN_A_ROW:
                    lost += len(orders) - done - lost
                    break
                if order.deaths < _TRIES:
                    logger.warning("%s: the worker died (%s); trying again elsewhere", order.name, reason)
                    submit(order)
                else:
                    lost += len(waiting[shared_key(order.cell.config)]) if order.shared else 1
                continue
            deaths = 0
            if order.shared:
                for each in waiting[shared_key(order.cell.config)]:
                    submit(each)
                continue
            done += 1
            result = _written(grid, order.cell, machine)
            if result["status"] == "failed":
                logger.error("%s failed: %s", order.name, result["error"])
            logger.info("%s: computed on %s", order.name, machine)
            log_progress(done, len(orders), started)
    if lost:
        raise ClusterError(
            f"{lost} of {len(orders)} cells are not computed, since workers died again and again (the last: {reason}). "
            "Usual causes: memory that runs out, or machines that go. Give a cell more with --cpus-per-cell or "
            "--gpus-per-cell, so that fewer run at a time. Finished cells are kept; the same command "
            "resumes from them."
        )


def _written(grid: Grid, cell: Cell, machine: str) -> dict[str, Any]:
    """Read a cell that a worker has written, waiting for the file system: choosing strengths needs it."""
    until = time.monotonic() + _LATE
    while not (result := grid.read(cell)):
        if time.monotonic() > until:
            raise ClusterError(
                f"{cell.name}: machine {machine} has computed it, but this one does not see it in {grid.output}. "
                "Check that the directory exists and is the same on all machines; the same command then resumes."
            )
        with suppress(OSError):
            os.listdir(grid.output / "cells")  # noqa: PTH208  # as in _open
        time.sleep(1)
    return result


def _work(session: _Session, cell: Cell, again: bool, shared: bool) -> str:
    """In a worker: compute a cell, or what several cells share. Returns the machine's name."""
    grid = _open(session)
    mine = grid.cell(cell.arm, cell.task, cell.config.seed, cell.strength)
    if mine.key != cell.key:
        raise ClusterError(
            f"machine {socket.gethostname()} sees other data than the driver, or has other versions of hlora, torch, "
            "transformers, peft or trl. Install the same on all machines, and keep the data on a shared file system."
        )
    work = partial(_record, grid, mine) if shared else partial(grid.attempt, mine, again)
    while not work():
        time.sleep(2)  # a process outside this run holds it
    return socket.gethostname()


def _record(grid: Grid, cell: Cell) -> bool:
    """Make what several cells share; False while another process makes it."""
    try:
        shared_importance(grid.job(cell))
    except Busy:
        return False
    except Exception:  # each cell will raise and report it
        grid.base_is_spoilt = True
    return True


@lru_cache(maxsize=1)
def _open(session: _Session) -> Grid:
    """Open the grid, once in a worker process."""
    _open.cache_clear()  # frees the previous grid's model before loading this one's
    gc.collect()
    where, mark = socket.gethostname(), Path(session.mark)
    remedy = "Every machine needs the same files at the same paths: use a shared file system."
    try:
        os.chdir(session.directory)
    except OSError as error:
        raise ClusterError(f"machine {where}: {session.directory}, {error.strerror}. {remedy}") from None
    try:
        seen = mark.name in os.listdir(mark.parent)  # noqa: PTH208  # a listing makes a network file system refresh
    except OSError:
        seen = False
    if not seen:
        raise ClusterError(f"machine {where} does not see the driver's output directory, {mark.parent}. {remedy}")
    try:
        return Grid.open(session.config)
    except Exception as error:  # the driver could, so it is this machine that lacks something
        said = str(error) if isinstance(error, HloraError) else first_line(error)
        raise ClusterError(f"machine {where} cannot begin: {said} {remedy}") from None


@contextmanager
def _marked(output: Path) -> Iterator[Path]:
    """Put a file into the output directory, by which a worker recognises the directory as the driver's."""
    mark = output / f".driver-{secrets.token_hex(8)}"
    mark.touch()
    try:
        yield mark
    finally:
        with suppress(OSError):
            mark.unlink()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError(f"--engine ray: Ray is not installed. {how_to_install('ray')}") from None
    return ray
