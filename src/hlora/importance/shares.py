"""Divides the matrices among the processes of a training, and exchanges factors and results with their owners.

Under DDP (DistributedDataParallel) every process has all factors and all-reduced gradients; under FSDP2 (`fully_shard`)
they are DTensors, sharded by rows. Either way each process owns whole matrices, balanced by elements. It integrates ω
and evaluates the penalty of its own matrices only. Tensors travel through the training's own process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hlora.numerics import encodings
from hlora.numerics.encodings import Encoded
from hlora.numerics.precision import wide_dtype
from hlora.parallel.dtensor import full_tensor, local_tensor
from hlora.parallel.group import is_main, rank, world_size

if TYPE_CHECKING:
    from hlora.model.adapters import AdaptedMatrix

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in PyTorch 2.13


class Shares:
    """Which process owns which matrix, and the exchange of factors and results with the owners."""

    def __init__(self, matrices: Sequence[AdaptedMatrix]) -> None:
        self.matrices = list(matrices)
        self.processes = world_size()
        self.owners = balanced([m.B.shape[0] * m.A.shape[1] for m in matrices], self.processes)
        self.indices = [i for i, owner in enumerate(self.owners) if owner == rank() or self.processes == 1]
        self.mine = [self.matrices[i] for i in self.indices]

    @property
    def sharded(self) -> bool:
        """Whether the factors are DTensors now, as they are between passes under FSDP2."""
        return any(isinstance(m.A, DTensor) for m in self.matrices)

    @property
    def divided(self) -> bool:
        """Whether results have to be exchanged."""
        return self.processes > 1 or self.sharded

    def pieces(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Factors or gradients for `to_owners`: the local rows if all are sharded by rows, else full tensors."""
        take = local_tensor if self._by_rows else full_tensor
        return [take(tensor) for tensor in tensors]

    @property
    def _by_rows(self) -> bool:
        """Whether every factor is sharded by rows over all processes, as `fully_shard` does on a plain mesh."""
        return all(
            isinstance(f, DTensor) and f.placements == (Shard(0),) and f.device_mesh.size() == self.processes
            for m in self.matrices
            for f in (m.A, m.B)
        )

    def to_owners(self, pieces: Sequence[Sequence[Tensor]], good: Tensor) -> tuple[list[list[Tensor]], Tensor]:
        """Gather the rows of each matrix at its owner, in one collective operation.

        Args:
            pieces: For each matrix A and B, then tensors of the same shapes such as gradients, alternating.
            good: A bool scalar.

        Returns:
            The full tensors of this process's matrices, in float32 or wider; and whether `good` is true everywhere.
        """
        if not self._by_rows:  # every process has full tensors
            return [list(pieces[i]) for i in self.indices], good
        like = pieces[0][0]
        wide = torch.float32
        for each in pieces:
            for piece in each:
                wide = torch.promote_types(wide, piece.dtype)
        outgoing: list[Tensor] = []
        for owner in range(self.processes):
            parts = [p.reshape(-1).to(wide) for i, o in enumerate(self.owners) if o == owner for p in pieces[i]]
            outgoing.append(torch.cat([good.to(wide).view(1), *parts]))
        kinds = len(pieces[0])
        shapes = [(m.A.shape, m.B.shape) * (kinds // 2) for m in self.mine]
        coming = [
            1 + sum(shard_height(s[0], sender, self.processes) * s[1] for each in shapes for s in each)
            for sender in range(self.processes)
        ]
        received = like.new_empty(sum(coming), dtype=wide)
        dist.all_to_all_single(received, torch.cat(outgoing), coming, [len(part) for part in outgoing])
        from_each = list(received.split(coming))
        flags, at = torch.stack([part[0] for part in from_each]), [1] * self.processes
        found = []
        for kinds_of_one in shapes:
            tensors = []
            for d, width in kinds_of_one:
                rows = []
                for sender, part in enumerate(from_each):
                    size = shard_height(d, sender, self.processes) * width
                    rows.append(part[at[sender] : at[sender] + size].view(-1, width))
                    at[sender] += size
                tensors.append(torch.cat(rows))
            found.append(tensors)
        return found, flags.all()

    def to_all(self, values: Sequence[Tensor], gradients: Sequence[tuple[Tensor, Tensor]]) -> Pending:
        """Start to send every matrix's penalty and gradients to every process, in one asynchronous collective."""
        sizes = [0] * self.processes
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            sizes[owner] += 1 + matrix.A.numel() + matrix.B.numel()
        device = self.matrices[0].A.device
        dtype = wide_dtype(self.matrices[0].A)
        sent = torch.zeros(max(sizes), dtype=dtype, device=device)
        parts = [t.reshape(-1) for v, pair in zip(values, gradients, strict=True) for t in (v, *pair)]
        if parts:
            torch.cat([part.to(device, dtype) for part in parts], out=sent[: sizes[rank()]])
        received = sent.new_empty(self.processes, len(sent))
        work = _all_gather(received.view(-1), sent, async_op=True)
        return Pending(self, received, work, self.versions())

    def versions(self) -> list[int]:
        """Version counters that change when a factor changes in place, of DTensors and of the tensors inside."""
        factors = [factor for matrix in self.matrices for factor in (matrix.A, matrix.B)]
        return [factor._version + (local_tensor(factor)._version if self.sharded else 0) for factor in factors]

    def gathered(self, mine: dict[str, Encoded], encoding: str, everywhere: bool) -> dict[str, Encoded]:
        """The matrices of all processes by name, in host memory: in every process, or only in the main one."""
        if self.processes == 1:
            return mine
        found: dict[str, Encoded] = {}
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            device = matrix.A.device
            own = mine.get(matrix.name)
            like = own
            if like is None:
                like = encodings.zeros(encoding, matrix.B.shape[0], matrix.A.shape[1], device=torch.device("meta"))
            parts = {}
            for name, part in encodings.parts(like).items():
                if everywhere:
                    part = torch.empty_like(part, device=device) if own is None else part.to(device).contiguous()
                    dist.broadcast(part, owner)
                elif owner != 0 and own is not None:
                    dist.send(part.to(device).contiguous(), 0)
                elif owner != 0 and is_main():
                    part = torch.empty_like(part, device=device)
                    dist.recv(part, owner)
                parts[name] = part
            if everywhere or own is not None or is_main():
                found[matrix.name] = encodings.from_parts({name: part.cpu() for name, part in parts.items()})
        return found


@dataclass
class Pending:
    """Penalty values and gradients that are being sent to every process."""

    shares: Shares
    received: Tensor  # (processes, numbers)
    work: Any
    versions: list[int]
    """Version counters of the factors that they were computed from."""

    def wait(self) -> tuple[Tensor, list[Tensor]]:  # (L,), gradients in the order A₁, B₁, A₂, B₂, …
        """Wait for them."""
        self.work.wait()
        shares = self.shares
        values: list[Tensor] = []
        gradients: list[Tensor] = []
        at = [0] * len(self.received)
        for matrix, owner in zip(shares.matrices, shares.owners, strict=True):
            for shape in ((), matrix.A.shape, matrix.B.shape):
                size, begin = shape.numel() if shape else 1, at[owner]
                part = self.received[owner, begin : begin + size].view(shape)
                (gradients if shape else values).append(part)
                at[owner] += size
        return torch.stack(values), gradients


def balanced(sizes: Sequence[int], processes: int) -> list[int]:
    """The owner of each matrix: largest first, each to the process with the fewest elements so far."""
    owners, loads = [0] * len(sizes), [0] * processes
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


def shard_height(rows: int, process: int, processes: int) -> int:
    """How many rows a process holds of a DTensor sharded by rows, as torch.chunk divides them."""
    most = -(-rows // processes)
    return max(0, min(most, rows - process * most))
