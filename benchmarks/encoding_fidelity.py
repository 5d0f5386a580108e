"""What an encoding of importance loses, and what it costs: every encoding on one recording and one domain phase.

    python benchmarks/encoding_fidelity.py [--model smollm2-135m] [--record-steps 100] [--tune-steps 60]

A general phase on WikiText-2, then a QASC phase under the float32 penalty. Each encoding is given the same recorded
steps one by one, and its penalty is taken at each point of the domain phase. Errors are those against float32, of the
penalty's value and of its gradient (‖g − g₃₂‖/‖g₃₂‖ and the cosine between the two), mean and worst over the points.
Times are medians over steps that go through all encodings in turn, as ratios to float32.

Two kinds of rows are not in the library. "g×g patches" factors each patch of a grid by itself, between rank one and
dense; "uniform" has the mean importance everywhere, which is what no recording at all is worth.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import TrainerCallback

from hlora import Importance, ImportancePenalty, ImportanceRecorder, equations, ops
from hlora.config import parse_config
from hlora.encodings import ENCODINGS
from hlora.methods import _uniform
from hlora.models import attach_lora
from hlora.pipeline import Job
from hlora.trainer import train

XI = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--record-steps", type=int, default=100)
    parser.add_argument("--tune-steps", type=int, default=60)
    parser.add_argument("--patches", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--phi-scale", default="relative", choices=["relative", "paper"])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("runs/encoding-fidelity"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("hlora").setLevel(logging.WARNING)

    job = Job.open(parse_config(settings(options)))
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    recorder = ImportanceRecorder(model, "float32", flush_every=options.record_steps + 1)  # keeps every step
    arguments = job.config.training.of_record()
    train(model, job.tokenizer, job.general.dataset(), options.output / "logs", arguments, 0, [recorder.callback()])
    importances, recording = recorded(recorder, options.patches)

    penalties: dict[str, ImportancePenalty] = {
        name: ImportancePenalty(model, importance, 1.0, phi_scale=options.phi_scale)
        for name, importance in importances.items()
    }
    patched = {f"{g}×{g} patches": PatchedPenalty(recorder, g) for g in options.patches}
    watch = Watch(penalties, patched)
    arguments = job.config.training.of_tune()
    callbacks = [penalties["float32"].callback(), watch]
    train(model, job.tokenizer, job.domain.dataset(), options.output / "logs", arguments, 0, callbacks)
    sizes = {name: importance.nbytes() for name, importance in importances.items()}
    sizes |= {f"{g}×{g} patches": g * sizes["factored"] for g in options.patches}
    title = (
        f"{options.model}, {options.record_steps} + {options.tune_steps} steps, {options.phi_scale} φ, {model.device}"
    )
    Console(width=140).print(table(title, sizes, watch, recording))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The comparison's phases at the default strengths: a gentle general phase, then 8 questions a step."""
    rows, data = {"per_device_train_batch_size": 8}, options.data
    return {
        "output": str(options.output),
        "model": {"name": options.model},
        "general": {"paths": [f"{data}/wikitext2/valid.txt"]},
        "domain": {
            "task": "multiple_choice",
            "train": f"{data}/qasc/train.jsonl",
            "test": f"{data}/qasc/test.jsonl",
            "max_train_rows": 400,
        },
        "importance": {"xi": XI},
        "training": {
            "common": {"learning_rate": 8e-4, "lr_scheduler_type": "linear", "warmup_steps": 4, "report_to": []},
            "record": {"max_steps": options.record_steps, "max_length": 128, **rows},
            "tune": {"max_steps": options.tune_steps, "max_length": 256, **rows},
        },
    }


