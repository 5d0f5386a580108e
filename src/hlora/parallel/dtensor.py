"""Tensors that FSDP2 shards by rows (DTensors), read and distributed in the same way as any other tensor."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, sharing memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a DTensor, by a collective operation; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(parameter: Tensor, values: Tensor) -> Tensor:
    """`values`, which every process has in full, distributed as the parameter is. Communicates nothing."""
    if not isinstance(parameter, DTensor):
        return values
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=parameter.placements)
