"""Recording and penalty: as written in the paper (dense, autograd), streamed, factored; and how they grow.

    python benchmarks/core.py [--geometry smollm2-135m llama-3.2-3b llama-3.1-8b] [--rounds 7] [--growth]

One optimizer step's work for every adapted matrix of a model, on random factors, without the model: no weight is read.
Matrices of one shape are timed together, as a step takes them; where all would
not fit into 8 GB one is, and its time multiplied by their number. In each round every version runs once, in
random order; a ratio is that of two times in one round. Bytes moved are those that no version can do without, ω or Ω
once in and, when recording, once out; their share is of the bandwidth of copying 512 MB.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hlora.numerics import encodings, equations, ops, types

RANK, SCALE, LR, XI = 8, 4.0, 1e-3, 1e-3
Shape = tuple[int, int, int]  # d_out, d_in, how many

GEOMETRIES: dict[str, list[Shape]] = {
    "one 3072×3072": [(3072, 3072, 1)],
    "smollm2-135m q+v": [(576, 576, 30), (192, 576, 30)],
    "llama-3.2-3b q+v": [(3072, 3072, 28), (1024, 3072, 28)],
    "llama-3.1-8b all-linear": [(4096, 4096, 64), (1024, 4096, 64), (14336, 4096, 64), (4096, 14336, 32)],
}


class Matrix(NamedTuple):
    step: types.Step
    anchor: tuple[Tensor, Tensor]
    importance: Tensor  # float32, dense


Run = Callable[[], object]
Timed = tuple[str, Run, int]  # name, one optimizer step's work on one matrix of a shape, bytes that it has to move


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", default=["one 3072×3072", *list(GEOMETRIES)[1:3]], choices=GEOMETRIES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--growth", action="store_true", help="how the times grow with width, rank, layers and steps")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, rank {options.rank}")
    if options.growth:
        growth(device, options.rounds)
        return
    for geometry in options.geometry:
        for work in (recording, penalising):
            show(f"{geometry}: {work.__name__}", measure(GEOMETRIES[geometry], work, device, options))


def recording(matrices: list[Matrix]) -> Iterator[Timed]:
    """ω −= g̃ ⊙ Δθ (Eqs. 7–12)."""
    steps, scales, device = [matrix.step for matrix in matrices], [SCALE] * len(matrices), matrices[0].step.A.device
    dense = [matrix.importance.clone() for matrix in matrices]

    def as_written() -> None:
        for omega, step in zip(dense, steps, strict=True):
            gradient = equations.effective_gradient(step.A, step.B, step.grad_A, step.grad_B, step.lr, SCALE)
            delta = equations.movement(step.A, step.B, step.A_next, step.B_next, SCALE)
            omega.copy_(equations.path_integral(omega, gradient, delta))

    counted = torch.ones((), dtype=torch.bool, device=device)
    yield "as written", as_written, 2 * sum(map(encodings.nbytes, dense))
    for name in ("float32", "factored"):
        omegas = [encodings.zeros(name, *omega.shape, device) for omega in dense]
        run: Run = partial(ops.accumulate_all_, omegas, steps, scales, counted)
        yield name, run, 2 * sum(map(encodings.nbytes, omegas))


def penalising(matrices: list[Matrix]) -> Iterator[Timed]:
    """Σ Ω D² and both gradients (Eq. 14)."""
    As, Bs = ([getattr(matrix.step, factor).clone() for matrix in matrices] for factor in "AB")
    anchors, scales = [matrix.anchor for matrix in matrices], [SCALE] * len(matrices)

    def as_written() -> None:
        for matrix, A, B in zip(matrices, As, Bs, strict=True):
            factors = A.requires_grad_(), B.requires_grad_()
            theta, theta_nu = SCALE * (B @ A), SCALE * (matrix.anchor[1] @ matrix.anchor[0])
            torch.autograd.grad(equations.layer_penalty(matrix.importance, theta, theta_nu), factors)

    yield "as written", as_written, sum(encodings.nbytes(matrix.importance) for matrix in matrices)
    for name in ("float32", "factored"):
        omegas = [encodings.encode(matrix.importance, name) for matrix in matrices]
        run: Run = partial(ops.penalties_with_gradients, omegas, As, Bs, anchors, scales)
        yield name, run, sum(map(encodings.nbytes, omegas))


def measure(
    shapes: list[Shape],
    work: Callable[[list[Matrix]], Iterator[Timed]],
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, tuple[list[float], int]]:
    """Seconds of each round and bytes moved, by version, for all matrices of a geometry."""
    found: dict[str, tuple[list[float], int]] = {}
    draw = random.Random(0)
    for d_out, d_in, count in shapes:
        alike = count if 6 * 4 * d_out * d_in * count < 8e9 else 1  # six float32 matrices each, at the most
        versions = list(work([drawn(d_out, d_in, options.rank, device) for _ in range(alike)]))
        for _, run, _ in versions:  # warm-up
            run()
        times: dict[str, list[float]] = {name: [] for name, _, _ in versions}
        for _ in range(options.rounds):
            for name, run, _ in draw.sample(versions, len(versions)):
                times[name].append(seconds(run))
        for name, _, moved in versions:
            before, bytes_before = found.get(name, ([0.0] * options.rounds, 0))
            found[name] = (
                [a + count // alike * b for a, b in zip(before, times[name], strict=True)],
                bytes_before + count // alike * moved,
            )
    return found


def show(title: str, found: dict[str, tuple[list[float], int]]) -> None:
    table = Table(title=title)
    for heading in (
        "version",
        "median ms",
        "times faster than as written",
        "from–to",
        "MB moved",
        "share of copying %",
    ):
        table.add_column(heading, justify="right")
    slow, bandwidth = found["as written"][0], copying(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for name, (times, moved) in found.items():
        ratios = [a / b for a, b in zip(slow, times, strict=True)]
        median = statistics.median(times)
        table.add_row(
            name,
            f"{1e3 * median:.3g}",
            f"{statistics.median(ratios):.1f}",
            f"{min(ratios):.1f}–{max(ratios):.1f}",
            f"{moved / 1e6:.4g}",
            f"{100 * moved / median / bandwidth:.0f}" if moved > 1e6 else "",
        )
    Console(width=110).print(table)


def growth(device: torch.device, rounds: int) -> None:
    """Time against width and rank, where one of them doubles; against layers and steps."""
    table = Table(title="growth: median ms of one matrix")
    for heading in ("d", "r", "recording float32", "recording factored", "penalty float32", "penalty factored"):
        table.add_column(heading, justify="right")
    for d, rank in [*((d, RANK) for d in (512, 1024, 2048, 4096, 8192)), *((2048, r) for r in (1, 2, 4, 16, 32, 64))]:
        matrix = drawn(d, d, rank, device)
        row = [str(d), str(rank)]
        for work in (recording, penalising):
            runs = {name: run for name, run, _ in work([matrix])}
            for name in ("float32", "factored"):
                runs[name]()
                row.append(f"{1e3 * statistics.median(seconds(runs[name]) for _ in range(rounds)):.3g}")
        table.add_row(*row)
    Console(width=110).print(table)
    in_layers(device, rounds)
    in_steps(device, rounds)


def in_layers(device: torch.device, rounds: int) -> None:
    """Time of as many q_proj of SmolLM2 as a deeper model has."""
    table = Table(title="growth with layers: median ms of L matrices of 576×576, r 8")
    for heading in ("L", "recording float32", "recording factored", "penalty float32", "penalty factored"):
        table.add_column(heading, justify="right")
    for layers in (1, 8, 32, 128):
        matrices, row = [drawn(576, 576, RANK, device) for _ in range(layers)], [str(layers)]
        for work in (recording, penalising):
            runs = {name: run for name, run, _ in work(matrices)}
            for name in ("float32", "factored"):
                runs[name]()
                row.append(f"{1e3 * statistics.median(seconds(runs[name]) for _ in range(rounds)):.3g}")
        table.add_row(*row)
    Console(width=110).print(table)


def in_steps(device: torch.device, rounds: int) -> None:
    """Bytes and milliseconds a step after many steps: neither grows, since ω is a sum."""
    table = Table(title="growth with steps: recording one 1024×1024, r 8")
    for heading in ("steps so far", "ms a step, float32", "bytes", "ms a step, factored", "bytes"):
        table.add_column(heading, justify="right")
    matrix, counted = drawn(1024, 1024, RANK, device), torch.ones((), dtype=torch.bool, device=device)
    omegas = [encodings.zeros(name, 1024, 1024, device) for name in ("float32", "factored")]
    done = 0
    for steps in (10, 100, 1000):
        row = [str(steps)]
        for omega in omegas:
            runs = [
                seconds(lambda omega=omega: ops.accumulate_all_([omega], [matrix.step], [SCALE], counted))
                for _ in range(steps - done)
            ]
            row += [f"{1e3 * statistics.median(runs[-10 * rounds :]):.3g}", f"{encodings.nbytes(omega):,}"]
        done = steps
        table.add_row(*row)
    Console(width=110).print(table)


def drawn(d_out: int, d_in: int, rank: int, device: torch.device) -> Matrix:
    generator = torch.Generator(device).manual_seed(0)

    def random_(*shape: int, size: float) -> Tensor:
        return size * torch.randn(*shape, device=device, generator=generator)

    A, B = random_(rank, d_in, size=0.05), random_(d_out, rank, size=0.01)
    grad_A, grad_B = random_(rank, d_in, size=1e-3), random_(d_out, rank, size=1e-3)
    step = types.Step(A, B, grad_A, grad_B, LR, A - LR * grad_A, B - LR * grad_B)
    anchor = (random_(rank, d_in, size=0.05), random_(d_out, rank, size=0.01))
    return Matrix(step, anchor, torch.rand(d_out, d_in, device=device, generator=generator))


def seconds(run: Run) -> float:
    synchronise()
    started = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - started


def copying(device: torch.device, size: int = 512_000_000) -> float:
    """Bytes a second of copying a tensor, both its reading and its writing counted."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(7))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
