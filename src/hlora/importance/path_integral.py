"""The path integral ω of a training, element by element (Eqs. 7–12): the paper's importance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hlora.importance.capture import Snapshot, copies_of, gradient_copies, on_device
from hlora.importance.shares import Shares
from hlora.model.adapters import AdaptedMatrix
from hlora.numerics import encodings, ops
from hlora.numerics.encodings import Encoded
from hlora.numerics.precision import widened
from hlora.numerics.types import Consolidated, Factors, Step
from hlora.parallel.group import all_gather_text, world_size


class PathIntegral:
    """ω of each matrix: gradient times movement, summed over optimizer steps.

    Args:
        matrices: The matrices to record.
        encoding: Of ω: "factored" or "float32".

    In several processes each integrates the matrices of its share (shares.py).
    """

    def __init__(self, matrices: Sequence[AdaptedMatrix], encoding: str) -> None:
        self.matrices = list(matrices)
        self.encoding = encoding
        self._shares = Shares(self.matrices)
        self._device = self.matrices[0].A.device
        self._captured: Snapshot | None = None
        self._remote_norm: list[Tensor] = []  # at capture: norm of the gradients that other processes integrate
        self.reset()

    def reset(self) -> None:
        """Forget everything recorded."""
        self._omega: dict[str, Encoded] = {}  # allocated on first use: never beside a consolidated one
        self.discard()

    def follow(self, started: bool) -> None:
        """Move to the model's device, and share the work if a process group was joined before the first step.

        Args:
            started: Whether a step was recorded. The shares then stay as they are.
        """
        if not started and self._shares.processes == 1 != world_size():
            self._shares, self._omega = Shares(self.matrices), {}
        if self._device == self.matrices[0].A.device:
            return
        self._device = self.matrices[0].A.device
        for matrix in self.matrices:
            if matrix.name in self._omega:
                self._omega[matrix.name] = encodings.to_device(self._omega[matrix.name], matrix.A.device)

    @property
    def captured(self) -> bool:
        """Whether `capture` has copied a step that is not integrated yet."""
        return self._captured is not None

    def capture(self, lr: float | Mapping[int, float], gradient_scale: float | Tensor) -> None:
        """Copy factors and gradients before the optimizer's step (see ImportanceRecorder.capture)."""
        pieces, here = self._shares.pieces, self._here()
        As, Bs = [m.A for m in here], [m.B for m in here]
        of_As, of_Bs = zip(*(m.gradients() for m in here), strict=True) if here else ((), ())
        gradients = gradient_copies(As, of_As, pieces), gradient_copies(Bs, of_Bs, pieces)
        self._remote_norm = self._remote_gradient_norm()
        if isinstance(gradient_scale, Tensor) or gradient_scale != 1:
            for gradient in (*gradients[0], *gradients[1], *self._remote_norm):
                gradient.mul_(on_device(gradient.device, gradient_scale))
        if isinstance(lr, Mapping):
            ids = [tuple(map(id, matrix.parameters)) for matrix in here]
            rates = [(lr.get(A, 0.0) * lr.get(B, 0.0)) ** 0.5 for A, B in ids]
        else:
            rates = [lr] * len(As)
        self._captured = (copies_of(pieces(As)), copies_of(pieces(Bs)), *gradients, rates)

    def _here(self) -> list[AdaptedMatrix]:
        """Matrices that this process copies at capture: its share, or its piece of every one if they are sharded."""
        return self.matrices if self._shares.sharded else self._shares.mine

    def _remote_gradient_norm(self) -> list[Tensor]:
        """Norm of the gradients that other processes integrate, or nothing.

        A step counts in every process or in none, so each checks all gradients before the optimizer does.
        """
        held = set(map(id, self._here()))
        elsewhere = [m for m in self.matrices if id(m) not in held]
        gradients = [gradient for m in elsewhere for gradient in m.gradients() if gradient is not None]
        return [torch.nn.utils.get_total_norm(list(map(widened, gradients)))] if gradients else []

    def discard(self) -> None:
        """Drop the copies of `capture`, since the optimizer did not step."""
        self._captured = None

    def integrate(self) -> Tensor:  # bool, a scalar
        """Add the step since `capture` if all of it is finite; returns whether it is. Source: ω −= g̃ ⊙ Δθ, Eq. 12."""
        assert self._captured is not None
        captured = self._captured
        self.discard()
        here = self._here()
        As, Bs = (self._shares.pieces([getattr(m, which).detach() for m in here]) for which in "AB")
        elsewhere = [f.detach() for m in self.matrices if len(here) < len(self.matrices) for f in (m.A, m.B)]
        factors = [widened(factor) for factor in (*As, *Bs, *elsewhere)]  # the norm of a float16 factor overflows
        seen = [*factors, *captured[2], *captured[3], *self._remote_norm]
        finite = torch.isfinite(torch.nn.utils.get_total_norm(seen))
        steps = [Step(*step) for step in zip(*captured, As, Bs, strict=True)]
        if self._shares.sharded:
            steps, finite = self._at_owners(steps, finite)
        scales = [matrix.scale for matrix in self._shares.mine]
        ops.accumulate_all_(list(self.omega.values()), steps, scales, counted=finite)
        return finite

    def _at_owners(self, pieces: list[Step], finite: Tensor) -> tuple[list[Step], Tensor]:
        """The step of this process's matrices, assembled from the pieces of all processes."""
        tensors = [(p.A, p.B, p.grad_A, p.grad_B, p.A_next, p.B_next) for p in pieces]
        found, finite = self._shares.to_owners(tensors, finite)
        rates = [pieces[i].lr for i in self._shares.indices]
        steps = [Step(A, B, g, h, lr, a, b) for (A, B, g, h, a, b), lr in zip(found, rates, strict=True)]
        return steps, finite

    @property
    def omega(self) -> dict[str, Encoded]:
        """ω so far by matrix name; in several processes, of this one's share."""
        for matrix in self._shares.mine if not self._omega else ():
            sizes, device = (matrix.B.shape[0], matrix.A.shape[1]), matrix.A.device
            self._omega[matrix.name] = encodings.zeros(self.encoding, *sizes, device=device)
        return self._omega

    def consolidated(
        self, As: list[Tensor], Bs: list[Tensor], starts: Mapping[str, Factors], *, xi: float
    ) -> dict[str, Consolidated]:
        """Ω of each matrix by name. ω is overwritten.

        Args:
            As: A of each matrix, (r, d_in).
            Bs: B of each matrix, (d_out, r).
            starts: Factors at the start of the phase, by matrix name.
            xi: Damping ξ, unit weight².

        In several processes each computes its share, and every one gets all of them.

        Source: Eq. 13.
        """
        mine, indices = self._shares.mine, self._shares.indices
        factors = [As[i] for i in indices], [Bs[i] for i in indices]
        own_starts, scales = [starts[m.name] for m in mine], [m.scale for m in mine]
        found = ops.consolidate_all(list(self.omega.values()), *factors, starts=own_starts, scales=scales, xi=xi)
        of = {matrix.name: each for matrix, each in zip(mine, found, strict=True)}
        if self._shares.processes == 1:
            return of
        importance = self._shares.gathered({n: c.importance for n, c in of.items()}, self.encoding, everywhere=True)
        numbers = {name: [each.negative, each.undo_cost, each.norm] for name, each in of.items()}
        known = {name: each for text in all_gather_text(json.dumps(numbers)) for name, each in json.loads(text).items()}
        return {name: Consolidated(omega, *known[name]) for name, omega in importance.items()}

    def gathered(self) -> dict[str, Encoded]:
        """ω of all matrices in the main process; of its share in another."""
        return self._shares.gathered(self.omega, self.encoding, everywhere=False)

    def facts(self) -> dict[str, Any]:
        """What checkpoint and importance record besides the number of steps: nothing."""
        return {}

    def resume(self, steps: int, facts: Mapping[str, Any]) -> None:
        """Restore what a checkpoint holds besides ω: nothing."""
