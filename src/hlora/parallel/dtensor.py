"""Tensors that FSDP2 shards (DTensors), and any other tensor, read and laid out in one way."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


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
