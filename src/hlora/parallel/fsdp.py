"""A model sharded over all processes (FSDP2).

In a launch that asks for FSDP2, Trainer shards the model to train it, and `shard` does to evaluate it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from hlora.parallel.group import world_size
from hlora.parallel.launch import sharding


def device_for(model: nn.Module) -> torch.device:
    """The device on which this process trains and evaluates the model."""
    if sharding() and "nccl" in dist.get_backend_config():  # gloo alone is listed for every kind of device
        return torch.device("cuda", torch.cuda.current_device())
    return next(model.parameters()).device


def shard(model: Any) -> None:
    """Shard a model over all processes, block by block, in place (FSDP2). It cannot be undone.

    A model that Trainer has sharded stays as it is.
    """
    if isinstance(model, FSDPModule):
        return
    mesh = init_device_mesh(device_for(model).type, (world_size(),))
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "generate")


def is_sharded(model: nn.Module) -> bool:
    """Whether every process is needed to run the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Discard the full weights that a forward pass has gathered: they are copies, and changes to them would be lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
