"""Several processes on one training: whole matrices divided among them, and what has to be agreed on.

Under DDP (DistributedDataParallel) every process has all factors and all-reduced gradients; under FSDP2 (`fully_shard`)
they are DTensors, of which it has some rows. Either way importance is divided by whole matrices, balanced by elements:
a process integrates ω and evaluates the penalty of its own alone. Tensors travel through the training's own group;
decisions and errors through one of gloo beside it, where waiting costs nothing and may take long. In a launch that asks
for FSDP2 `hlora run` has its models sharded, by Trainer to train and by `shard` to evaluate.
Without a process group, or in one of a single process, nothing here communicates.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard

from hlora import encodings, errors, locks
from hlora.encodings import Encoded
from hlora.errors import ConfigError, HloraError

if TYPE_CHECKING:
    from hlora.adapters import AdaptedMatrix

Work = TypeVar("Work")

_PATIENCE = timedelta(days=7)  # the others wait while the first evaluates; a process that dies ends the wait at once
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in PyTorch 2.13
_control: dict[Any, Any] = {}  # a gloo group beside each default group


def world() -> int:
    """Number of processes in the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the default group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process of the group has ended."""
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def only_alone(command: str, instead: str) -> None:
    """Raises ConfigError in a launch of several processes, for a command that does not divide its work."""
    if _launched():
        raise ConfigError(f"`{command}` works in one process, and this is one of {os.environ['WORLD_SIZE']}. {instead}")


def start(device: str) -> None:
    """Join the group of torchrun or accelerate launch, if one of them started this process. device: of the model."""
    if not _launched() or dist.is_initialized():
        return
    old = _asked("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2"
    if old or _asked("DEEPSPEED"):
        raise ConfigError(
            f"this launch asks for {'FSDP1' if old else 'DeepSpeed'}, under which the adapter cannot be read. For DDP "
            "launch with torchrun; for a model too large for that, `accelerate launch --use_fsdp --fsdp_version 2` "
            "(docs/guides/distributed.md)."
        )
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"  # Trainer writes no adapter alone from the other kind
    os.environ["FSDP_SYNC_MODULE_STATES"] = "false"  # of FSDP1; Accelerate would look for a GPU here
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")  # else all blocks are gathered at once
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def sharding() -> bool:
    """Whether this launch asks for FSDP2: a model is then in host memory, whole, until it is sharded."""
    return _launched() and _asked("FSDP")


def _asked(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def device_for(model: nn.Module) -> torch.device:
    """Where this process trains and evaluates the model."""
    if sharding() and "nccl" in dist.get_backend_config():  # gloo alone is listed for every kind of device
        return torch.device("cuda", torch.cuda.current_device())
    return next(model.parameters()).device


def shard(model: Any) -> None:
    """Shard a model over all processes, by blocks, in place and for good (FSDP2). One that Trainer has, stays so."""
    if isinstance(model, FSDPModule):
        return
    mesh = init_device_mesh(device_for(model).type, (world(),))
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "generate")


def is_sharded(model: nn.Module) -> bool:
    """Whether every process is needed to run the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Before factors are changed: what a forward pass has left gathered is a copy, and a change of it would be lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass
class Pending:
    """Penalty values and gradients on their way to every process."""

    shares: Shares
    received: Tensor  # (processes, numbers)
    work: Any
    versions: list[int]
    """Of the factors that they were computed from."""

    def wait(self) -> tuple[Tensor, list[Tensor]]:  # (L,), gradients in the order A₁, B₁, A₂, B₂, …
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