def recorded(recorder: ImportanceRecorder, grids: list[int]) -> tuple[dict[str, Importance], dict[str, list[float]]]:
    """Importance in every encoding from the steps that the recorder has kept, and the seconds of each step in each."""
    steps, counted = recorder._kept, recorder._counted
    recorders = {encoding: ImportanceRecorder(recorder.model, encoding) for encoding in ENCODINGS}
    seconds: dict[str, list[float]] = {name: [] for name in [*recorders, *(f"{g}×{g} patches" for g in grids)]}
    dense = {m.name: torch.zeros(m.B.shape[0], m.A.shape[1], device=m.A.device) for m in recorder.matrices}
    sums = {g: [Patches.zeros(m.B.shape[0], m.A.shape[1], g, m.A.device) for m in recorder.matrices] for g in grids}
    scales = [m.scale for m in recorder.matrices]
    for step, counts in zip(steps, counted, strict=True):
        for encoding, each in recorders.items():
            each._kept, each._counted, each._start = [step], [counts], recorder._start
            each._integrated += 1
            seconds[encoding].append(timed(each.flush))
        for g, mine in sums.items():
            seconds[f"{g}×{g} patches"].append(timed(partial(accumulate_patches_, mine, step, scales)))
        ops.accumulate_all_(list(dense.values()), [[one] for one in step], scales, counts[None])
    importances = {encoding: each.consolidate(XI) for encoding, each in recorders.items()}
    for g in grids:
        matrices = {}
        for matrix, patches in zip(recorder.matrices, sums[g], strict=True):
            delta = ops.difference(matrix.A, matrix.B, recorder._start[matrix.name], matrix.scale)
            expected = Patches.of(dense[matrix.name], g).dense()
            assert (patches.dense() - expected).norm() < 1e-3 * expected.norm()
            omega = patches.consolidated(delta).dense()
            was = importances["float32"].matrices[matrix.name]
            matrices[matrix.name] = replace(was, omega=omega, undo_cost=float(ops.penalty(omega, delta)))
        importances[f"{g}×{g} patches"] = replace(importances["float32"], matrices=matrices)
    importances["uniform"] = _uniform(importances["float32"])
    return importances, seconds


class Patches:
    """Row and column sums of each patch of a g × g grid; a patch stands for its row ⊗ column / total.

    row: (g, d_out), of each block of columns; column: (g, d_in), of each block of rows. Sizes are multiples of g.
    """

    def __init__(self, row: Tensor, column: Tensor) -> None:
        self.row, self.column = row, column

    @classmethod
    def zeros(cls, d_out: int, d_in: int, g: int, device: torch.device) -> Patches:
        return cls(torch.zeros(g, d_out, device=device), torch.zeros(g, d_in, device=device))

    @classmethod
    def of(cls, matrix: Tensor, g: int) -> Patches:
        return cls(matrix.unflatten(1, (g, -1)).sum(2).T, matrix.unflatten(0, (g, -1)).sum(1))

    def scaled(self) -> tuple[Tensor, Tensor]:  # u (g, g, rows of a patch), v (g, g, columns), by patch
        g = len(self.row)
        u = self.row.unflatten(1, (g, -1)).transpose(0, 1)
        v = self.column.unflatten(1, (g, -1))
        whole = (u.sum(2, keepdim=True) + v.sum(2, keepdim=True)) / 2
        return u, torch.where(whole == 0, 0.0, v / whole)

    def dense(self) -> Tensor:  # (d_out, d_in)
        return torch.einsum("IJh,IJw->IhJw", *self.scaled()).flatten(2).flatten(0, 1)

    def consolidated(self, delta: ops.Pair) -> Patches:
        """Eq. 13 as `ops.consolidate` has it for a factored matrix, patch by patch."""
        g = len(self.row)
        clamped = Patches(self.row.clamp(min=0), self.column.clamp(min=0))
        moved = Patches(*(sums[0] for sums in patch_sums(*(2 * [(delta[0][None], delta[1][None])]), g)))
        return Patches.of(equations.consolidate(clamped.dense(), moved.dense().sqrt(), XI), g)


def patch_sums(first: ops.Pair, second: ops.Pair, g: int) -> tuple[Tensor, Tensor]:  # (n, g, d_out), (n, g, d_in)
    """`ops.product_sums` of stacks over each block of columns, and of rows: g times its work on the long sides."""
    (P, Q), (U, V) = first, second
    inner = torch.einsum("nkJw,nmJw->nJkm", Q.unflatten(2, (g, -1)), V.unflatten(2, (g, -1)))
    row = ((P[:, None] @ inner) * U[:, None]).sum(3)
    inner = torch.einsum("nIhm,nIhk->nImk", U.unflatten(1, (g, -1)), P.unflatten(1, (g, -1)))
    column = ((inner @ Q[:, None]) * V[:, None]).sum(2)
    return row, column


def accumulate_patches_(patches: list[Patches], steps: list[ops.Step], scales: list[float]) -> None:
    """`ops.accumulate_all_` of one step for patches."""
    for alike in ops.alike_in([step.A for step in steps], [step.B for step in steps], scales):
        pairs = ops._pairs([steps[i] for i in alike], scales[alike[0]], torch.ones((), dtype=torch.bool))
        for i, row, column in zip(alike, *patch_sums(*pairs, len(patches[alike[0]].row)), strict=True):
            patches[i].row.sub_(row)
            patches[i].column.sub_(column)


