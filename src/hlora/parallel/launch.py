"""How this process was launched: alone, or by torchrun or accelerate as one of several, for DDP or FSDP2."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist

from hlora.system.errors import ConfigError

logger = logging.getLogger("hlora")


def require_one_process(command: str, instead: str) -> None:
    """Raises ConfigError in a launch of several processes, for a command that works in one process only."""
    if _launched():
        raise ConfigError(f"`{command}` works in one process, and this is one of {os.environ['WORLD_SIZE']}. {instead}")


def join_launch(device: str) -> None:
    """Join the process group if torchrun or accelerate launched this process.

    Args:
        device: `model.device`.

    Raises:
        ConfigError: The launch asks for FSDP1 or DeepSpeed.
    """
    if not _launched():
        if device != "cpu" and (gpus := torch.cuda.device_count()) > 1:
            logger.info("%d GPUs here, and this process uses one. For all of them, docs/guides/distributed.md", gpus)
        return
    if dist.is_initialized():
        return
    old = _asked("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2"
    if old or _asked("DEEPSPEED"):
        raise ConfigError(
            f"this launch asks for {'FSDP1' if old else 'DeepSpeed'}, which takes the adapter's factors apart. For "
            "DDP, launch with torchrun. For a model too large for one device, use FSDP2: `accelerate launch --use_fsdp "
            "--fsdp_version 2` (docs/guides/distributed.md)."
        )
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"  # with sharded ones, Trainer does not save the adapter alone
    os.environ["FSDP_SYNC_MODULE_STATES"] = "false"  # FSDP1 only; Accelerate would look for a GPU
    # Otherwise all blocks are gathered at once.
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def sharding() -> bool:
    """Whether this launch asks for FSDP2. A model is then loaded in full into host memory, until it is sharded."""
    return _launched() and _asked("FSDP")


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _asked(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
