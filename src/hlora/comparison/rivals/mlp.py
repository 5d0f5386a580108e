"""LoRA on the MLP's matrices, not the attention's."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from hlora.model.lora import attach_lora
from hlora.run.job import Job
from hlora.run.phases import History, train_on_domain
from hlora.system.errors import CannotRun

_MLP_NAMES = {"mlp", "feed_forward", "ffn"}


def mlp(job: Job) -> tuple[PeftModel, History]:
    """LoRA on the MLP's matrices in place of lora.target_modules, at the same rank.

    Raises:
        CannotRun: No linear layer is in a module named mlp, feed_forward or ffn.
    """
    names = [
        name
        for name, module in job.base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _MLP_NAMES.intersection(name.split("."))
    ]
    if not names:
        raise CannotRun(f"no linear layer of this model lies in a module named {', '.join(sorted(_MLP_NAMES))}")
    settings = job.config.lora.model_copy(update={"target_modules": names})
    model = attach_lora(job.base, settings, job.config.seed)
    return model, train_on_domain(job, model, "mlp")
