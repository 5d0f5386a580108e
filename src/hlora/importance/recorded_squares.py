"""Squared gradients of each example, summed over the steps of the general phase.

A matrix keeps the row sums and column sums of Σ_b G_b², d_out + d_in numbers. G_b is the gradient of example b's loss,
summed over its tokens. The gradients come from the backward pass that trains the adapter, so there is no second one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hlora.importance.examples import Batch, batches
from hlora.model.adapters import AdaptedMatrix
from hlora.model.layer_gradients import Use, by_row, layer_gradients
from hlora.numerics import encodings, ops, squares
from hlora.numerics.encodings import Encoded, Factored
from hlora.numerics.precision import widened
from hlora.numerics.types import Consolidated, Factors
from hlora.parallel.dtensor import local_tensor
from hlora.parallel.group import rank, world_size
from hlora.system.errors import AdapterError

_TIME_SHARE = 0.01  # of a training step
_SLOWER = 9  # time of a product of the sketch over one of the step: SmolLM2-135M, 8×128 tokens, one core


def affordable_share(model: nn.Module, matrices: Sequence[AdaptedMatrix]) -> float:
    """Share of each batch's examples that can be recorded in about 1 % of a training step.

    For q_proj and v_proj it is 0.3 of SmolLM2-135M's, and all of LLaMA-3.2-3B's.
    """
    sketch = squares.SKETCH * sum(m.B.shape[0] + m.A.shape[1] for m in matrices)
    step = sum(parameter.numel() for parameter in model.parameters())
    return min(1.0, _TIME_SHARE * step / (_SLOWER * sketch))


class RecordedSquares:
    """Sums of squared gradients of every matrix, in one flat tensor: [rows, columns] of each in turn.

    Each backward pass records a random share of its examples, so that recording is cheap for a small model too.

    Args:
        model: The model whose forward and backward passes are watched.
        matrices: The matrices to record.
        seed: Seed of the random signs and of the choice of examples.
        share: Share of each batch's examples to record; by default `affordable_share`.

    In several processes each sums its own examples, for all matrices. `gathered` and `consolidated` add up the sums of
    all processes; every process must call them.
    """

    def __init__(
        self, model: nn.Module, matrices: Sequence[AdaptedMatrix], seed: int, *, share: float | None = None
    ) -> None:
        self.model = model
        self.matrices = list(matrices)
        self.seed = seed
        self.share = affordable_share(model, matrices) if share is None else share
        self.steps = 0  # optimizer steps; each draws its own random signs
        self.listening = ExitStack()
        self._sizes = [size for m in self.matrices for size in (m.B.shape[0], m.A.shape[1])]
        self._places = {m.name: 2 * number for number, m in enumerate(self.matrices)}
        self._batch: Batch | None = None
        self._signs: list[Tensor] = []
        self._passes = 0  # backward passes of the current step
        self._input: tuple[Batch, Tensor, Tensor] | None = None  # the last layer's x, and its sketch
        self._gradient_norm: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything recorded."""
        wide, device = torch.float32, self.matrices[0].A.device
        for matrix in self.matrices:
            wide = torch.promote_types(wide, matrix.A.dtype)
        self.total = torch.zeros(sum(self._sizes), dtype=wide, device=device)
        self._coming = torch.zeros_like(self.total)  # of the current step
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # tokens predicted, examples
        self._coming_counts = torch.zeros_like(self.counts)
        self.as_called = False  # whether a loss was not the model's own, so that its unit is unknown
        self.steps = 0
        self.discard()

    def listen(self) -> None:
        """Watch the model's backward passes until `listening.close()`."""
        own = set(map(id, self.matrices))

        def adding(matrix: AdaptedMatrix) -> Use | None:
            # A copy of the model has copies of the hooks.
            return partial(self._add, self._batch, matrix) if id(matrix) in own else None

        self.listening.close()
        self.listening.enter_context(batches(self.model, lambda batch: self._begin(batch)))
        self.listening.enter_context(layer_gradients(self.matrices, adding))

    def follow(self, started: bool) -> None:
        """Move to the model's device. `started` is not used."""
        device = self.matrices[0].A.device
        if self.total.device != device:
            self.total, self._coming = self.total.to(device), self._coming.to(device)
            self.counts, self._coming_counts = self.counts.to(device), self._coming_counts.to(device)
            self._signs = []

    def _begin(self, batch: Batch) -> None:
        self.follow(True)
        alone = world_size() == 1  # FSDP2 keeps gradients that are not synchronised yet elsewhere
        if alone and self._passes > 0 and all(f.grad is None for m in self.matrices for f in m.parameters):
            self.discard()  # the gradients were dropped without a step, such as those that are not finite
        self._batch, self._input = batch, None

    def _add(self, batch: Batch | None, matrix: AdaptedMatrix, x: Tensor, gradient: Tensor) -> None:
        """Add the recorded examples of one batch to the step's sums of one matrix."""
        if batch is None:
            raise AdapterError(
                "the recorder saw the backward pass of a part or a copy of its model, without a forward pass of the "
                "whole. Call the model that the recorder was made with, not a part of it. torch.nn.DataParallel makes "
                "copies: use DistributedDataParallel, or one GPU."
            )
        rows: int | str = "rows"
        if batch.shape is not None:
            rows = batch.shape[0]
            x, gradient = by_row(x, *batch.shape), by_row(gradient, *batch.shape)
        if x.dim() != 3 or rows not in ("rows", x.shape[0]) or matrix.name in batch.seen:
            what = "a second one" if matrix.name in batch.seen else tuple(x.shape)
            raise AdapterError(
                f"{matrix.name}: expected one input of shape ({rows}, tokens, d_in) and one backward pass a forward "
                f"pass, got {what}, so the gradients of the examples cannot be told apart. Leave it out of "
                "lora.target_modules, or record by method path_integral."
            )
        batch.seen.add(matrix.name)
        if batch.taken is None:
            self._passes += 1
            draw = random.Random(repr((self.seed, self.steps, rank(), self._passes)))
            batch.take(x.shape[0], self.share, (draw.random(), draw.random()))
        shared = x
        x, gradient = (batch.of_examples(each).to(self.total.dtype) for each in (x, gradient))
        if len(batch.seen) == 1:
            self._count(batch, x)
        place = self._places[matrix.name]
        if squares.is_exact_cheaper(x.shape[1]):
            sums = squares.exact_sums(x, gradient)
        else:
            gradient_seen = squares.seen_through(gradient, self._signs_of(place).to(x))
            x_seen = self._sketched_input(batch, shared, x, place + 1)
            sums = squares.sketched_sums(x, gradient, x_seen=x_seen, gradient_seen=gradient_seen)
        for part, mine in zip(self._split(self._coming)[place : place + 2], sums, strict=True):
            if batch.token_weight is not None:
                weight = batch.token_weight.to(mine.device)
                mine = torch.where(weight == 0, 0, mine / weight**2)  # a loss times 0 says nothing
            part.add_(mine.to(part.device))

    def _sketched_input(self, batch: Batch, shared: Tensor, x: Tensor, part: int) -> Tensor:
        """The sketch of x, computed once for layers with the same input, such as q_proj and v_proj."""
        if self._input is not None:
            last_batch, last, seen = self._input
            if last_batch is batch and last.data_ptr() == shared.data_ptr() and last.shape == shared.shape:
                return seen
        seen = squares.seen_through(x, self._signs_of(part).to(x))
        self._input = batch, shared, seen
        return seen

    def _count(self, batch: Batch, x: Tensor) -> None:
        """Count the batch's tokens and examples, at its first gradient."""
        predicted, device = batch.predicted_taken(), self.counts.device
        tokens = x.shape[0] * x.shape[1] if predicted is None else predicted.to(device)
        counts: Tensor | int = 1
        if batch.token_weight is None:
            self.as_called = True
        else:
            counts = batch.token_weight.to(device) != 0
        self._coming_counts[0] += tokens * counts
        self._coming_counts[1] += x.shape[0] * counts

    def _signs_of(self, part: int) -> Tensor:
        """Random signs (k, d) of the current step, for the rows or columns of one matrix."""
        if not self._signs:
            drawn = squares.random_signs(sum(self._sizes), self.seed, self.steps, rank())
            self._signs = list(drawn.to(self.total.device).split(self._sizes, 1))
        return self._signs[part]

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat.split(self._sizes)

    @property
    def captured(self) -> bool:
        """Whether `capture` has seen a step that is not integrated yet."""
        return self._gradient_norm is not None

    def capture(self, lr: float | Mapping[int, float], gradient_scale: float | Tensor) -> None:
        """Take the norm of the adapter's gradients before the optimizer's step, which counts only if it is finite.

        Raises:
            AdapterError: No backward pass went through the adapted layers since the step before.
        """
        if self._passes == 0:
            raise AdapterError(
                "squared gradients are read from the layers' backward pass, and none went through them since the last "
                "step. Fused kernels go round the layers. Switch them off (Axolotl: lora_qkv_kernel: false), or record "
                "by method path_integral. In a loop of your own, make the recorder before the backward pass."
            )
        gradients = [f.grad for m in self.matrices for f in m.parameters if f.grad is not None]
        self._gradient_norm = torch.zeros((), device=self.total.device)
        if gradients:
            self._gradient_norm = torch.nn.utils.get_total_norm([widened(local_tensor(each)) for each in gradients])

    def discard(self) -> None:
        """Drop the examples of the current step, since the optimizer did not step."""
        self._gradient_norm = self._input = None
        self._passes = 0
        self._coming.zero_()
        self._coming_counts.zero_()

    def integrate(self) -> Tensor:  # bool, a scalar
        """Add the step's sums to the total if these and the adapter's gradients are finite in every process."""
        assert self._gradient_norm is not None
        finite = torch.isfinite(self._gradient_norm).to(self.total.device) & self._coming.isfinite().all()
        if world_size() > 1:  # a step counts in every process or in none
            flag = finite.to(torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MIN)
            finite = flag > 0
        self.total += self._coming.masked_fill_(~finite, 0.0)
        self.counts += self._coming_counts * finite
        self.discard()
        self.steps += 1
        self._signs = []
        return finite

    @property
    def omega(self) -> dict[str, Encoded]:
        """Σ_b G_b² so far by matrix name; in several processes, of this one's examples."""
        parts = self._split(self.total)
        return {m.name: Factored(*parts[2 * i : 2 * i + 2]) for i, m in enumerate(self.matrices)}

    def _add_up_processes(self) -> None:
        """Replace this process's sums by those of all processes."""
        if world_size() > 1:
            dist.all_reduce(self.total)
            dist.all_reduce(self.counts)

    def gathered(self) -> dict[str, Encoded]:
        """Sums of all processes in the main one, which keeps them; zeros in another, whose sums they now contain.

        A run that continues from here then adds up in the same order as a resumed one.
        """
        self._add_up_processes()
        if rank() > 0:
            self.total.zero_()
            self.counts.zero_()
        return self.omega

    def consolidated(
        self, As: list[Tensor], Bs: list[Tensor], starts: Mapping[str, Factors], *, xi: float
    ) -> dict[str, Consolidated]:
        """Σ_b G_b² divided by the number of predicted tokens, by matrix name; the same in every process.

        It is a curvature already, so it is not divided by the movement.

        Args:
            As: A of each matrix, (r, d_in).
            Bs: B of each matrix, (d_out, r).
            starts: Factors at the start of the phase, by matrix name.
            xi: Not used.
        """
        self._add_up_processes()
        parts = self._split(self.total / self.counts[0].clamp(min=1))
        found = {}
        for matrix, A, B in zip(self.matrices, As, Bs, strict=True):
            row, column = parts[self._places[matrix.name] :][:2]
            importance = Factored(row.clone().to(A.device), column.clone().to(A.device))
            delta = ops.difference(A, B, starts[matrix.name], scale=matrix.scale)
            undo_cost, norm = float(ops.penalty(importance, delta)), float(encodings.norm(importance))
            found[matrix.name] = Consolidated(importance, 0.0, undo_cost, norm)
        return found

    def facts(self) -> dict[str, Any]:
        """What checkpoint and importance record besides the number of steps."""
        tokens, examples = self.counts.tolist()
        return {"tokens": tokens, "examples": examples, "unit": "loss as called" if self.as_called else "token"}

    def resume(self, steps: int, facts: Mapping[str, Any]) -> None:
        """Restore what a checkpoint holds besides the sums. They continue in the main process, others start at 0."""
        self.steps, self._signs = steps, []
        self.as_called = facts["unit"] != "token"
        self.counts.copy_(torch.tensor([facts["tokens"], facts["examples"]]))
        if rank() > 0:
            self.total.zero_()
            self.counts.zero_()
