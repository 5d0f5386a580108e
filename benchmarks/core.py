"""Recording and penalty as written in the paper, dense and factored, as multiples of the time of copying ω. Markdown.

    python benchmarks/core.py [--geometry smollm2-135m…] [--rounds 9] [--rank 8]

One optimizer step's work for every adapted matrix of a model, on random factors, without the model: no weight is read.
In each round every version runs once, in random order, and so does a copy of the dense float32 ω. A multiple is that of
two times of one round; the table has the median over rounds and the quartiles. Dense is streamed on a CPU and compiled
on an accelerator (hlora.numerics.ops).

A second table has what one optimizer step records of one layer, beside that layer's own products: W x and Wᵀ g of every
token, which are a forward and a backward pass with W frozen.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hlora.numerics import encodings, equations, ops, squares
from hlora.numerics.types import Factors, Step

SCALE, LR = 4.0, 1e-3
GEOMETRIES: dict[str, list[tuple[int, int, int]]] = {  # d_out, d_in, how many
    "one 3072×3072": [(3072, 3072, 1)],
    "SmolLM2-135M, q and v": [(576, 576, 30), (192, 576, 30)],
    "LLaMA-3.2-3B, q and v": [(3072, 3072, 28), (1024, 3072, 28)],
}
VERSIONS = ("as written", "dense", "factored")
LAYERS = [(576, 576), (192, 576), (3072, 3072), (1024, 3072)]  # d_out, d_in: q and v of SmolLM2-135M, LLaMA-3.2-3B
BATCHES = [(8, 128), (4, 512)]  # rows, tokens


class Matrix(NamedTuple):
    step: Step
    anchor: Factors
    dense: Tensor  # ω, and Ω
    factored: encodings.Encoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, rank {options.rank}\n")
    print(f"| matrices | operation | copy of ω, ms | {' | '.join(VERSIONS)} |")
    print("|---|---|---|" + "---|" * len(VERSIONS))
    for geometry in options.geometry:
        shapes = [(d_out, d_in) for d_out, d_in, count in GEOMETRIES[geometry] for _ in range(count)]
        matrices = [drawn(*shape, options.rank, device) for shape in shapes]
        room = [torch.empty_like(matrix.dense) for matrix in matrices]
        for operation, runs in (("recording", recording(matrices)), ("penalty", penalising(matrices))):
            times = measured({"copy": partial(copy, room, matrices), **runs}, options.rounds)
            cells = [multiple(times[version], times["copy"]) for version in VERSIONS]
            copied = f"{1e3 * statistics.median(times['copy']):.3g}"
            print(f"| {geometry} | {operation} | {copied} | {' | '.join(cells)} |", flush=True)
    headings = ("layer", "batch", "its products, ms", "path integral, %", "squares, sketch, %", "squares, Gram, %")
    print(f"\n| {' | '.join(headings)} |")
    print("|---|---|---|---|---|---|")
    for shape in LAYERS:
        for rows, tokens in BATCHES:
            times = measured(beside_a_layer(*shape, rows, tokens, options.rank, device), options.rounds)
            products = times.pop("products")
            cells = [multiple([100 * each for each in own], products) for own in times.values()]
            size, batch = f"{shape[0]}×{shape[1]}", f"{rows}×{tokens}"
            print(f"| {size} | {batch} | {1e3 * statistics.median(products):.3g} | {' | '.join(cells)} |", flush=True)


Run = Callable[[], object]


def copy(room: list[Tensor], matrices: list[Matrix]) -> None:
    for target, matrix in zip(room, matrices, strict=True):
        target.copy_(matrix.dense)


def recording(matrices: list[Matrix]) -> dict[str, Run]:
    """ω −= g̃ ⊙ Δθ (Eqs. 7–12)."""

    def as_written() -> None:
        for omega, step in zip(dense, steps, strict=True):
            gradient = equations.effective_gradient(step.A, step.B, step.grad_A, step.grad_B, lr=step.lr, scale=SCALE)
            delta = equations.movement(step.A, step.B, step.A_next, step.B_next, scale=SCALE)
            omega.copy_(equations.path_integral(omega, gradient, delta))

    steps, dense = [matrix.step for matrix in matrices], [matrix.dense for matrix in matrices]
    scales, counted = [SCALE] * len(steps), torch.ones((), dtype=torch.bool, device=dense[0].device)
    factored = [matrix.factored for matrix in matrices]
    return {
        "as written": as_written,
        "dense": partial(ops.accumulate_all_, dense, steps, scales, counted=counted),
        "factored": partial(ops.accumulate_all_, factored, steps, scales, counted=counted),
    }


def penalising(matrices: list[Matrix]) -> dict[str, Run]:
    """Σ Ω D² and both gradients (Eq. 14)."""

    def as_written() -> None:
        for matrix, A, B in zip(matrices, As, Bs, strict=True):
            factors = A.requires_grad_(), B.requires_grad_()
            theta, theta_nu = SCALE * (B @ A), SCALE * (matrix.anchor[1] @ matrix.anchor[0])
            torch.autograd.grad(equations.layer_penalty(matrix.dense, theta, theta_nu), factors)

    As, Bs = ([getattr(matrix.step, factor).clone() for matrix in matrices] for factor in "AB")
    anchors, scales = [matrix.anchor for matrix in matrices], [SCALE] * len(matrices)
    dense, factored = [matrix.dense for matrix in matrices], [matrix.factored for matrix in matrices]
    return {
        "as written": as_written,
        "dense": partial(ops.penalties_with_gradients, dense, As, Bs, anchors=anchors, scales=scales),
        "factored": partial(ops.penalties_with_gradients, factored, As, Bs, anchors=anchors, scales=scales),
    }


def beside_a_layer(d_out: int, d_in: int, rows: int, tokens: int, rank: int, device: torch.device) -> dict[str, Run]:
    """A layer's own products, the path integral of a step, and the sums of squared gradients in two forms."""

    def products() -> None:
        torch.matmul(x, weight.T)
        torch.matmul(gradient, weight)

    def sketch() -> None:
        signs_in, signs_out = squares.random_signs(d_in + d_out, 0).to(device).split([d_in, d_out], 1)
        seen = squares.seen_through(x, signs_in), squares.seen_through(gradient, signs_out)
        squares.sketched_sums(x, gradient, x_seen=seen[0], gradient_seen=seen[1])

    matrix = drawn(d_out, d_in, rank, device)
    weight, counted = matrix.dense, torch.ones((), dtype=torch.bool, device=device)
    x = torch.randn(rows, tokens, d_in, device=device)
    gradient = torch.randn(rows, tokens, d_out, device=device)
    return {
        "products": products,
        "path integral": partial(ops.accumulate_all_, [matrix.factored], [matrix.step], [SCALE], counted=counted),
        "sketch": sketch,
        "exact": partial(squares.exact_sums, x, gradient),
    }


def measured(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by version."""
    draw = random.Random(0)
    for run in runs.values():  # warm-up
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in draw.sample(list(runs), len(runs)):
            times[name].append(seconds(runs[name]))
    return times


def multiple(times: list[float], of: list[float]) -> str:
    ratios = [a / b for a, b in zip(times, of, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return f"{median:.2g} ({low:.2g}–{high:.2g})"


def drawn(d_out: int, d_in: int, rank: int, device: torch.device) -> Matrix:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, size: float) -> Tensor:
        return size * torch.randn(*shape, device=device, generator=generator)

    A, B = normal(rank, d_in, size=0.05), normal(d_out, rank, size=0.01)
    grad_A, grad_B = normal(rank, d_in, size=1e-3), normal(d_out, rank, size=1e-3)
    step = Step(A, B, grad_A, grad_B, LR, A - LR * grad_A, B - LR * grad_B)
    anchor = normal(rank, d_in, size=0.05), normal(d_out, rank, size=0.01)
    dense = torch.rand(d_out, d_in, device=device, generator=generator)
    return Matrix(step, anchor, dense, encodings.Factored(dense.sum(1), dense.sum(0)))


def seconds(run: Run) -> float:
    synchronise()
    started = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