class PatchedPenalty:
    """Value and both gradients of all matrices, patch by patch, for the time they take: the numbers are not used."""

    def __init__(self, recorder: ImportanceRecorder, g: int) -> None:
        self.matrices = recorder.matrices
        self.alike = ops.alike_in(*zip(*((m.A, m.B, m.scale) for m in self.matrices), strict=True))
        shapes = [(m.B.shape[0], m.A.shape[1]) for m in self.matrices]
        self.u = [torch.rand(g, g, d_out // g) for d_out, _ in shapes]
        self.v = [torch.rand(g, g, d_in // g) for _, d_in in shapes]
        self.anchors = [(m.A.detach().clone(), m.B.detach().clone()) for m in self.matrices]

    @torch.no_grad()
    def __call__(self) -> None:
        for alike in self.alike:
            A, B = (torch.stack([getattr(self.matrices[i], name) for i in alike]) for name in "AB")
            anchor = tuple(torch.stack([self.anchors[i][n] for i in alike]) for n in range(2))
            u, v = (torch.stack([each[i] for i in alike]) for each in (self.u, self.v))
            P, Q = ops.difference(A, B, anchor, self.matrices[alike[0]].scale)  # type: ignore[arg-type]
            g = u.shape[1]
            P, B = (factor.unflatten(1, (g, -1))[:, :, None] for factor in (P, B))  # (n, I, 1, h, k)
            Q, A = (factor.unflatten(2, (g, -1)).transpose(1, 2)[:, None] for factor in (Q, A))  # (n, 1, J, k, w)
            weighted, spread = u[..., None] * P, Q * v[..., None, :]  # (n, I, J, h, k), (n, I, J, k, w)
            ((P.mT @ weighted) * (spread @ Q.mT)).sum((1, 2, 3, 4))
            ((B.mT @ weighted) @ spread).sum(1)
            (weighted @ (spread @ A.mT)).sum(2)


class Watch(TrainerCallback):
    """At each point of the domain phase: value and gradient of every penalty, and the time of each."""

    def __init__(self, penalties: dict[str, ImportancePenalty], patched: dict[str, PatchedPenalty]) -> None:
        self.penalties, self.patched = penalties, patched
        names = list(penalties)
        self.values: dict[str, list[float]] = {name: [] for name in names}
        self.gradients: dict[str, list[float]] = {name: [] for name in names}
        self.cosines: dict[str, list[float]] = {name: [] for name in names}
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

    @torch.no_grad()
    def on_step_end(self, *_: Any, **__: Any) -> None:
        found = {}
        for name, penalty in self.penalties.items():
            self.seconds[name].append(timed(self.patched.get(name, penalty._evaluate)))
            value, gradients = penalty._evaluate()
            found[name] = float(value), torch.cat([gradient.flatten() for gradient in gradients]).double()
        value, gradient = found["float32"]
        if value == 0:  # the first step of a warm-up has no learning rate
            return
        for name, (other, others) in found.items():
            self.values[name].append(abs(other / value - 1))
            self.gradients[name].append(float((others - gradient).norm() / gradient.norm()))
            self.cosines[name].append(float(torch.dot(others, gradient) / others.norm() / gradient.norm()))


def table(title: str, sizes: dict[str, int], watch: Watch, recording: dict[str, list[float]]) -> Table:
    result = Table(title=title)
    heads = [
        "encoding",
        "MB",
        "% of float32",
        "value off %",
        "(worst)",
        "gradient off %",
        "(worst)",
        "least cosine",
    ]
    for head in [*heads, "recording ×", "penalty ×"]:
        result.add_column(head, justify="right", no_wrap=True)
    for name in watch.penalties:
        size = sizes[name]
        cells = [name, f"{size / 1e6:.3g}", f"{100 * size / sizes['float32']:.3g}"]
        for errors in (watch.values[name], watch.gradients[name]):
            cells += [f"{100 * statistics.fmean(errors):.3g}", f"({100 * max(errors):.3g})"]
        cells.append(f"{min(watch.cosines[name]):.5f}")
        for seconds in (recording, watch.seconds):
            known = name in seconds and name != "uniform"
            ratio = statistics.median(seconds[name]) / statistics.median(seconds["float32"]) if known else 0.0
            cells.append(f"{ratio:.2f}" if known else "")
        result.add_row(*cells)
    return result


def timed(call: Callable[[], Any]) -> float:
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    started = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