class Shares:
    """Which process does the work of which matrix, and the way of factors to it and of results from it."""

    def __init__(self, matrices: Sequence[AdaptedMatrix]) -> None:
        self.matrices = list(matrices)
        self.processes = world()
        self.owners = balanced([m.B.shape[0] * m.A.shape[1] for m in matrices], self.processes)
        self.indices = [i for i, owner in enumerate(self.owners) if owner == rank() or self.processes == 1]
        self.mine = [self.matrices[i] for i in self.indices]

    @property
    def sharded(self) -> bool:
        """Whether the factors are DTensors now, as FSDP2 leaves them between forward and backward passes."""
        return any(isinstance(m.A, DTensor) for m in self.matrices)

    @property
    def divided(self) -> bool:
        return self.processes > 1 or self.sharded

    def pieces(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What `to_owners` takes of factors or gradients: the rows that are here, or all in any other layout."""
        take = local if self._by_rows else whole
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
        """Bring together, at its owner, what each process has of a matrix; by one collective.

        pieces: of each matrix A, B, then gradients and others like them in turn. good: a bool scalar. Returns the whole
        tensors of this process's matrices, float32 or wider, and whether it is good everywhere.
        """
        if not self._by_rows:  # all of each is here
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
            1 + sum(rows_of(s[0], sender, self.processes) * s[1] for each in shapes for s in each)
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
                    size = rows_of(d, sender, self.processes) * width
                    rows.append(part[at[sender] : at[sender] + size].view(-1, width))
                    at[sender] += size
                tensors.append(torch.cat(rows))
            found.append(tensors)
        return found, flags.all()

    def to_all(self, values: Sequence[Tensor], gradients: Sequence[tuple[Tensor, Tensor]]) -> Pending:
        """Begin to bring every matrix's penalty and gradients to every process; by one collective, not waited for."""
        sizes = [0] * self.processes
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            sizes[owner] += 1 + matrix.A.numel() + matrix.B.numel()
        device = self.matrices[0].A.device
        dtype = torch.promote_types(self.matrices[0].A.dtype, torch.float32)
        sent = torch.zeros(max(sizes), dtype=dtype, device=device)
        parts = [t.reshape(-1) for v, pair in zip(values, gradients, strict=True) for t in (v, *pair)]
        if parts:
            torch.cat([part.to(device, dtype) for part in parts], out=sent[: sizes[rank()]])
        received = sent.new_empty(self.processes, len(sent))
        work = _all_gather(received.view(-1), sent, async_op=True)
        return Pending(self, received, work, self.versions())

    def versions(self) -> list[int]:
        """Numbers that change with the factors in place; a DTensor and what it holds count each for itself."""
        factors = [factor for matrix in self.matrices for factor in (matrix.A, matrix.B)]
        return [factor._version + (local(factor)._version if self.sharded else 0) for factor in factors]

    def gathered(self, mine: dict[str, Encoded], encoding: str, everywhere: bool) -> dict[str, Encoded]:
        """The matrices of all processes by name, in host memory: everywhere, or at the first process alone."""
        if self.processes == 1:
            return mine
        found: dict[str, Encoded] = {}
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            device = matrix.A.device
            own = mine.get(matrix.name)
            like = own
            if like is None:
                like = encodings.zeros(encoding, matrix.B.shape[0], matrix.A.shape[1], torch.device("meta"))
            parts = {}
            for name, part in encodings.parts(like).items():
                if everywhere:
                    part = torch.empty_like(part, device=device) if own is None else part.to(device).contiguous()
                    dist.broadcast(part, owner)
                elif owner != 0 and own is not None:
                    dist.send(part.to(device).contiguous(), 0)
                elif owner != 0 and is_first():
                    part = torch.empty_like(part, device=device)
                    dist.recv(part, owner)
                parts[name] = part
            if everywhere or own is not None or is_first():
                found[matrix.name] = encodings.from_parts({name: part.cpu() for name, part in parts.items()})
        return found


def balanced(sizes: Sequence[int], processes: int) -> list[int]:
    """The process of each matrix: the largest first, each to the one that has least so far."""
    owners, loads = [0] * len(sizes), [0] * processes
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


def rows_of(rows: int, process: int, processes: int) -> int:
    """How many of `rows` a process has of a DTensor that is sharded by rows, as torch.chunk divides them."""
    most = -(-rows // processes)
    return max(0, min(most, rows - process * most))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor, sharing memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, by a collective; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(parameter: Tensor, values: Tensor) -> Tensor:
    """`values`, which every process has, as a DTensor where the parameter is one. Communicates nothing."""
    if not isinstance(parameter, DTensor):
        return values
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=parameter.placements)


def exchange(text: str) -> list[str]:
    """The text of every process, in their order. All have to call it."""
    if world() == 1:
        return [text]
    if dist.group.WORLD not in _control:
        _control[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    group, mine = _control[dist.group.WORLD], torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(lengths, torch.tensor([len(mine)]), group=group)
    longest = max(int(length) for length in lengths)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=group)
    return [bytes(t[: int(n)].tolist()).decode() for t, n in zip(texts, lengths, strict=True)]


def first_says(answer: bool) -> bool:
    """The first process's answer, where another's rounding might give another one."""
    return bool(exchange("yes" if answer else "")[0])


@contextmanager
def together() -> Iterator[None]:
    """What the processes do side by side: an error in one is raised in all of them when the rest are through.

    Nothing inside may wait for another process.
    """
    error: Exception | None = None
    try:
        yield
    except (HloraError, OSError) as raised:
        error = raised
    said = {} if error is None else {"kind": type(error).__name__, "text": str(error)}
    everyone = [json.loads(text) for text in exchange(json.dumps(said))]
    if error is not None:
        error.__dict__["told"] = any(everyone[: rank()])  # an earlier process says it
        raise error
    for number, other in enumerate(everyone):
        if other:
            again = getattr(errors, other["kind"], HloraError)(f"process {number}: {other['text']}")
            again.__dict__["told"] = True
            raise again


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """locks.lock_directory, by the first process for all of them. Raises ConfigError at every one when refused."""
    with ExitStack() as held:
        with together():
            if is_first():
                held.enter_context(locks.lock_directory(directory))
        yield


def first_does(work: Callable[[], Work], in_step: bool = False) -> Work:
    """What the first process makes of `work`, at every one; a value that JSON can hold. Its error is everyone's.

    in_step: all do it, as a sharded model needs them to, and the first one's result counts.
    """
    if world() == 1:
        return work()
    result: Any = None
    with together():
        if is_first():
            result = work()
        elif in_step:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # one shows its progress
                work()
    text = exchange(json.dumps(result) if is_first() else "")[0]
    return result if is_first() else json.loads(text)


def first_goes_first(work: Callable[[], Work]) -> Work:
    """`work` at every process, at the first one before the others: it fills a cache that they read."""
    result: list[Work] = []
    for turn in (True, False):
        with together():
            if is_first() is turn:
                result.append(work())
    return result[0]
